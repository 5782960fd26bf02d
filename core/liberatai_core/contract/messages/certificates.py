"""How a device asks for a certificate, and what it is answered."""

import hashlib
from typing import Annotated, Literal

from msgspec import Meta

from liberatai_core.contract import limits
from liberatai_core.contract.messages.base import DeviceId, Key, Message, Text, UpdateId
from liberatai_core.contract.topics import FLEET_OR_DEVICE


class CertificateRequest(Message, frozen=True, kw_only=True):
    """Asks for a certificate: with an invitation, before the old one ends, or after it has ended.

    Signed with the device's own key, which it carries, so that it introduces the device.

    Attributes:
        public_key: Ed25519 key of the device.
        nonce: names the answer.
        request: PKCS #10 (DER) for the device's name, with the EC key that the certificate shall have.
        claim: name of the invitation; "": the coordinator knows the device's key.
        proof: signature of the invitation's key under what is asked for (`claimed`).
    """

    device: DeviceId
    public_key: Key
    nonce: UpdateId
    request: Annotated[bytes, Meta(min_length=1, max_length=limits.MAX_REQUEST_BYTES)]
    claim: Annotated[str, Meta(pattern=FLEET_OR_DEVICE)] | None = None
    proof: Annotated[bytes, Meta(max_length=128)] = b""


def claimed(fleet: str, device: str, public_key: bytes, request: bytes) -> bytes:
    """Return what the holder of an invitation signs: this device, with these keys, of this fleet."""
    parts = (b"liberatai/claim", fleet.encode(), device.encode(), public_key, request)
    return hashlib.sha256(b"".join(len(part).to_bytes(4, "big") + part for part in parts)).digest()


class CertificateReply(Message, frozen=True, kw_only=True):
    """Answers a CertificateRequest.

    Attributes:
        nonce: of the request.
        state: "pending": an operator has to approve the device; it asks again later.
        code, text: why it was refused, or whom it waits for.
        now_s: Unix seconds of the coordinator: a device without a clock knows no other.
        certificate: X.509 (DER) for the key of the request.
        authority: the authority's certificate (DER).
        claim: certificate (DER) for the same key, with which the device may ask again by the door for claims.
        profile: hardware class that the invitation names; "": none.
    """

    device: DeviceId
    nonce: UpdateId
    state: Literal["issued", "pending", "refused"]
    code: Annotated[str, Meta(max_length=32)] = ""
    text: Text = ""
    now_s: Annotated[float, Meta(ge=0, le=2**53)] = 0.0
    certificate: Annotated[bytes, Meta(max_length=limits.MAX_CERTIFICATE_BYTES)] = b""
    authority: Annotated[bytes, Meta(max_length=limits.MAX_CERTIFICATE_BYTES)] = b""
    claim: Annotated[bytes, Meta(max_length=limits.MAX_CERTIFICATE_BYTES)] = b""
    profile: Annotated[str, Meta(max_length=64)] = ""
