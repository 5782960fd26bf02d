"""What a simulated device's container is given, and what it is seen to have."""

from pathlib import Path

import pytest

from liberatai_coordinator.local.process import Process
from liberatai_coordinator.sim.container.agents import contained, limits_of
from liberatai_coordinator.sim.container.engine import HOST, Engine, Limits, Seen, find_engine, parse_limits
from liberatai_core.errors import LinkError, NotFoundError
from liberatai_core.profile import load_profile

V1 = """/sys/fs/cgroup/memory/memory.limit_in_bytes:99999744
/sys/fs/cgroup/cpu/cpu.cfs_quota_us:50000
/sys/fs/cgroup/cpu/cpu.cfs_period_us:100000
/sys/fs/cgroup/pids/pids.max:64
"""
V2 = "/sys/fs/cgroup/memory.max:99999744\n/sys/fs/cgroup/cpu.max:50000 100000\n/sys/fs/cgroup/pids.max:64\n"
LIMITS = Limits(memory_bytes=99_999_744, cpus=0.5, pids=64)


@pytest.mark.parametrize("text", [V1, V2])
def test_limits_are_read_from_both_versions_of_control_groups(text: str) -> None:
    assert parse_limits(text) == Seen(memory_bytes=99_999_744, cpus=0.5, pids=64)


@pytest.mark.parametrize("text", [V1, V2])
def test_what_is_unlimited_counts_as_none(text: str) -> None:
    free = text.replace("99999744", "9223372036854771712").replace("50000", "-1", 1).replace(":64", ":max")
    assert parse_limits(free) == Seen(memory_bytes=0, cpus=0.0, pids=0)


@pytest.mark.parametrize(
    "text", ["", V1.replace("64", ""), V2.replace("50000 100000", "x"), "/sys/pids.max:4"]
)
def test_what_lacks_a_limit_is_no_limit(text: str) -> None:
    with pytest.raises(LinkError, match="lacks one"):
        parse_limits(text)


@pytest.mark.parametrize("program", ["/usr/bin/podman", "/usr/bin/docker"])
def test_a_container_can_do_nothing_but_train(program: str) -> None:
    words = Engine(program, "liberatai-agent").run_command(
        "sim-1-pi4-0001", LIMITS, {Path("/sim/a"): "rw", Path("/sim/a.npz"): "ro"}, ["run"], 10_001
    )
    text = " ".join(words)
    for part in (
        "--read-only ",
        "--cap-drop all",
        "--security-opt no-new-privileges",
        "--memory 99999744 --memory-swap 99999744 --cpus 0.5 --pids-limit 64",
        "--user 10001:0",
        "--volume /sim/a:/sim/a:rw --volume /sim/a.npz:/sim/a.npz:ro",
        "--env ORT_DISABLE_TELEMETRY=1",
    ):
        assert part in text
    assert ("--read-only-tmpfs=false" in text) is program.endswith("podman")
    assert text.endswith("liberatai-agent run")


def test_an_image_knows_its_program_and_this_machines_files_do_not(tmp_path: Path) -> None:
    agent = Process(
        "pi4-0001", ["/py", "-P", "-m", "liberatai_agent", "run", "--config", "a"], tmp_path / "log"
    )
    profiles = {"pi4-0001": load_profile("pi4", "test")}
    ends = {
        image: contained(Engine("/usr/bin/podman", image), "sim-7", profiles, lambda _: [])(agent).command
        for image in ("some/image:1", HOST)
    }
    assert ends["some/image:1"][-4:] == ["some/image:1", "run", "--config", "a"]
    assert ends[HOST][-9:] == ["--rootfs", "/:O", *agent.command]
    assert all("sim-7-pi4-0001" in words for words in ends.values())
    assert "--tmpfs" in ends["some/image:1"]
    assert "--tmpfs" not in ends[HOST]  # it would hide a program that lies below /tmp
    assert f"TMPDIR={tmp_path}" in ends[HOST]


def test_a_device_gets_what_its_profile_lets_training_use() -> None:
    profile = load_profile("pi-zero-2w", "test")
    limits = limits_of(profile)
    assert limits.memory_bytes == profile.memory_bytes
    assert limits.cpus == 1.0


def test_without_an_engine_another_backend_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(NotFoundError, match="podman or docker is not installed: take backend: process"):
        find_engine("liberatai-agent")
