"""`doctor` beside a running agent: it goes by what that one says, and does not throw it out at the broker."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from liberatai_agent.config import AgentConfig
from liberatai_agent.doctor import connected_agent, examine
from liberatai_agent.store.status import FILE
from liberatai_core.doctor.finding import failed

pytestmark = pytest.mark.anyio
NOBODY_LISTENS = "mqtt://127.0.0.1:9"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def config(tmp_path: Path) -> AgentConfig:
    return AgentConfig(
        fleet="home", device="dev", coordinator_key="ab" * 32, broker=NOBODY_LISTENS, state_dir=str(tmp_path)
    )


def running(config: AgentConfig, **changes: Any) -> None:
    """Leave what a running agent writes that is connected."""
    status = {
        "device": config.device,
        "fleet": config.fleet,
        "broker": config.broker,
        "pid": os.getpid(),
        "running": True,
        "connected": True,
        "protocol": "MQTT 5",
        "coordinator": "online",
        "broker_refuses": [],
        "started_at": time.time(),
        **changes,
    }
    (config.state_path / FILE).write_text(json.dumps(status))


async def test_nobody_logs_in_beside_an_agent_that_is_connected(config: AgentConfig) -> None:
    assert "nobody listens" in " ".join(one.text for one in await examine(config))
    running(config)
    found = await examine(config)
    assert not failed(found)
    assert "the running agent is connected (MQTT 5)" in next(
        one.text for one in found if one.check == "broker"
    )


async def test_what_the_broker_refused_the_running_agent_is_a_fault(config: AgentConfig) -> None:
    running(config, broker_refuses=["publish lai/v1/home/up/dev/state"])
    assert [one.check for one in await examine(config) if one.state == "fail"] == ["rights"]


@pytest.mark.parametrize(
    "changes",
    [
        {"connected": False},
        {"running": False},
        {"coordinator": "unknown"},
        {"device": "other"},
        {"broker": "mqtt://127.0.0.1:10"},
        {"pid": 2**22 + 1},
        {"pid": "1"},
        {"started_at": 1.0},
    ],
    ids=str,
)
async def test_otherwise_it_goes_and_looks(config: AgentConfig, changes: dict[str, Any]) -> None:
    running(config, **changes)
    assert connected_agent(config, changed_s=2.0) is None
