"""The probe: control groups of both versions, and the smaller of measured and allowed."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from liberatai_agent.children import control_groups
from liberatai_agent.children.control_groups import Group
from liberatai_agent.config import AgentConfig, LinkSettings
from liberatai_agent.exchange.link_estimate import NOTHING, Announced
from liberatai_agent.machine import probe
from liberatai_core.contract.messages import Capability
from liberatai_core.profile import Profile, parse_profile

MIB = 1 << 20
PROFILE = parse_profile(
    """
id: board
description: a board
arch: aarch64
cores: 4
cpu_share: 0.5
memory_mb: 400
storage: {model_kb: 100}
net: {up_mbit: 2, down_mbit: 8, metered: true}
gflops: 1.5
""",
    "board",
)
MACHINE = probe.Machine(
    arch="x86_64",
    cores=2,
    cpus=2.0,
    memory_bytes=8192 * MIB,
    disk_free_bytes=1 << 40,
    runtimes=("torch", "onnxruntime"),
)


def a_tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def a_config(**changes: Any) -> AgentConfig:
    return AgentConfig(fleet="f", device="d", coordinator_key="0" * 64, **{"data": "x.npz"} | changes)


def caps(
    config: AgentConfig | None = None,
    profile: Profile | None = None,
    machine: probe.Machine = MACHINE,
    found: probe.Bench | None = None,
    link: Announced = NOTHING,
) -> Capability:
    bench = found or probe.Bench(gflops=10.0)
    return probe.capability(
        config or a_config(), profile, machine, bench, session=1, public_key=bytes(32), link=link
    )


def test_version_2_takes_the_tightest_limit_on_the_way_up(tmp_path: Path) -> None:
    a_tree(
        tmp_path,
        {
            "cpuset.cpus.effective": "0-7\n",
            "system.slice/memory.max": f"{512 * MIB}\n",
            "system.slice/cpu.max": "max 100000\n",
            "system.slice/agent.service/memory.max": "max\n",
            "system.slice/agent.service/cpu.max": "50000 100000\n",
            "system.slice/agent.service/cpuset.cpus.effective": "0,2-3\n",
        },
    )
    found = control_groups.limits(tmp_path, "0::/system.slice/agent.service\n")
    assert found == Group(memory_bytes=512 * MIB, cpus=0.5, processors=3)


def test_version_1_reads_each_controller_in_its_own_tree(tmp_path: Path) -> None:
    a_tree(
        tmp_path,
        {
            "memory/docker/abc/memory.limit_in_bytes": f"{96 * MIB}\n",
            "memory/memory.limit_in_bytes": "9223372036854771712\n",
            "cpu,cpuacct/docker/abc/cpu.cfs_quota_us": "150000\n",
            "cpu,cpuacct/docker/abc/cpu.cfs_period_us": "100000\n",
            "cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
            "cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            "cpuset/docker/abc/cpuset.cpus": "1\n",
        },
    )
    own = "4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n2:cpuset:/docker/abc\n1:name=systemd:/x\n"
    found = control_groups.limits(tmp_path, own)
    assert found == Group(memory_bytes=96 * MIB, cpus=1.5, processors=1)


def test_inside_a_container_the_root_of_the_mount_counts(tmp_path: Path) -> None:
    """Without a private cgroup namespace the path is the host's, and only the mount's root is there."""
    a_tree(tmp_path, {"memory/memory.limit_in_bytes": f"{64 * MIB}\n", "memory.max": f"{32 * MIB}"})
    assert control_groups.limits(tmp_path, "4:memory:/libpod/abc\n").memory_bytes == 64 * MIB
    assert control_groups.limits(tmp_path, "0::/libpod/abc\n").memory_bytes == 32 * MIB


@pytest.mark.parametrize("own", ["", "garbage", "0::/../../etc\n", "a:b\n0\n"])
def test_no_limits_and_nonsense_give_none(tmp_path: Path, own: str) -> None:
    a_tree(tmp_path, {"cpu.max": "what ever", "memory.max": "-5", "cpuset.cpus.effective": "x-y,\n"})
    assert control_groups.limits(tmp_path, own) == Group()


def test_the_machine_is_bounded_by_its_group(tmp_path: Path) -> None:
    group = Group(memory_bytes=100 * MIB, cpus=0.25, processors=1)
    found = probe.measure(tmp_path, group)
    assert (found.memory_bytes, found.cpus, found.cores) == (100 * MIB, 0.25, 1)
    free = probe.measure(tmp_path, Group())
    assert free.cores == len(os.sched_getaffinity(0))
    assert free.disk_free_bytes > 0


def test_the_smaller_of_measured_profile_and_settings_counts() -> None:
    plain = caps()
    assert (plain.cpu_share, plain.memory_bytes, plain.gflops) == (2.0, 8192 * MIB, 10.0)
    assert plain.storage_bytes == probe.DEFAULT_STORAGE_BYTES
    assert plain.up_bits_s is None
    board = caps(profile=PROFILE)
    assert (board.cpu_share, board.memory_bytes, board.storage_bytes) == (0.5, 400 * MIB, 102_400)
    assert (board.gflops, board.up_bits_s, board.down_bits_s, board.metered) == (1.5, 2e6, 8e6, True)
    own = caps(a_config(cpu_share=9, memory_mb=350, storage_kb=7), PROFILE)
    assert (own.cpu_share, own.memory_bytes, own.storage_bytes) == (2.0, 350 * MIB, 7168)


def test_a_link_is_the_profiles_until_it_is_measured_and_never_more_than_allowed() -> None:
    slow = Announced(up_bits_s=64e3, down_bits_s=1e9, at_s=0.0)
    found = caps(profile=PROFILE, link=slow)
    assert (found.up_bits_s, found.down_bits_s, found.link_measured) == (64e3, 8e6, True)
    fast = caps(profile=PROFILE, link=Announced(up_bits_s=1e9, at_s=0.0))
    assert (fast.up_bits_s, fast.link_measured) == (2e6, False)
    free = caps(link=slow)
    assert (free.up_bits_s, free.down_bits_s, free.metered) == (64e3, 1e9, False)
    own = caps(a_config(link=LinkSettings(up_mbit=5, down_mbit=0.1)), PROFILE)
    assert (own.up_bits_s, own.down_bits_s, own.link_measured) == (5e6, 1e5, False)


def test_the_settings_say_whether_a_link_is_metered_and_a_quota_means_that_it_is() -> None:
    assert caps(a_config(link=LinkSettings(metered=False)), PROFILE).metered is False
    assert caps(a_config(link=LinkSettings(metered=True))).metered is True
    quota = caps(a_config(link=LinkSettings(quota_mb_per_day=2)))
    assert (quota.metered, quota.day_quota_bytes) == (True, 2 * MIB)


def test_a_rate_that_could_not_be_measured_is_the_profiles() -> None:
    assert caps(profile=PROFILE, found=probe.Bench()).gflops == 1.5
    assert caps(found=probe.Bench()).gflops is None


@pytest.mark.parametrize(
    ("runtimes", "memory", "data", "tier"),
    [
        (("torch", "onnxruntime"), 400, "x.npz", "full"),
        (("torch", "onnxruntime"), 300, "x.npz", "head"),
        (("torch",), 300, "x.npz", "observe"),
        (("onnxruntime",), 8000, "x.npz", "head"),
        ((), 8000, "x.npz", "observe"),
        (("torch", "onnxruntime"), 8000, None, "observe"),
    ],
)
def test_the_tier_follows_from_runtimes_memory_and_data(
    runtimes: tuple[str, ...], memory: int, data: str | None, tier: str
) -> None:
    machine = probe.Machine(
        arch="x86_64",
        cores=1,
        cpus=1.0,
        memory_bytes=memory * MIB,
        disk_free_bytes=1 << 30,
        runtimes=runtimes,
    )
    assert caps(a_config(data=data), machine=machine).tier == tier


def test_the_bench_measures_looks_at_data_and_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "d.npz"
    np.savez(data, x=np.zeros((5, 8, 8), np.uint8), y=[0, 1, 2, 1, 0])
    found = probe.bench(tmp_path, str(data))
    assert found.gflops is not None
    assert found.gflops > 0
    assert found.data is not None
    assert (found.samples, found.data.input_shape, found.data.classes) == (5, (1, 8, 8), 3)
    assert "mlp" in found.families
    monkeypatch.setattr(probe, "_run_bench", lambda *_: pytest.fail("measured again"))
    assert probe.bench(tmp_path, str(data)) == found
    monkeypatch.undo()
    np.savez(data, x=np.zeros((6, 8, 8), np.uint8), y=[0, 1, 2, 1, 0, 0])
    assert probe.bench(tmp_path, str(data)).samples == 6


def test_a_broken_cache_is_measured_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    async def run_bench(*_: object) -> dict[str, object]:
        return {"gflops": 2.0}

    monkeypatch.setattr(probe, "_run_bench", run_bench)
    for text in ("", "[]", '{"for": 1}', "\0"):
        (tmp_path / "bench.json").write_text(text)
        assert probe.bench(tmp_path, None).gflops == 2.0


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda path: None, "no such file"),
        (lambda path: path.write_bytes(b"PK garbage"), "no readable npz"),
        (lambda path: np.savez(path, x=np.zeros((0, 4)), y=np.zeros(0, int)), "no samples"),
        (lambda path: np.savez(path, x=np.full((3, 4), np.nan), y=[0, 1, 0]), "NaN"),
        (lambda path: np.savez(path, x=np.zeros((3, 4)), y=[0, 1]), "y has shape"),
        (lambda path: np.savez(path, x=np.zeros((3, 4))), "no labels"),
        (lambda path: np.savez(path, z=np.zeros((3, 4))), "no inputs"),
        (lambda path: np.savez(path, x=np.zeros((2, 4)), y=[0, 1], test=[1, 1]), "marked test"),
    ],
    ids=["missing", "garbage", "empty", "nan", "shape", "labels", "inputs", "test"],
)
def test_every_fault_of_the_data_has_its_sentence(
    tmp_path: Path, make: Callable[[Path], object], complaint: str
) -> None:
    from liberatai_agent.children.bench import look_at_data

    make(tmp_path / "d.npz")
    found = look_at_data(tmp_path / "d.npz")
    assert found["fault"].startswith("E_DATA: ")
    assert complaint in found["fault"]


def test_one_class_only_is_a_warning_not_a_fault(tmp_path: Path) -> None:
    from liberatai_agent.children.bench import look_at_data

    np.savez(tmp_path / "d.npz", x=np.zeros((3, 4)), y=[1, 1, 1])
    found = look_at_data(tmp_path / "d.npz")
    assert "fault" not in found
    assert "all labels are equal" in found["warning"]


def test_sensors_that_are_not_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("sensors_temperatures", "sensors_battery"):
        monkeypatch.delattr(psutil, name, raising=False)
    assert probe.temperature_c() is None
    assert probe.battery() == (None, True)


def test_the_load_of_others_leaves_out_our_own_processes() -> None:
    meter = probe.LoadMeter()
    assert meter.others((os.getpid(),)) is None
    started = os.times().elapsed
    while os.times().elapsed - started < 0.5:
        pass
    load = meter.others((os.getpid(),))
    assert load is not None
    assert 0 <= load <= (os.cpu_count() or 1)


def test_files_that_are_held_already_make_room_for_the_next_ones_and_a_reserve_stays() -> None:
    """Free space that a device's own model takes was counted against the model."""
    free, held, reserve = 100 << 20, 60 << 20, 32 << 20
    machine = dataclasses.replace(MACHINE, disk_free_bytes=free)

    def storage(config: AgentConfig, held_bytes: int) -> int:
        bench = probe.Bench(gflops=10.0)
        given: dict[str, Any] = {"session": 1, "public_key": bytes(32), "held_bytes": held_bytes}
        return probe.capability(config, None, machine, bench, **given).storage_bytes

    assert storage(a_config(), 0) == free - reserve
    assert storage(a_config(), held) == free + held - reserve
    assert storage(a_config(storage_kb=1024), held) == 1 << 20
