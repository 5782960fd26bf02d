"""Requests for certificates: from a signed message to a certificate, a word of patience, or a refusal.

Devices ask again until they are answered, so nothing here is queued or repeated. A certificate is in the
authority's list before it is sent; one that is lost on the way is asked for again, and ends unused.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgspec

from liberatai_coordinator import clock
from liberatai_coordinator.authority.authority import Authority
from liberatai_coordinator.authority.invitations import Invitation, Invitations
from liberatai_coordinator.config import CoordinatorConfig
from liberatai_coordinator.fleet.devices import Device, Fleet, Status
from liberatai_coordinator.fleet.joining import DAY_S, Known, answer, door_of
from liberatai_coordinator.fleet.keys import knock
from liberatai_core.certificate_file import WARN_SHARE, read_dates
from liberatai_core.certificates import certificate_pem, facts, key_pem, new_key, proves, requested_key
from liberatai_core.contract.frame import fingerprint
from liberatai_core.contract.limits import MAX_TEXT
from liberatai_core.contract.messages import CertificateReply, CertificateRequest, claimed
from liberatai_core.contract.topics import Place, claim_name
from liberatai_core.errors import BusyError, LiberataiError, QuotaError, StateError, TokenError
from liberatai_core.files import write_durably

log = logging.getLogger(__name__)

MAX_PER_DAY: Final = 20
"""Certificates that a device gets in a day: each is a line in a list for ever, and a signature."""
LOOK_S: Final = 3600.0
"""Between two looks at the coordinator's and the broker's own certificates."""
FIRST_LOOK_S: Final = 5.0
PENDING_DAYS: Final = 7.0
"""A device that waits for approval may ask again for so long; as long as the registry keeps it."""

MAX_ASKING: Final = 64
"""Requests that wait; each costs some milliseconds and a write to the disk."""
SAY_AGAIN_S: Final = 600.0
MAX_SAID: Final = 10_000

Note = Callable[[str, str, str, str], None]
Send = Callable[[str, CertificateReply], Awaitable[None]]


@dataclass(slots=True, kw_only=True)
class Enrolment:
    """Answers requests for certificates.

    Attributes:
        config: settings.
        fleet: who is let in.
        authority: signs.
        remember: writes a device down.
        send: sends the answer to a claim or a device.
        sync: brings the broker's files up to date.
        renew_link: lets the coordinator's own link connect anew.
        ends_s: end of each device's newest certificate.
        note: notes an event of the fleet: device, name, code, text.
        fault: what an operator should know of the coordinator's own certificate.
    """

    config: CoordinatorConfig
    fleet: Fleet
    authority: Authority
    remember: Callable[[Device, Invitation], None]
    send: Send
    sync: Callable[[], Awaitable[None]]
    renew_link: Callable[[], Awaitable[None]]
    note: Note
    invitations: Invitations = field(init=False)
    ends_s: dict[str, float] = field(default_factory=dict)
    fault: str = ""
    _given: dict[str, tuple[float, int]] = field(default_factory=dict)
    _asking: set[str] = field(default_factory=set)
    _said: dict[tuple[str, str], float] = field(default_factory=dict)
    _lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    def __post_init__(self) -> None:
        """Open the list of invitations."""
        self.invitations = Invitations(self.authority)

    async def load(self) -> None:
        """Learn when devices' certificates end."""
        issued = await asyncio.to_thread(self.authority.issued)
        for one in issued:
            if one.role == "device" and one.revoked_s is None:
                self.ends_s[one.name] = max(one.end_s, self.ends_s.get(one.name, 0.0))

    def require_turn(self, owner: str) -> None:
        """Refuse a request of somebody whose last one is not answered yet, or one too many.

        Raises:
            BusyError: it may come again.
        """
        if owner in self._asking or len(self._asking) >= MAX_ASKING:
            raise BusyError(f"{owner}: {len(self._asking)} requests for certificates wait already")
        self._asking.add(owner)

    async def hear(
        self,
        request: CertificateRequest,
        signer: bytes,
        place: Place,
        refused: Callable[[LiberataiError], None],
    ) -> None:
        """Answer a request; who is refused is told the code.

        Args:
            request: verified.
            signer: public key that verified it.
            place: what its topic says.
            refused: counts a refusal.
        """
        try:
            async with self._lock:  # one after the other: each reads and writes the authority's files
                reply = await self._answer(request, signer, place)
        except LiberataiError as error:
            refused(error)
            self._say_refused(request.device, error)
            reply = self._reply(request, "refused", code=error.code, text=str(error))
        finally:
            self._asking.discard(place.owner)
        await self._send(place, reply)

    def _say_refused(self, device: str, error: LiberataiError) -> None:
        """Log and note a refusal, not the same one again for a while: a device asks again and again."""
        now_s, kind = clock.monotonic(), (device, error.code)
        if now_s - self._said.get(kind, -SAY_AGAIN_S) < SAY_AGAIN_S:
            return
        if len(self._said) >= MAX_SAID:
            self._said.clear()
        self._said[kind] = now_s
        log.warning("no certificate for %s: %s %s", device, error.code, error)
        self.note(device, "certificate_refused", error.code, str(error)[:MAX_TEXT])

    async def _send(self, place: Place, reply: CertificateReply) -> None:
        try:
            await self.send(place.owner, reply)
        except LiberataiError as error:
            log.info("an answer to %s was not sent: %s %s", place.owner, error.code, error)

    async def _answer(self, request: CertificateRequest, signer: bytes, place: Place) -> CertificateReply:
        name = request.device
        door = door_of(request, place.owner, claim_name(name))
        key = requested_key(request.request, name)
        invitation = None
        if request.claim is not None:
            invitation = await asyncio.to_thread(self._invited, request)
        newest = await asyncio.to_thread(self.authority.newest, name) if invitation is None else None
        known = Known(
            device=self.fleet.devices.get(name),
            end_s=newest.end_s if newest else None,
            revoked=newest is not None and newest.revoked_s is not None,
            approval=invitation.approval if invitation else None,
        )
        if name == self.config.coordinator:
            raise StateError(f"{name} is the coordinator's name: take another one")
        decided = answer(request, signer, door, known, clock.wall(), self.config.joining.rejoin_days * DAY_S)
        if decided == "issue":
            self._require_quota(name)
        if decided == "knock" and invitation is not None:
            await asyncio.to_thread(self.invitations.use, invitation.claim, name, signer)
            return self._knocked(request, signer)
        if invitation is not None:
            invitation = await asyncio.to_thread(self.invitations.use, invitation.claim, name, signer)
            status: Status = "approved" if decided == "issue" else "pending"
            now_s, wall_s = clock.monotonic(), clock.wall()
            self.remember(self.fleet.enrol(name, signer, status, now_s, wall_s), invitation)
        life_s = self.config.joining.certificate_days * DAY_S
        profile = invitation.profile if invitation else ""
        if decided == "pending":
            claim = b""
            if place.owner != claim_name(name):  # it has none yet that lasts until somebody approves it
                self._require_quota(name)
                claim = await asyncio.to_thread(
                    self.authority.issue, key, "claim", claim_name(name), PENDING_DAYS * DAY_S
                )
            mark = fingerprint(signer)
            if claim:
                approve = f"liberatai devices approve {name} --key {mark}"
                log.warning("%s waits for approval, key %s: `%s`", name, mark, approve)
            text = f"coordinator {self.config.coordinator} has to approve {name}, key {mark}"
            return self._reply(request, "pending", text=text, claim=claim, profile=profile)
        certificate = await asyncio.to_thread(self.authority.issue, key, "device", name, life_s)
        grace_s = self.config.joining.rejoin_days * DAY_S
        claim = await asyncio.to_thread(
            self.authority.issue, key, "claim", claim_name(name), life_s + grace_s
        )
        self.ends_s[name] = facts(certificate).end_s
        log.info("%s has a new certificate, key %s", name, fingerprint(signer))
        return self._reply(request, "issued", certificate=certificate, claim=claim, profile=profile)

    def _knocked(self, request: CertificateRequest, signer: bytes) -> CertificateReply:
        """Tell the operator that a device which was set up anew asks for its old name, and let it wait."""
        name, mark = request.device, fingerprint(signer)
        self.fleet.buried.require_alive(signer)
        if knock(self.fleet.knocks, name, signer, 0, self.fleet.wall_s):
            rekey = f"liberatai devices rekey {name} --key {mark}"
            log.warning("another key asks for the name %s: `%s`", name, rekey)
            self.note(name, "knocking", StateError.code, f"key {mark}")
        text = (
            f"a device {name} with another key is in the fleet: coordinator {self.config.coordinator} has to "
            f"take this one (rekey), key {mark}; or join with another name"
        )
        return self._reply(request, "pending", text=text)

    def _reply(self, request: CertificateRequest, state: str, **more: object) -> CertificateReply:
        fields = {
            "device": request.device,
            "nonce": request.nonce,
            "state": state,
            "now_s": clock.wall(),
            "authority": self.authority.certificates["ca"],
            **more,
        }
        if "text" in fields:
            fields["text"] = str(fields["text"])[:MAX_TEXT]
        return msgspec.convert(fields, CertificateReply, builtin_types=(bytes,))

    def _invited(self, request: CertificateRequest) -> Invitation:
        claim = request.claim or ""
        found = self.invitations.find(claim)
        said = claimed(self.config.fleet, request.device, request.public_key, request.request)
        if not proves(found.certificate, request.proof, said):
            raise TokenError("the request is not signed with the invitation's key")
        self.invitations.check(found, request.device, request.public_key, clock.wall())
        return found

    def _require_quota(self, name: str) -> None:
        now_s = clock.monotonic()
        since_s, count = self._given.get(name, (now_s, 0))
        if now_s - since_s > DAY_S:
            since_s, count = now_s, 0
        if count >= MAX_PER_DAY:
            raise QuotaError(f"{name}: {MAX_PER_DAY} certificates in a day are enough")
        self._given[name] = since_s, count + 1

    # --- certificates of our own ------------------------------------------------------------------

    async def look_after(self) -> None:
        """Renew the coordinator's own certificate and the broker's, for ever."""
        await asyncio.sleep(FIRST_LOOK_S)
        while True:
            trouble = ""
            try:
                if await asyncio.to_thread(self.renew_own):
                    await self.renew_link()
                await self.sync()
            except (LiberataiError, OSError) as error:
                trouble = f": {error}"
                log.warning("certificates of our own are not renewed%s", trouble)
            self.fault = await asyncio.to_thread(self._fault, trouble)
            await asyncio.sleep(LOOK_S)

    def _fault(self, trouble: str) -> str:
        """Return what an operator should know of the coordinator's own certificate; "": nothing."""
        try:
            dates = read_dates(Path(self.config.cert_file)) if self.config.cert_file else None
        except LiberataiError as error:
            return str(error)
        if dates is None or not dates.ends_soon(clock.wall()):
            return ""
        left = dates.days_left(clock.wall())
        return f"the coordinator's certificate ends in {left:.1f} days and was not renewed{trouble}"

    def ending(self, device: str) -> str:
        """Return in words that a device's certificate should have been renewed long ago; "": all is well."""
        end_s, life_s = self.ends_s.get(device, 0.0), self.config.joining.certificate_days * DAY_S
        left_s = end_s - clock.wall()
        if not end_s or left_s > WARN_SHARE * life_s:
            return ""
        if left_s > 0:
            return (
                f"its certificate ends in {left_s / DAY_S:.1f} days, and the device has not asked for another"
            )
        return f"its certificate ended {-left_s / DAY_S:.1f} days ago: it joins by itself, or by a new token"

    def renew_own(self) -> bool:
        """Put a new certificate beside the coordinator's own, when two thirds of its life are over.

        Returns:
            Whether the link has something to prove.
        """
        own = self.config.cert_file
        if own is None or own != self.config.key_file:
            return False
        path = Path(own)
        beside = path.with_name(f"{path.stem}.next{path.suffix}")
        dates = read_dates(path)
        if beside.exists() or clock.wall() < dates.renew_s:
            return beside.exists()
        key, name = new_key(), self.config.coordinator
        der = self.authority.issue(key.public_key(), "coordinator", name, dates.end_s - dates.start_s)
        write_durably(beside, certificate_pem(der) + key_pem(key))
        log.info("a new certificate of coordinator %s lies beside the old one", name)
        return True
