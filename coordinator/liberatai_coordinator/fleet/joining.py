"""Who gets a certificate. Pure: what is asked, what is known, and the time in; an answer or a refusal out.

A request comes with an invitation, or from a device that is known by its own key: by the door for devices
while its certificate lasts, by the door for claims when it has ended, or while it waits for approval.
"""

from dataclasses import dataclass
from typing import Literal

from liberatai_coordinator.fleet.devices import Device
from liberatai_core.contract.messages import CertificateRequest
from liberatai_core.errors import (
    ExpiredError,
    RevokedError,
    SignatureError,
    TopicError,
    UnknownDeviceError,
)

DAY_S = 86_400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What the coordinator knows of who asks.

    Attributes:
        device: as it is registered; None: it is not.
        end_s: end of its newest certificate; None: it never had one.
        revoked: that one was revoked.
        approval: of the invitation that it came with; None: it came without.
    """

    device: Device | None
    end_s: float | None = None
    revoked: bool = False
    approval: Literal["auto", "hand"] | None = None


def answer(
    request: CertificateRequest,
    signer: bytes,
    door: Literal["device", "claim"],
    known: Known,
    now_s: float,
    grace_s: float,
) -> Literal["issue", "pending", "knock"]:
    """Return what is done about a request; "knock": the name has another key, which an operator may replace.

    Args:
        request: verified.
        signer: public key that verified it.
        door: by which it came: the topic carries the device's own name, or that of a claim.
        known: of who asks.
        now_s: Unix seconds.
        grace_s: for so long after the end of its certificate a device is still known by its key.

    Raises:
        SignatureError: it carries another key than it is signed with, or the name has another key.
        RevokedError: the device is shut out. UnknownDeviceError: nobody let it in.
        ExpiredError: its certificate ended too long ago.
    """
    device = known.device
    if request.public_key != signer:
        raise SignatureError("the request carries another key than it is signed with")
    if device is not None and device.public_key != signer and known.approval is None:
        raise SignatureError(f"{device.id} has another key")
    if device is not None and device.status == "quarantined":
        raise RevokedError(f"{device.id} is quarantined: {device.reason}")
    if device is not None and device.public_key != signer:
        return "knock"
    if known.approval is not None:
        is_in = known.approval == "auto" or (device is not None and device.status == "approved")
        return "issue" if is_in else "pending"
    if device is None:
        raise UnknownDeviceError(f"{request.device}: nobody invited this device, and its key is not known")
    if known.revoked:
        raise RevokedError(f"{device.id}: its certificate was revoked: invite it again")
    if door == "claim" and known.end_s is not None and now_s > known.end_s + grace_s:
        days = (now_s - known.end_s) / DAY_S
        raise ExpiredError(
            f"{device.id}: its certificate ended {days:.0f} days ago, more than {grace_s / DAY_S:g}: "
            "invite it again"
        )
    return "issue" if device.status == "approved" else "pending"


def door_of(request: CertificateRequest, owner: str, claim: str) -> Literal["device", "claim"]:
    """Return by which door a request came.

    Args:
        request: what is asked.
        owner: name in the topic: common name of the certificate that the broker saw.
        claim: name of the claim credential that belongs to the device.

    Raises:
        TopicError: it came by somebody else's topic.
    """
    if request.claim is None and owner == request.device:
        return "device"
    if owner == (claim if request.claim is None else request.claim):
        return "claim"
    raise TopicError(f"a request of {request.device} on the topic of {owner}")
