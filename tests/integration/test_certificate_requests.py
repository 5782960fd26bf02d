"""Misdeeds with certificates: each is refused with its code and counted, and nobody else notices.

The broker of these tests keeps no rights at all: what is refused here, the coordinator refuses.
"""

import asyncio
import contextlib
import secrets
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from liberatai_coordinator import clock, wiring
from liberatai_coordinator.api.operations import Operations
from liberatai_coordinator.authority.authority import Authority
from liberatai_coordinator.client.wire import InvitationRequest
from liberatai_coordinator.config import CoordinatorConfig, Joining
from liberatai_coordinator.intake.enrolment import MAX_PER_DAY
from liberatai_coordinator.service import Service
from liberatai_core import certificates
from liberatai_core.contract.frame import Signer, expect, seal
from liberatai_core.contract.messages import CertificateReply, CertificateRequest, claimed
from liberatai_core.contract.topics import Topics, claim_name
from liberatai_core.errors import LinkError, TokenError
from liberatai_core.link.link import Received
from liberatai_core.link.memory import MemoryBroker, MemoryLink
from liberatai_core.token import Token, read_token, write_token

FLEET = "default"
pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


DAY_S = 86_400.0


def signer_of(name: str) -> Signer:
    return Signer.from_seed(name.encode().ljust(32, b"-"), FLEET)


class Asker:
    """Whoever asks for a certificate, honest or not."""

    def __init__(self, broker: MemoryBroker, service: Service, name: str) -> None:
        self.name, self.service, self.signer = name, service, signer_of(name)
        self.link = MemoryLink(broker, f"asker-{name}-{secrets.token_hex(4)}")
        self.topics = Topics(fleet=FLEET)
        self.key = certificates.new_key()

    def request(self, token: Token | None = None, **changes: Any) -> CertificateRequest:
        wanted = changes.pop("request", None) or certificates.request(self.key, self.name)
        fields: dict[str, Any] = {
            "device": self.name,
            "public_key": self.signer.public_key,
            "nonce": secrets.token_bytes(16),
            "request": wanted,
        }
        if token is not None:
            claim = certificates.key_of_number(token.key)
            said = claimed(FLEET, self.name, self.signer.public_key, wanted)
            fields |= {
                "claim": certificates.facts(token.certificate).name,
                "proof": certificates.prove(claim, said),
            }
        return msgspec.convert(fields | changes, CertificateRequest, builtin_types=(bytes,))

    async def say(self, owner: str, frame: bytes) -> None:
        while True:
            with contextlib.suppress(LinkError):  # not connected yet
                await self.link.publish(self.topics.provisioning(owner, "csr"), frame)
                return
            await asyncio.sleep(0.01)

    async def ask(
        self, request: CertificateRequest, owner: str = "", signer: Signer | None = None
    ) -> CertificateReply:
        owner = owner or request.claim or self.name
        topic = self.topics.provisioning(owner, "crt")
        await self.link.subscribe(topic)
        await self.link.open()
        key = self.service.signer.public_key
        events = self.link.events()
        async with asyncio.timeout(60):
            await self.say(owner, seal(request, signer or self.signer))
            async for event in events:
                if isinstance(event, Received) and event.topic == topic:
                    self.link.ack(event.token)
                    reply = expect(event.payload, CertificateReply, FLEET, lambda _: key)
                    if reply.nonce == request.nonce:
                        return reply
        raise AssertionError("unreachable")


@contextlib.asynccontextmanager
async def world(folder: Path, **joining: Any) -> AsyncIterator[tuple[MemoryBroker, Service]]:
    if not (folder / "ca").exists():
        Authority.create(folder / "ca", FLEET)
    config = CoordinatorConfig(
        fleet=FLEET,
        state_dir=str(folder / "state"),
        ca_dir=str(folder / "ca"),
        joining=Joining(broker="mqtts://broker.example.org:8883", **joining),
    )
    broker = MemoryBroker()
    with wiring.build(config, lambda config, will: MemoryLink(broker, config.coordinator, will)) as service:
        await service.restore()
        running = asyncio.create_task(service.run())
        async with asyncio.timeout(60):
            while not service.connected:
                await asyncio.sleep(0.01)
        try:
            yield broker, service
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)


async def invited(service: Service, **wanted: Any) -> Token:
    (made,) = await Operations.of(service).invitations.create(InvitationRequest(**wanted))
    return read_token(made.token)


def csr(name: str, key: Any, *, asks: bool = False, also: str = "") -> bytes:
    attributes = [*certificates.common_name(name), *([*certificates.common_name(also)] if also else [])]
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name(attributes))
    if asks:
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


WEAK = ec.generate_private_key(ec.SECP192R1())
RSA = rsa.generate_private_key(65537, 2048)


@pytest.mark.parametrize(
    ("what", "code"),
    [
        ("a request for another name", "E_CERT"),
        ("a request for two names", "E_CERT"),
        ("a weak curve", "E_CERT"),
        ("an RSA key", "E_CERT"),
        ("a request to be an authority", "E_CERT"),
        ("a damaged request", "E_CERT"),
        ("noise", "E_CERT"),
        ("a name of claims", "E_CERT"),
        ("the coordinator's name", "E_STATE"),
        ("a proof of another key", "E_TOKEN"),
        ("a proof of another request", "E_TOKEN"),
        ("no proof", "E_TOKEN"),
        ("an unknown invitation", "E_TOKEN"),
        ("a foreign token", "E_TOKEN"),
        ("a used token", "E_TOKEN"),
        ("a token for another device", "E_TOKEN"),
        ("an expired token", "E_EXPIRED"),
        ("another key than it is signed with", "E_SIG"),
        ("a quarantined device with a new token", "E_REVOKED"),
        ("a device that nobody invited", "E_UNKNOWN_DEVICE"),
        ("somebody else's topic", "E_TOPIC"),
        ("a claim's topic without its claim", "E_TOPIC"),
    ],
)
async def test_each_misdeed_is_refused_with_its_code(tmp_path: Path, what: str, code: str) -> None:
    async with world(tmp_path) as (broker, service):
        thief, name, owner, signer = Asker(broker, service, "thief"), "thief", "", None
        token = await invited(service)
        request = thief.request(token)
        key = thief.key
        match what:
            case "a request for another name":
                request = thief.request(token, request=csr("victim", key))
            case "a request for two names":
                request = thief.request(token, request=csr("thief", key, also="victim"))
            case "a weak curve":
                request = thief.request(token, request=csr("thief", WEAK))
            case "an RSA key":
                request = thief.request(token, request=csr("thief", RSA))
            case "a request to be an authority":
                request = thief.request(token, request=csr("thief", key, asks=True))
            case "a damaged request":
                good = csr("thief", key)
                request = thief.request(token, request=good[:-1] + bytes([good[-1] ^ 1]))
            case "noise":
                request = thief.request(token, request=bytes(range(256)))
            case "a name of claims":
                name = "claim-thief"
                thief = Asker(broker, service, name)
                request = thief.request(token)
            case "the coordinator's name":
                name = "co1"
                thief = Asker(broker, service, name)
                request = thief.request(token)
            case "a proof of another key":
                request = thief.request(token, proof=certificates.prove(key, b"x"))
            case "a proof of another request":
                other = thief.request(token, request=csr("thief", certificates.new_key()))
                request = msgspec.structs.replace(request, proof=other.proof)
            case "no proof":
                request = thief.request(token, proof=b"")
            case "an unknown invitation":
                request = thief.request(token, claim="claim-aaaa")
            case "a foreign token":
                (tmp_path / "other").mkdir()
                async with world(tmp_path / "other") as (_, elsewhere):
                    request = thief.request(await invited(elsewhere))
            case "a used token":
                honest = Asker(broker, service, "honest")
                assert (await honest.ask(honest.request(token))).state == "issued"
            case "a token for another device":
                request = thief.request(await invited(service, device="victim"))
            case "an expired token":
                with clock.replaced(clock.monotonic, lambda: 1e9):
                    token = await invited(service, ttl_s=60)
                request = thief.request(token)
            case "another key than it is signed with":
                signer = signer_of("another")
                service.fleet.enrol("another", signer.public_key, "approved", 0, 0)
            case "a quarantined device with a new token":
                service.fleet.enrol("thief", thief.signer.public_key, "approved", 0, 0)
                await Operations.of(service).devices.quarantine("thief", "odd")
            case "a device that nobody invited":
                request = thief.request()
            case "somebody else's topic":
                service.fleet.enrol("thief", thief.signer.public_key, "approved", 0, 0)
                request, owner = thief.request(), "victim"
            case "a claim's topic without its claim":
                service.fleet.enrol("thief", thief.signer.public_key, "approved", 0, 0)
                request, owner = thief.request(), claim_name("victim")
        reply = await thief.ask(request, owner, signer)
        assert (reply.state, reply.code, reply.certificate) == ("refused", code, b"")
        assert reply.text
        assert counted(service) == {code: 1}
        assert not [one for one in service.authority.issued() if one.name == name and one.role == "device"]  # type: ignore[union-attr]
        friend = Asker(broker, service, "friend")
        assert (await friend.ask(friend.request(await invited(service)))).state == "issued"


def counted(service: Service) -> Counter[str]:
    """Return all refusals: a stranger's are nobody's."""
    return sum(map(Counter, service.fleet.refusals.values()), Counter())


async def test_a_device_that_was_set_up_anew_knocks_and_waits_until_its_new_key_is_taken(
    tmp_path: Path,
) -> None:
    async with world(tmp_path) as (broker, service):
        old, ask = Asker(broker, service, "dev-a"), Operations.of(service)
        assert (await old.ask(old.request(await invited(service)))).state == "issued"
        new, token = Asker(broker, service, "dev-a"), await invited(service)
        new.signer = signer_of("a new card")
        reply = await new.ask(new.request(token))
        view = await ask.devices.show("dev-a")
        assert (reply.state, reply.certificate) == ("pending", b"")
        assert f"co1 has to take this one (rekey), key {view.knocks}" in reply.text
        assert view.knocks != view.key
        await ask.devices.rekey("dev-a", view.knocks)
        assert (await new.ask(new.request(token))).state == "issued"
        assert (await old.ask(old.request())).state == "refused"


async def test_an_oversize_request_is_refused_before_it_is_looked_at(tmp_path: Path) -> None:
    async with world(tmp_path) as (broker, service):
        thief = Asker(broker, service, "thief")
        await thief.link.open()
        frame = seal(thief.request(request=bytes(2048)), thief.signer) + bytes(4096)
        await thief.say("thief", frame)
        async with asyncio.timeout(60):
            while "E_SIZE" not in service.fleet.refusals.get("", ()):
                await asyncio.sleep(0.01)


async def test_the_same_device_may_use_its_token_again_until_it_has_an_answer(tmp_path: Path) -> None:
    async with world(tmp_path) as (broker, service):
        token, device = await invited(service), Asker(broker, service, "dev-a")
        for _ in range(3):
            assert (await device.ask(device.request(token))).state == "issued"
        assert service.fleet.devices["dev-a"].status == "approved"


async def test_no_device_fills_the_list_of_certificates(tmp_path: Path) -> None:
    async with world(tmp_path) as (broker, service):
        token, device = await invited(service), Asker(broker, service, "dev-a")
        for _ in range(MAX_PER_DAY):
            assert (await device.ask(device.request(token))).state == "issued"
        assert (await device.ask(device.request(token))).code == "E_QUOTA"


async def test_a_flood_of_requests_is_cut_off_and_others_are_answered(tmp_path: Path) -> None:
    async with world(tmp_path) as (broker, service):
        thief, friend = Asker(broker, service, "thief"), Asker(broker, service, "friend")
        token = await invited(service)
        await thief.link.open()
        frames = [seal(thief.request(token), thief.signer) for _ in range(200)]
        claim = certificates.facts(token.certificate).name
        await asyncio.gather(*(thief.say(claim, frame) for frame in frames))
        assert (await friend.ask(friend.request(await invited(service)))).state == "issued"
        async with asyncio.timeout(60):
            while sum(counted(service).values()) < len(frames) - MAX_PER_DAY:
                await asyncio.sleep(0.01)
        assert set(counted(service)) <= {"E_BUSY", "E_QUOTA"}


async def test_a_revoked_certificate_is_not_renewed(tmp_path: Path) -> None:
    async with world(tmp_path) as (broker, service):
        device = Asker(broker, service, "dev-a")
        assert (await device.ask(device.request(await invited(service)))).state == "issued"
        assert (await device.ask(device.request())).state == "issued"
        assert service.authority is not None
        service.authority.revoke("dev-a")
        assert (await device.ask(device.request())).code == "E_REVOKED"
        assert (await device.ask(device.request(), claim_name("dev-a"))).code == "E_REVOKED"


async def test_a_certificate_that_ends_unrenewed_is_a_condition_of_the_device(tmp_path: Path) -> None:
    async with world(tmp_path) as (broker, service):
        device = Asker(broker, service, "dev-a")
        assert (await device.ask(device.request(await invited(service)))).state == "issued"
        ask = Operations.of(service)
        for days, words in ((60, ""), (80, "ends in 10.0 days"), (95, "ended 5.0 days ago")):
            now_s = clock.wall() + days * DAY_S
            with clock.replaced(clock.monotonic, lambda now_s=now_s: now_s):  # type: ignore[misc]
                found = {one.name: one.reason for one in (await ask.devices.show("dev-a")).conditions}
            assert words in found.get("CertificateEnding", "")
            assert bool(words) == ("CertificateEnding" in found)


async def test_what_is_issued_is_for_the_key_that_asked_and_for_nobody_else(tmp_path: Path) -> None:
    async with world(tmp_path) as (broker, service):
        device = Asker(broker, service, "dev-a")
        reply = await device.ask(device.request(await invited(service)))
        pem = certificates.key_pem(device.key)
        certificates.require_pair(reply.certificate, pem, reply.authority, "dev-a")
        claim = certificates.facts(reply.claim)
        assert (claim.name, claim.role) == (claim_name("dev-a"), "claim")
        assert claim.end_s - certificates.facts(reply.certificate).end_s == pytest.approx(30 * DAY_S, abs=5)


async def test_a_token_that_was_not_copied_whole_says_so() -> None:
    token = Token(
        fleet=FLEET,
        coordinator="co1",
        coordinator_key=bytes(32),
        broker="mqtts://b:8883",
        claim_broker="mqtts://b:8884",
        authority=b"a" * 400,
        certificate=b"c" * 400,
        key=bytes(32),
        expires_s=1e9,
    )
    word = write_token(token)
    assert read_token(f"  {word[:20]}\n{word[20:]} ") == token
    for wrong in (word[:-9], word[:40] + "A" + word[41:], word[5:], "lai1-", "lai1-" + "A" * 20_000, ""):
        with pytest.raises(TokenError):
            read_token(wrong)
