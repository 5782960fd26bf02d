"""Invitations: who may join by a token, in a file beside the authority that signed their claims.

A line per invitation, and a line when it is used. The private key of a claim is in its token alone: whoever
reads this file cannot join.
"""

import base64
import fcntl
import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Annotated, Final, Literal

import msgspec
from cryptography.hazmat.primitives.asymmetric import ec
from msgspec import Meta

from liberatai_coordinator import clock
from liberatai_coordinator.authority.authority import Authority
from liberatai_core.contract.topics import CLAIM_PREFIX, FLEET_OR_DEVICE
from liberatai_core.errors import DiskError, ExpiredError, TokenError
from liberatai_core.files import write_durably

FILE: Final = "invitations.jsonl"
Approval = Literal["auto", "hand"]
KEPT_S: Final = 30 * 86_400.0
"""What is used up or over stays in the list for so long: an operator wants to know who came by which."""


class Invitation(msgspec.Struct, frozen=True, kw_only=True):
    """One invitation, for one device.

    Attributes:
        claim: name of its claim credential.
        certificate: of the claim (DER).
        device: that it is for; "": any, until one has used it.
        profile, group: what the device becomes.
        approval: "auto": who holds the token is let in; "hand": an operator compares keys.
        public_key: of the device that has used it; b"": nobody has.
    """

    claim: Annotated[str, Meta(pattern=FLEET_OR_DEVICE)]
    certificate: bytes
    created_s: float
    expires_s: float
    device: str = ""
    profile: str = ""
    group: str = ""
    approval: Approval = "auto"
    public_key: bytes = b""
    used_s: float = 0.0

    def state(self, now_s: float) -> Literal["open", "used", "expired"]:
        """Return what it is worth now."""
        if self.public_key:
            return "used"
        return "open" if now_s < self.expires_s else "expired"


_DECODER = msgspec.json.Decoder(Invitation)


class Invitations:
    """All invitations of a fleet.

    Args:
        authority: signs their claims; the file lies in its folder.
    """

    def __init__(self, authority: Authority) -> None:
        self._authority, self._path = authority, authority.folder / FILE

    def invite(
        self,
        ttl_s: float,
        *,
        device: str = "",
        profile: str = "",
        group: str = "",
        approval: Approval = "auto",
        count: int = 1,
        now_s: float | None = None,
    ) -> list[tuple[Invitation, bytes]]:
        """Make invitations; return each with the 32 bytes of its private key, which are kept nowhere.

        Raises:
            NotFoundError: the authority's key is not here. DiskError: it cannot be noted.
        """
        now_s = clock.wall() if now_s is None else now_s
        made = []
        for _ in range(count):
            number = int.from_bytes(secrets.token_bytes(40), "big") % (_ORDER - 1) + 1
            key = ec.derive_private_key(number, ec.SECP256R1())
            claim = CLAIM_PREFIX + base64.b32encode(secrets.token_bytes(10)).decode().lower()
            one = Invitation(
                claim=claim,
                certificate=self._authority.issue(key.public_key(), "claim", claim, ttl_s, now_s=now_s),
                created_s=now_s,
                expires_s=now_s + ttl_s,
                device=device,
                profile=profile,
                group=group,
                approval=approval,
            )
            made.append((one, number.to_bytes(32, "big")))
        with self._locked():
            self._write([*self._kept(now_s), *(one for one, _ in made)])
        return made

    def all(self) -> list[Invitation]:
        """Return all invitations, the oldest first.

        Raises:
            DiskError: they cannot be read.
        """
        try:
            lines = self._path.read_bytes().splitlines()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise DiskError(f"{self._path}: {error.strerror}") from error
        return [_DECODER.decode(line) for line in lines if line]

    def find(self, claim: str) -> Invitation:
        """Return one invitation.

        Raises:
            TokenError: nobody made it here, or long ago.
        """
        for one in self.all():
            if one.claim == claim:
                return one
        raise TokenError("nobody made this invitation here")

    def use(self, claim: str, device: str, public_key: bytes, *, now_s: float | None = None) -> Invitation:
        """Bind an invitation to the first device that uses it; the same device may use it again.

        Raises:
            TokenError: no such invitation, or another device has used it, or it is for another one.
            ExpiredError: its time is over.
        """
        now_s = clock.wall() if now_s is None else now_s
        with self._locked():
            found = self.find(claim)
            self.check(found, device, public_key, now_s)
            if found.public_key:
                return found
            used = msgspec.structs.replace(found, device=device, public_key=public_key, used_s=now_s)
            self._write([used if one.claim == claim else one for one in self._kept(now_s)])
            return used

    @staticmethod
    def check(invitation: Invitation, device: str, public_key: bytes, now_s: float) -> None:
        """Refuse who may not use an invitation; see `use`."""
        if invitation.public_key:
            if (invitation.device, invitation.public_key) != (device, public_key):
                raise TokenError(
                    f"this invitation was used by {invitation.device}: it is good for one device"
                )
            return
        if invitation.device and invitation.device != device:
            raise TokenError(f"this invitation is for {invitation.device}, not for {device}")
        if now_s >= invitation.expires_s:
            raise ExpiredError("the time of this invitation is over: ask for a new one")

    def _kept(self, now_s: float) -> list[Invitation]:
        return [one for one in self.all() if max(one.expires_s, one.used_s) + KEPT_S > now_s]

    def _write(self, invitations: Iterable[Invitation]) -> None:
        try:
            write_durably(self._path, b"".join(msgspec.json.encode(one) + b"\n" for one in invitations))
        except OSError as error:
            raise DiskError(f"{self._path}: {error.strerror}") from error

    @contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            lock = os.open(self._path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise DiskError(f"{self._path}: {error.strerror}") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)


_ORDER: Final = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
"""Number of points of P-256 (FIPS 186-4, D.1.2.3)."""
