"""What holds of a device, since when and why; and two machines with one key are noticed."""

from typing import Any

import pytest

from liberatai_coordinator.fleet.devices import CLONE_S, Fleet, Mark
from liberatai_coordinator.fleet.facts import conditions_of, facts_of
from liberatai_core.contract.frame import Signer
from liberatai_core.contract.messages import Capability, Message, Report, State
from liberatai_core.errors import ReplayError, RevokedError, SignatureError

KEY = Signer.from_seed(b"a" * 32, "f").public_key
OTHER = Signer.from_seed(b"b" * 32, "f").public_key


def caps(session: int = 1, key: bytes = KEY, **more: Any) -> Capability:
    return Capability(
        device="a", public_key=key, session=session, agent_version="9", tier="full", cores=4, **more
    )


class World:
    def __init__(self) -> None:
        self.fleet = Fleet(enrolment="open")
        self.now_s = 1000.0

    def hear(self, message: Message, key: bytes = KEY) -> None:
        self.now_s += 1.0
        self.fleet.hear(message, key, self.now_s, wall_s=self.now_s)

    def conditions(self) -> dict[str, tuple[bool, float, str]]:
        device = self.fleet.devices["a"]
        found = conditions_of(
            device,
            ready="a" in self.fleet.ready_names,
            connected=self.fleet.connected,
            knock=self.fleet.knocks.get("a"),
            version="9",
        )
        return {one.name: (one.holds, one.since_s, one.reason) for one in found}


def test_conditions_say_what_holds_since_when_and_why() -> None:
    world = World()
    world.hear(caps())
    assert world.conditions()["Online"][0] is False
    world.hear(State(device="a", state="online", session=1))
    assert world.conditions() == {"Ready": (True, 1002.0, ""), "Online": (True, 1002.0, "")}
    world.hear(Report(device="a", session=1, phase="gated", reason="85 °C (max 80 °C)"))
    assert world.conditions()["Gated"] == (True, 1003.0, "85 °C (max 80 °C)")
    world.fleet.set_drained("a", Mark(since_s=1004.0, reason="new fans"))
    assert world.conditions()["Ready"] == (False, 1004.0, "it is drained")
    assert world.conditions()["Drained"] == (True, 1004.0, "new fans")
    world.fleet.set_status("a", "quarantined", "odd")
    assert world.conditions()["Quarantined"][2] == "odd"
    world.fleet.set_connected(False, 0.0)
    assert world.conditions()["Online"][2] == "the coordinator has no broker"


def test_two_machines_with_one_key_are_noticed_and_a_restored_copy_is_not() -> None:
    world = World()
    world.hear(caps(5))
    for session in (3, 3):
        with pytest.raises(ReplayError):
            world.hear(State(device="a", state="online", session=session))
        world.hear(State(device="a", state="online", session=6))
    assert "DuplicateIdentity" not in world.conditions()
    with pytest.raises(ReplayError):
        world.hear(State(device="a", state="online", session=4))
    assert "two machines" in world.conditions()["DuplicateIdentity"][2]
    world.now_s += 2 * CLONE_S
    with pytest.raises(ReplayError):
        world.hear(State(device="a", state="online", session=4))
    assert "DuplicateIdentity" not in world.conditions()


def test_another_key_knocks_is_taken_and_the_one_before_is_buried() -> None:
    world = World()
    world.hear(caps(5))
    with pytest.raises(SignatureError, match="rekey"):
        world.hear(caps(1, OTHER), OTHER)
    assert "Knocking" in world.conditions()
    world.fleet.rekey("a", OTHER, 1)
    world.hear(caps(2, OTHER), OTHER)
    with pytest.raises(RevokedError):
        world.hear(caps(6))
    assert "Knocking" not in world.conditions()


def test_what_is_not_known_is_none() -> None:
    world = World()
    world.hear(caps(memory_bytes=2 << 30))
    found = facts_of(world.fleet.devices["a"], ready=False, wall_s=1002.0)
    assert (found["ram_mb"], found["cores"], found["up_mbit"], found["phase"]) == (2048.0, 4.0, None, None)
    assert found["silent_s"] == 1.0
