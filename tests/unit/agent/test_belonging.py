"""The running agent says that it is in the wrong fleet, or obeys another key, as `doctor` says it."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from liberatai_agent.config import AgentConfig
from liberatai_agent.membership import silence
from liberatai_agent.membership.belonging import Belonging, foreign_key, unknown_fleet
from liberatai_agent.service import Service
from liberatai_core.contract.frame import Signer, key_id, seal
from liberatai_core.contract.messages import CoordinatorState
from liberatai_core.contract.topics import Topics
from liberatai_core.link.memory import MemoryBroker, MemoryLink

OURS, OTHER = (Signer.from_seed(bytes([number] * 32), "home") for number in (1, 2))
TOPIC = Topics(fleet="home").coordinator("co1")


def presence(signer: Signer) -> bytes:
    return seal(CoordinatorState(coordinator="co1", epoch=1, state="online"), signer)


def test_words_name_both_keys_and_the_fleet_that_was_meant() -> None:
    words = foreign_key("co1", presence(OTHER), OURS.public_key)
    assert key_id(OTHER.public_key).hex() in words
    assert key_id(OURS.public_key).hex() in words
    assert foreign_key("co1", presence(OURS), OURS.public_key) == ""
    assert foreign_key("co1", b"", OURS.public_key) == ""
    assert unknown_fleet("hoem", {"home", "lab"}).endswith("there is 'home', 'lab'; did you mean home?")


def test_a_coordinator_with_our_key_ends_every_doubt() -> None:
    belonging = Belonging("home", OURS.public_key)
    belonging.silence()
    assert belonging.fault is not None
    assert belonging.fault[0] == "E_CONFIG"
    belonging.refused(TOPIC, presence(OTHER))
    assert belonging.fault[0] == "E_SIG"
    belonging.believed()
    assert belonging.fault is None
    belonging.refused(TOPIC, presence(OTHER))
    belonging.silence()
    assert belonging.fault is None, "a stranger beside our own coordinator is no fault of ours"


@pytest.mark.parametrize(("spoken", "code"), [(True, "E_SIG"), (False, "E_CONFIG")])
def test_the_running_agent_says_it_in_its_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoken: bool, code: str
) -> None:
    monkeypatch.setattr(silence, "SILENCE_S", 0.1)
    config = AgentConfig(
        fleet="home", device="dev-a", coordinator_key=OURS.public_key.hex(), state_dir=str(tmp_path)
    )
    broker = MemoryBroker()

    async def play() -> dict[str, Any]:
        if spoken:
            other = MemoryLink(broker, "other")
            await other.open()
            await anext(other.events())
            await other.publish(TOPIC, presence(OTHER), retain=True)
        agent = Service(config, lambda will: MemoryLink(broker, "dev-a", will))
        running = asyncio.create_task(agent.run())
        async with asyncio.timeout(60):
            while not hasattr(agent, "_status") or not agent.status()["last_error"].startswith(code):
                await asyncio.sleep(0.02)
        found = agent.status()
        agent.stop()
        await running
        return found

    found = asyncio.run(play())
    words = "signs with key" if spoken else "no coordinator has ever spoken for fleet 'home'"
    assert words in found["last_error"]
    assert found["last_error_at"]
