"""What a device may try, each by name: who refuses it, and with which code. SECURITY.md has the same table."""

import pickle
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import msgspec
from tests.integration.kit import FLEET, ScriptedDevice

from liberatai_coordinator.api.operations import Operations
from liberatai_coordinator.service import Service
from liberatai_core.contract import limits
from liberatai_core.contract.frame import HEADER_BYTES, MAGIC, Signer, _signed, key_id, seal
from liberatai_core.contract.messages import (
    KIND_OF,
    Cancel,
    Capability,
    CoordinatorState,
    EpochSeen,
    Event,
    Have,
    Message,
    Report,
    State,
    Update,
)
from liberatai_core.contract.topics import ROOT

BASE = f"{ROOT}/{FLEET}"


@dataclass
class Scene:
    """A fleet with an honest device, and one that misbehaves although it was let in."""

    service: Service
    evil: ScriptedDevice
    honest: ScriptedDevice
    update: Update

    @property
    def ask(self) -> Operations:
        return Operations.of(self.service)

    async def send(self, topic: str, payload: bytes) -> None:
        await self.evil.link.publish(f"{BASE}/{topic}", payload)

    async def say(self, leaf: str, message: Message, signer: Signer | None = None) -> None:
        await self.send(f"up/evil/{leaf}", seal(message, signer or self.evil.signer))

    async def raw(self, kind: type[Message], body: bytes, leaf: str = "ev") -> None:
        """Sign bytes that no encoder of ours makes."""
        number, signer = KIND_OF[kind], self.evil.signer
        signature = signer.private.sign(_signed(FLEET, number, body))
        header = MAGIC + bytes((number,)) + key_id(signer.public_key) + signature
        await self.send(f"up/evil/{leaf}", header + body)

    async def updates(self, **changes: Any) -> None:
        """Send an update that the open round asked for, with some fields changed."""
        changed = msgspec.structs.replace(self.update, **changes)
        await self.send(f"up/evil/x/{'a' * 26}/m", seal(changed, self.evil.signer))


Act = Callable[[Scene], Awaitable[None]]
MISDEEDS: dict[str, tuple[str, Act]] = {}
"""By name: code, and what the device does."""


def misdeed(name: str, code: str) -> Callable[[Act], Act]:
    def note(act: Act) -> Act:
        assert name not in MISDEEDS
        MISDEEDS[name] = code, act
        return act

    return note


LAST = (
    "words of an earlier start, repeated",
    "a number of starts that leaves no room to grow",
    "a flood of words",
    "words after it was quarantined",
    "words after it was decommissioned",
)
"""After these the device has little more to say: each has a fleet of its own."""


def event(device: str = "evil", **changes: Any) -> Event:
    return msgspec.structs.replace(Event(device=device, session=1, number=1, name="x"), **changes)


STRANGER = Signer.from_seed(b"stranger".ljust(32, b"-"), FLEET)


# --- whose words -----------------------------------------------------------------------------------


@misdeed("own words on another device's topic", "E_TOPIC")
async def _(s: Scene) -> None:
    await s.send("up/honest/ev", seal(event(), s.evil.signer))


@misdeed("another device's name in own words", "E_TOPIC")
async def _(s: Scene) -> None:
    await s.say("ev", event("honest"))


@misdeed("another device's name and topic, own key", "E_SIG")
async def _(s: Scene) -> None:
    await s.send("up/honest/ev", seal(event("honest"), s.evil.signer))


@misdeed("a key that nobody knows", "E_UNKNOWN_DEVICE")
async def _(s: Scene) -> None:
    await s.say("ev", event(), STRANGER)


@misdeed("no signature", "E_SIG")
async def _(s: Scene) -> None:
    frame = seal(event(), s.evil.signer)
    await s.send("up/evil/ev", frame[: HEADER_BYTES - 64] + bytes(64) + frame[HEADER_BYTES:])


@misdeed("one bit flipped", "E_SIG")
async def _(s: Scene) -> None:
    frame = bytearray(seal(event(), s.evil.signer))
    frame[-1] ^= 1
    await s.send("up/evil/ev", bytes(frame))


@misdeed("a signature for another fleet", "E_SIG")
async def _(s: Scene) -> None:
    await s.say("ev", event(), Signer.from_seed(b"evil".ljust(32, b"-"), "other"))


@misdeed("a signature for another kind of message", "E_SIG")
async def _(s: Scene) -> None:
    frame = bytearray(seal(State(device="evil", state="online", session=1), s.evil.signer))
    frame[3] = KIND_OF[Event]
    await s.send("up/evil/ev", bytes(frame))


@misdeed("a new key under a known name", "E_SIG")
async def _(s: Scene) -> None:
    caps = Capability(
        device="honest", public_key=STRANGER.public_key, session=9, agent_version="x", tier="full"
    )
    await s.send("up/honest/caps", seal(caps, STRANGER))


@misdeed("a key of small order, which verifies what nobody signed", "E_SIG")
async def _(s: Scene) -> None:
    weak = bytes(32)
    caps = Capability(device="weak", public_key=weak, session=1, agent_version="x", tier="full")
    body = seal(caps, STRANGER)[HEADER_BYTES:]
    header = MAGIC + bytes((KIND_OF[Capability],)) + key_id(weak) + bytes(64)
    await s.send("up/weak/caps", header + body)


@misdeed("words after it was quarantined", "E_REVOKED")
async def _(s: Scene) -> None:
    await s.ask.devices.quarantine("evil", "test")
    await s.updates()


@misdeed("words after it was decommissioned", "E_REVOKED")
async def _(s: Scene) -> None:
    await s.ask.devices.decommission("evil", "test")
    await s.say("ev", event())


@misdeed("a coordinator's word", "E_FRAME")
async def _(s: Scene) -> None:
    await s.say("ev", Cancel(device="evil", epoch=1, coordinator="co1", job="tiny", round=1))


@misdeed("a coordinator's presence, forged, as proof of a higher epoch", "E_UNKNOWN_DEVICE")
async def _(s: Scene) -> None:
    word = seal(CoordinatorState(coordinator="co1", state="online", epoch=2**40), s.evil.signer)
    await s.say("ev", EpochSeen(device="evil", session=1, word=word))


# --- bytes -----------------------------------------------------------------------------------------


@misdeed("bytes that are no frame", "E_FRAME")
async def _(s: Scene) -> None:
    await s.send("up/evil/ev", b"\x00" * 200)


@misdeed("a frame that was cut", "E_FRAME")
async def _(s: Scene) -> None:
    await s.send("up/evil/ev", seal(event(), s.evil.signer)[:40])


@misdeed("a pickle", "E_FRAME")
async def _(s: Scene) -> None:
    await s.send("up/evil/ev", pickle.dumps({"x": "y" * 100}))


@misdeed("a version of the frame that nobody speaks", "E_VERSION")
async def _(s: Scene) -> None:
    await s.send("up/evil/ev", b"LA9" + seal(event(), s.evil.signer)[3:])


@misdeed("a kind that does not exist", "E_FRAME")
async def _(s: Scene) -> None:
    frame = bytearray(seal(event(), s.evil.signer))
    frame[3] = 255
    await s.send("up/evil/ev", bytes(frame))


@misdeed("a word on the topic of another kind", "E_FRAME")
async def _(s: Scene) -> None:
    await s.say("caps", State(device="evil", state="online", session=1))


@misdeed("a word that is too long for its kind", "E_SIZE")
async def _(s: Scene) -> None:
    await s.raw(State, b"\x80" * 5000, "state")


@misdeed("a length of four thousand millions", "E_SCHEMA")
async def _(s: Scene) -> None:
    await s.raw(Event, b"\xdd" + struct.pack(">I", 2**32 - 1) + b"\x80" * 1000)


@misdeed("brackets nested without end", "E_SCHEMA")
async def _(s: Scene) -> None:
    await s.raw(Event, b"\x91" * 60_000)


@misdeed("a field that nobody knows", "E_SCHEMA")
async def _(s: Scene) -> None:
    await s.raw(Event, msgspec.msgpack.encode(msgspec.to_builtins(event()) | {"exec": "rm"}))


@misdeed("two values for one field", "E_SCHEMA")
async def _(s: Scene) -> None:
    body = msgspec.msgpack.encode({"device": "evil", "session": 1, "number": 1, "name": "x"})
    await s.raw(Event, b"\x85" + body[1:] + b"\xa4name\xa1y")


@misdeed("a number that is none", "E_SCHEMA")
async def _(s: Scene) -> None:
    body = {"device": "evil", "session": 1, "cpu_percent": float("nan")}
    from liberatai_core.contract.messages import Telemetry

    await s.raw(Telemetry, msgspec.msgpack.encode(body), "tele")


@misdeed("a negative counter", "E_SCHEMA")
async def _(s: Scene) -> None:
    await s.raw(Event, msgspec.msgpack.encode({"device": "evil", "session": -1, "number": 1, "name": "x"}))


@misdeed("a topic that does not exist", "E_TOPIC")
async def _(s: Scene) -> None:
    await s.send("up/evil/shell", seal(event(), s.evil.signer))


@misdeed("a part of an upload with an impossible number", "E_TOPIC")
async def _(s: Scene) -> None:
    await s.send(f"up/evil/x/{'a' * 26}/9999", b"x")


@misdeed("an upload with a name that no content has", "E_TOPIC")
async def _(s: Scene) -> None:
    await s.send("up/evil/x/../m", seal(event(), s.evil.signer))


# --- time and numbers ------------------------------------------------------------------------------


@misdeed("words of an earlier start, repeated", "E_REPLAY")
async def _(s: Scene) -> None:
    await s.say("state", State(device="evil", state="online", session=5))
    await s.say("state", State(device="evil", state="online", session=2))


@misdeed("a number of starts that leaves no room to grow", "E_SCHEMA")
async def _(s: Scene) -> None:
    await s.say("state", State(device="evil", state="online", session=limits.MAX_SESSION + 1))


@misdeed("an answer to a wish that nobody had", "E_REPLAY")
async def _(s: Scene) -> None:
    await s.say("have", Have(device="evil", session=1, version=99))


@misdeed("a flood of words", "E_QUOTA")
async def _(s: Scene) -> None:
    frame = seal(Report(device="evil", session=1, phase="idle"), s.evil.signer)
    for _number in range(700):
        await s.send("up/evil/rep", frame)


# --- updates ---------------------------------------------------------------------------------------


@misdeed("an update for a job that does not exist", "E_ROUND_UNKNOWN")
async def _(s: Scene) -> None:
    await s.updates(job="other")


@misdeed("an update for a round that nobody asked it for", "E_ROUND_UNKNOWN")
async def _(s: Scene) -> None:
    await s.updates(round=7)


@misdeed("an update against other weights", "E_BASE_MODEL")
async def _(s: Scene) -> None:
    await s.updates(base=b"\x01" * 16)


@misdeed("an update of another structure", "E_SCHEMA")
async def _(s: Scene) -> None:
    await s.updates(structure="mlp-hidden4096")


@misdeed("an update under a name that is not its own", "E_SCHEMA")
async def _(s: Scene) -> None:
    await s.updates(update_id=b"\x02" * 16)


@misdeed("an update whose bytes mean nothing", "E_CODEC")
async def _(s: Scene) -> None:
    await s.updates(body=b"\xff" * 64)
