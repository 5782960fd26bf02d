"""Fleet commands of `liberatai`: what they say, and how they end."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.unit.coordinator.api_kit import MemoryOperations, served

from liberatai_coordinator.cli.app import main
from liberatai_coordinator.cli.rollout import plan_of
from liberatai_coordinator.client.wire import RolloutPlan
from liberatai_core.errors import ConfigError


@pytest.fixture
def fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MemoryOperations]:
    operations = MemoryOperations()
    monkeypatch.setenv("LIBERATAI_SOCKET", str(tmp_path / "api.sock"))
    with served(operations, tmp_path / "api.sock"):
        yield operations


@pytest.mark.usefixtures("fleet")
def test_devices_are_meant_by_name_selector_or_group(capsys: pytest.CaptureFixture[str]) -> None:
    def said(*words: str, code: int = 0) -> str:
        assert main(words) == code, capsys.readouterr()
        return capsys.readouterr().out

    assert said("devices", "label", "gateway", "camera", "floor=2", "site-").splitlines() == [
        "device gateway: labelled",
        "device camera: labelled",
    ]
    said("groups", "create", "second", "--query", "label.floor == '2'")
    assert said("devices", "drain", "-g", "second") == "device camera: drained\ndevice gateway: drained\n"
    assert said("devices", "resume", "-l", "floor=2,status=approved") == "device gateway: works again\n"
    assert said("devices", "list", "--where", "label.floor == '2'", "-o", "name") == "camera\ngateway\n"
    assert said("devices", "ping", "gateway").startswith("device gateway: answers after 250 ms")
    assert said("devices", "logs", "gateway") == "one\n\N{REPLACEMENT CHARACTER}[31mtwo\n"
    assert "second" in said("groups", "list")
    assert said("devices", "rekey", "camera", "--key", "4455") == "device camera: has its new key\n"
    assert said("devices", "decommission", "camera", "nobody", code=3) == "device camera: decommissioned\n"
    assert said("devices", "drain", code=2) == ""
    assert said("devices", "drain", "-l", "floor=9", code=4) == ""
    assert "training_failed" in said("events", "tail")
    assert said("events") == said("events", "tail")
    assert "devices decommission" in said("audit")
    audited = said("audit", "tail", "-o", "wide")
    assert "devices decommission" in audited
    assert "E_NOT_FOUND" in audited


@pytest.mark.usefixtures("fleet")
def test_wishes_and_rollouts(capsys: pytest.CaptureFixture[str]) -> None:
    def said(*words: str, code: int = 0) -> str:
        assert main(words) == code, capsys.readouterr()
        return capsys.readouterr().out

    assert said("shadow", "set", "gateway", "telemetry_s=300", "pause=true") == "device gateway: wished\n"
    assert "telemetry_s" in said("shadow", "diff", "gateway", code=1)
    assert said("shadow", "set", "gateway", "state_dir=1", code=2) == ""
    assert "telemetry_s: 5 min" in said("shadow", "get", "gateway")
    create = ("rollout", "create", "r", "--model", "digits", "--stages", "50%,100%", "--soak", "1s")
    assert "running" in said(*create)
    assert "r: paused" in said("rollout", "pause", "r")
    assert "r: running" in said("rollout", "resume", "r")
    assert "digits:2" in said("rollout", "list")
    assert "9 of 10" in said("rollout", "show", "r")
    watched = said("rollout", "watch", "r")
    assert watched.splitlines()[-1].startswith("r: finished")
    assert said("rollout", "create", "s", "--model", "digits", "--soak", "soon", code=2) == ""


def test_a_plan_is_what_an_operator_writes() -> None:
    plan = plan_of("1%,0.1,100%", "10m", "failed=5%,min=10,accuracy=off,least=80%", "1,2", "2h")
    assert plan == RolloutPlan(
        stages=(0.01, 0.1, 1.0),
        soak_s=600.0,
        failed_share=0.05,
        failed_min=10,
        accuracy_drop=None,
        accuracy_least=0.8,
        pause_after=(1, 2),
        deadline_s=7200.0,
    )
    for faulty in (("x", "1s", "", "", "1h"), ("1%", "1", "", "", "1h"), ("1%", "1s", "lost=1", "", "1h")):
        with pytest.raises(ConfigError):
            plan_of(*faulty)


def test_a_rollout_without_a_name_is_named_after_what_it_brings():
    from liberatai_coordinator.cli.rollout import free_name

    assert free_name("digits:12", set()) == "digits-12"
    assert free_name("digits:12", {"digits-12"}) == "digits-12-2"
    assert free_name("digits:12", {"digits-12", "digits-12-2"}) == "digits-12-3"
    assert free_name("::", set()) == "rollout"
