"""A broker proven from outside: with certificates made for the purpose, what must work and what must not.

Three clients take part: two devices, and an observer, whose rights end at these two. Their names are fixed,
so that a broker's access list can know them; a coordinator that runs is not disturbed. What is published is
empty or noise on topics of these names alone, and is taken away again.
"""

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from liberatai_coordinator.authority.authority import Authority
from liberatai_coordinator.authority.mosquitto import CHECKED, OBSERVER
from liberatai_coordinator.authority.signing import Role
from liberatai_core.certificates import certificate_pem, key_pem, new_key
from liberatai_core.contract.limits import CHUNK_BYTES
from liberatai_core.contract.topics import Topics
from liberatai_core.errors import LiberataiError, LinkError, TooLargeError
from liberatai_core.link.link import Connected, Disconnected, LinkEvent, Received, Will
from liberatai_core.link.mqtt import MqttLink, MqttSettings, TlsSettings

LIFE_S: Final = 600.0
"""Of the certificates of a check."""
ANSWER_S: Final = 10.0
QUIET_S: Final = 1.0
"""So long nothing may come that would have come at once."""
CHUNK: Final = 2 * CHUNK_BYTES
"""The longest payload of this protocol: 256 KiB."""
STRANGER: Final = "check-stranger"
CLAIM: Final = "claim-check"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was tried."""

    check: str
    ok: bool
    text: str


class Client:
    """A link whose events are collected."""

    def __init__(self, settings: MqttSettings, will: Will | None = None) -> None:
        self.link = MqttLink(settings, will)
        self.events: asyncio.Queue[LinkEvent] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Begin to connect, and to collect."""
        self._task = asyncio.create_task(self._collect())
        await self.link.open()

    async def _collect(self) -> None:
        async for event in self.link.events():
            if isinstance(event, Received):
                self.link.ack(event.token)
            self.events.put_nowait(event)

    async def next(self, wanted: Callable[[LinkEvent], bool], seconds: float = ANSWER_S) -> Any:
        """Return the next event that is wanted; None: none came in time."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while True:
                    event = await self.events.get()
                    if wanted(event):
                        return event
        return None

    async def close(self) -> None:
        """Say goodbye."""
        await self.link.close()
        if self._task is not None:
            await self._task


class BrokerCheck:
    """Checks one broker.

    Args:
        url: of the door for devices.
        claim_url: of the door for claims; "": it is not looked at.
        authority: signs what the check needs.
        ca_file: the authority's certificate.
        folder: for certificates and keys, which are worth nothing afterwards.
    """

    def __init__(self, url: str, claim_url: str, authority: Authority, ca_file: Path, folder: Path) -> None:
        self._url, self._claim_url, self._authority = url, claim_url, authority
        self._ca_file, self._folder = ca_file, folder
        self._topics = Topics(fleet=authority.fleet)
        self._found: list[Finding] = []

    async def run(self) -> list[Finding]:
        """Try everything; every certificate is revoked afterwards."""
        try:
            for name in (*CHECKED, OBSERVER):
                await asyncio.to_thread(self._credential, name, "device")
            await asyncio.to_thread(self._credential, CLAIM, "claim")
            first = await self._reachable()
            if first:
                await self._doors()
                await self._identity()
                await self._rights()
                await self._bytes()
                if self._claim_url:
                    await self._claims()
        finally:
            for name in (*CHECKED, OBSERVER, CLAIM):
                await asyncio.to_thread(self._authority.revoke, name, "a check")
        return self._found

    # --- what it is made of -------------------------------------------------------------------------

    def _note(self, check: str, text: str, fault: str = "") -> None:
        self._found.append(Finding(check=check, ok=not fault, text=fault or text))

    def _credential(self, name: str, role: Role, authority: Authority | None = None) -> Path:
        key = new_key()
        der = (authority or self._authority).issue(key.public_key(), role, name, LIFE_S)
        path = self._folder / f"{name}.pem"
        path.touch(mode=0o600)
        path.write_bytes(certificate_pem(der) + key_pem(key))
        return path

    def _settings(self, name: str, *, url: str = "", pem: Path | None = None, **more: Any) -> MqttSettings:
        file = pem or self._folder / f"{name}.pem"
        tls = TlsSettings(ca_file=self._ca_file, cert_file=file, key_file=file)
        settings = MqttSettings.from_url(url or self._url, client_id=name, tls=tls)
        return replace(settings, **{"session_expiry_s": 0, "reconnect_cap_s": 0.5, "spread_s": 0.5, **more})

    @contextlib.asynccontextmanager
    async def _client(
        self, name: str, *filters: str, will: Will | None = None, **more: Any
    ) -> AsyncIterator[Client]:
        client = Client(self._settings(name, **more), will)
        if filters:
            await client.link.subscribe(*filters)
        await client.open()
        try:
            if await client.next(lambda event: isinstance(event, Connected)) is None:
                raise LinkError(f"{name} is not let in")
            yield client
        finally:
            await client.close()

    async def _refusal(self, settings: MqttSettings) -> str:
        """Return why somebody is not let in; "": he is."""
        client = Client(replace(settings, protocol="5"))
        await client.open()
        try:
            event = await client.next(lambda event: isinstance(event, Connected | Disconnected))
            return event.reason if isinstance(event, Disconnected) else "" if event else "no answer"
        finally:
            await client.close()

    # --- checks -----------------------------------------------------------------------------------------

    async def _reachable(self) -> bool:
        client = Client(self._settings(CHECKED[0]))
        await client.open()
        try:
            event = await client.next(lambda event: isinstance(event, Connected), 2 * ANSWER_S)
            if event is None:
                reasons = [one.reason for one in _drained(client) if isinstance(one, Disconnected)]
                fault = reasons[-1] if reasons else "no answer"
                self._note("a device is let in", "", f"{self._url}: {fault}")
                return False
            self._note("a device is let in", f"{self._url}, {event.protocol}")
            size = event.max_packet_bytes
            fault = f"packets have at most {size} bytes: max_packet_size" if size < CHUNK + 4096 else ""
            self._note("packets", f"{size} bytes", fault)
        finally:
            await client.close()
        return True

    async def _doors(self) -> None:
        with tempfile.TemporaryDirectory() as other:
            foreign = await asyncio.to_thread(Authority.create, Path(other) / "ca", self._authority.fleet)
            pem = await asyncio.to_thread(self._credential, STRANGER, "device", foreign)
        no_certificate = replace(self._settings(STRANGER), tls=TlsSettings(ca_file=self._ca_file))
        tried = {
            "no certificate": no_certificate,
            "a foreign authority's certificate": self._settings(STRANGER, pem=pem),
            "a claim": self._settings(CLAIM),
        }
        for who, settings in tried.items():
            reason = await self._refusal(settings)
            fault = "" if reason else "is let in: require_certificate, cafile"
            self._note(f"{who} at the door for devices", f"refused: {reason}", fault)

    async def _identity(self) -> None:
        victim, thief = CHECKED
        async with self._client(victim) as client:
            as_victim = self._settings(victim, pem=self._folder / f"{thief}.pem")
            second = Client(as_victim)
            await second.open()
            await second.next(lambda event: isinstance(event, Connected | Disconnected))
            lost = await client.next(lambda event: isinstance(event, Disconnected), QUIET_S)
            await second.close()
            fault = "it was thrown out: the certificate's name must be the client id" if lost else ""
            self._note("another certificate asks for a device's session", "the device stays connected", fault)

    async def _rights(self) -> None:
        own, other = CHECKED
        up, down = self._topics.up, self._topics.down
        foreign = {
            "another device's words": up(other, "ev"),
            "a device's tasks": down(own, "task"),
            "a model": self._topics.head("check"),
            "the coordinator's presence": self._topics.coordinator("check"),
            "another's request for a certificate": self._topics.provisioning(other, "csr"),
        }
        async with (
            self._client(OBSERVER, up(own, "ev"), up(other, "ev")) as observer,
            self._client(own, "#", f"lai/v1/{self._authority.fleet}/#", down(other, "task")) as device,
        ):
            for what, topic in foreign.items():
                fault = f"the broker took it: access list ({topic})"
                try:
                    await device.link.publish(topic, b"")
                except LinkError:
                    fault = ""
                self._note(f"a device writes {what}", "refused", fault)
            await device.link.publish(up(own, "ev"), b"check")
            heard = await observer.next(lambda event: isinstance(event, Received))
            self._note(
                "a device writes its own words", "heard", "" if heard else "nobody heard it: access list"
            )
            await observer.link.publish(down(other, "task"), b"secret")
            await observer.link.publish(down(own, "task"), b"own")
            first = await device.next(lambda event: isinstance(event, Received))
            fault = "" if first and first.payload == b"own" else "it does not hear its own: access list"
            if first and first.payload == b"secret":
                fault = "it does: access list"
            self._note("a device hears what is meant for another", "only its own", fault)
            more = [one for one in [first, *_drained(device)] if isinstance(one, Received)]
            if any(one.payload == b"secret" for one in more):
                self._note("a device hears what is meant for another", "", "it does: access list")

    async def _bytes(self) -> None:
        own, _ = CHECKED
        state = self._topics.up(own, "state")
        async with self._client(OBSERVER, state, self._topics.up(own, "ev")) as observer:
            will = Will(topic=state, payload=b"lost")
            async with self._client(own, will=will) as device:
                try:
                    await device.link.publish(self._topics.up(own, "ev"), bytes(CHUNK))
                    heard = await observer.next(lambda event: isinstance(event, Received))
                    passed = heard is not None and len(heard.payload) == CHUNK
                    fault = "" if passed else "it was acknowledged and did not come: message_size_limit"
                except (LinkError, TooLargeError) as error:
                    fault = str(error)
                self._note("a chunk of 256 KiB", "passes", fault)
                await device.link.publish(state, b"here", retain=True)
                await observer.next(lambda event: isinstance(event, Received))
                await device.link.abandon()
            told = await observer.next(lambda event: isinstance(event, Received) and event.payload == b"lost")
            self._note("the will of a device that is cut off", "is said", "" if told else "it is not said")
        async with self._client(OBSERVER, state) as observer:
            kept = await observer.next(lambda event: isinstance(event, Received) and event.retained)
            self._note("retained words", "are kept", "" if kept else "they are not kept")
        await self._session()
        async with self._client(own) as device:
            await device.link.publish(state, b"", retain=True)

    async def _session(self) -> None:
        own, _ = CHECKED
        xa = self._topics.down(own, "xa")
        async with self._client(own, xa, session_expiry_s=60):
            pass
        async with self._client(OBSERVER) as observer:
            await observer.link.publish(xa, b"meanwhile")
        async with self._client(own, session_expiry_s=60) as device:
            heard = await device.next(lambda event: isinstance(event, Received))
            fault = "" if heard else "it does not: persistent sessions"
            self._note("a session keeps what came meanwhile", "it does", fault)
        async with self._client(own):  # a clean start takes the session away
            pass

    async def _claims(self) -> None:
        reason = await self._refusal(self._settings(CHECKED[0], url=self._claim_url))
        fault = "" if reason else "it is let in: the door for claims must trust claims.crt alone"
        self._note("a device at the door for claims", f"refused: {reason}", fault)
        prov = self._topics.provisioning
        try:
            async with self._client(CLAIM, "#", prov(CLAIM, "crt"), url=self._claim_url) as claim:
                await claim.link.publish(prov(CLAIM, "csr"), b"")
                self._note("a claim asks for a certificate", "the broker takes it")
                tried = {
                    "another's request": prov(CHECKED[0], "csr"),
                    "an answer": prov(CLAIM, "crt"),
                    "a device's words": self._topics.up(CHECKED[0], "ev"),
                    "its own words": f"lai/v1/{self._authority.fleet}/up/{CLAIM}/ev",
                }
                for what, topic in tried.items():
                    fault = f"the broker took it: acl-claims ({topic})"
                    with contextlib.suppress(LinkError):
                        await claim.link.publish(topic, b"")
                        self._note(f"a claim writes {what}", "", fault)
                        continue
                    self._note(f"a claim writes {what}", "refused")
                async with self._client(OBSERVER) as observer:
                    await observer.link.publish(self._topics.down(CHECKED[0], "req"), b"secret")
                heard = await claim.next(lambda event: isinstance(event, Received), QUIET_S)
                self._note(
                    "a claim listens to everything", "hears nothing", "it hears: acl-claims" if heard else ""
                )
        except LiberataiError as error:
            self._note("a claim asks for a certificate", "", f"{self._claim_url}: {error}")


def _drained(client: Client) -> list[LinkEvent]:
    return [client.events.get_nowait() for _ in range(client.events.qsize())]
