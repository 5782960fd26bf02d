"""Children import nothing from where they are started, get no secrets and need no place but their own."""

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from liberatai_agent.children import control_groups, start
from liberatai_agent.children.messages import Work
from liberatai_agent.children.trainer import Trainer
from liberatai_agent.machine import probe
from liberatai_core import processes
from liberatai_core.contract.messages import Training
from liberatai_core.errors import DigestError
from liberatai_core.structure import DataContract, Structure, Tensor

MIB = 1 << 20
TRAP = "import pathlib\npathlib.Path(__file__).with_name('RAN').touch()\n"
STOLEN = ("random", "socket", "struct", "numpy", "torch", "psutil", "msgspec", "sitecustomize", "ctypes")

WORK = Work(
    device="dev",
    job="job",
    round=1,
    structure=Structure("mlp", {"hidden": 2}, (Tensor("w", (2, 2)),)),
    data=DataContract((2,), 2),
    training=Training(),
    seed=1,
    density=0.5,
    path=(),
    data_path="",
)


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a working directory in which many common names are taken."""
    folder = tmp_path / "project"
    folder.mkdir()
    for name in STOLEN:
        (folder / f"{name}.py").write_text(TRAP)
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize("path", [None, "", ".", ":/usr/nowhere", "project"])
def test_no_child_imports_files_of_the_working_directory(
    trap: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str | None
) -> None:
    if path is not None:
        monkeypatch.setenv("PYTHONPATH", path)
        monkeypatch.chdir(tmp_path if path == "project" else trap)
    state = tmp_path / "state"
    state.mkdir()

    async def scenario() -> None:
        trainer = Trainer(60.0, state_dir=state)
        try:
            with pytest.raises(DigestError, match="no file leads"):
                await trainer.train(WORK)
        finally:
            await trainer.close()

    asyncio.run(scenario())
    assert "mlp" in probe.bench(state, None, again=True).families
    for module in ("liberatai_agent", "liberatai_coordinator"):
        command = processes.command(module, "version")
        subprocess.run(command, env=processes.environment(), check=True, capture_output=True)
    assert not (trap / "RAN").exists()


@pytest.mark.parametrize("module", ["liberatai_agent", "liberatai_coordinator"])
def test_a_program_started_with_m_does_not_import_them_either(trap: Path, module: str) -> None:
    subprocess.run([sys.executable, "-m", module, "version"], check=True, capture_output=True)
    assert not (trap / "RAN").exists()


def test_the_environment_is_an_allow_list(tmp_path: Path) -> None:
    given = {
        "PATH": "/bin",
        "LC_ALL": "C.UTF-8",
        "NOTIFY_SOCKET": "/run/notify",
        "MQTT_PASSWORD": "secret",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "PYTHONPATH": os.pathsep.join(["", ".", "lib", "/opt/lib"]),
        "PYTHONSTARTUP": "here.py",
    }
    kept = processes.environment(given, also={"A": "1"})
    assert kept == {
        "PATH": "/bin",
        "LC_ALL": "C.UTF-8",
        "PYTHONPATH": "/opt/lib",
        "PYTHONSAFEPATH": "1",
        "A": "1",
    }


def test_what_libraries_write_lies_below_the_state(tmp_path: Path) -> None:
    folder = start.fresh_folder(tmp_path, "trainer")
    (folder / "tmp" / "left").touch()
    assert not (start.fresh_folder(tmp_path, "trainer") / "tmp" / "left").exists()
    found = start.environment(folder)
    for name in ("HOME", "TMPDIR", "XDG_CACHE_HOME", "TORCHINDUCTOR_CACHE_DIR"):
        assert Path(found[name]).is_dir()
        assert Path(found[name]).is_relative_to(tmp_path)
    assert folder.stat().st_mode & 0o077 == 0


def test_a_state_that_takes_no_folder_leaves_the_child_without_one(tmp_path: Path) -> None:
    (tmp_path / "children").write_text("in the way")
    assert start.fresh_folder(tmp_path, "trainer") == Path("/")
    assert "TMPDIR" not in start.environment(Path("/")) or os.environ.get("TMPDIR")


def test_a_user_without_a_name_gets_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(_: int) -> None:
        raise KeyError

    monkeypatch.setattr("pwd.getpwuid", nobody)
    assert start.environment(Path("/"))["USER"] == f"user{os.getuid()}"


# --- what cannot be read --------------------------------------------------------------------------


def test_an_unreadable_proc_leaves_values_unknown_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hidden(*_: object) -> None:
        raise PermissionError(13, "Permission denied", "/proc/stat")

    for name in ("cpu_times", "cpu_percent", "virtual_memory", "disk_usage", "Process"):
        monkeypatch.setattr(psutil, name, hidden)
    for name in ("sensors_temperatures", "sensors_battery"):
        monkeypatch.setattr(psutil, name, hidden, raising=False)
    monkeypatch.setattr(control_groups, "ROOT", tmp_path)
    assert probe.LoadMeter().others((os.getpid(),)) is None
    assert (probe.cpu_percent(), probe.rss(), probe.temperature_c()) == (None, None, None)
    assert probe.battery() == (None, True)
    assert probe.measure(tmp_path, control_groups.Group()).memory_bytes > 0


def a_group(root: Path, folder: str, **files: str) -> Path:
    for name, text in files.items():
        path = root / folder / name.replace("__", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_what_is_left_of_a_containers_memory_counts_not_the_hosts(tmp_path: Path) -> None:
    a_group(
        tmp_path,
        "a/b",
        memory__max=f"{100 * MIB}\n",
        memory__current=f"{90 * MIB}\n",
        memory__stat=f"anon 5\ninactive_file {20 * MIB}\n",
    )
    a_group(tmp_path, "a", memory__max="max\n", memory__current="7\n")
    assert control_groups.memory_available(tmp_path, "0::/a/b\n") == 30 * MIB
    assert control_groups.memory_available(tmp_path, "0::/a\n") is None
    a_group(
        tmp_path,
        "memory/c",
        memory__limit_in_bytes=str(50 * MIB),
        memory__usage_in_bytes=str(60 * MIB),
        memory__stat="total_inactive_file 1\n",
    )
    assert control_groups.memory_available(tmp_path, "4:memory:/c\n") == 0


def test_the_load_of_a_container_is_its_own(tmp_path: Path) -> None:
    assert control_groups.cpu_seconds(tmp_path, "0::/a\n") is None
    a_group(tmp_path, "", cpu__max="max 100000\n", cpu__stat="usage_usec 2500000\n")
    assert control_groups.cpu_seconds(tmp_path, "0::/\n") == 2.5
    old = a_group(tmp_path / "v1", "cpu,cpuacct", cpuacct__usage="1500000000\n")
    assert control_groups.cpu_seconds(old, "3:cpu,cpuacct:/docker/abc\n") == 1.5
    (old / "cpu,cpuacct/docker/abc").mkdir(parents=True)
    assert control_groups.cpu_seconds(old, "3:cpu,cpuacct:/docker/abc\n") is None


def test_kills_for_memory_are_counted(tmp_path: Path) -> None:
    a_group(tmp_path, "a", memory__events="low 0\noom 3\noom_kill 2\n")
    assert control_groups.out_of_memory_kills(tmp_path, "0::/a\n") == 2
    assert control_groups.out_of_memory_kills(tmp_path, "0::/b\n") == 0


def test_a_delegated_group_is_divided_into_one_for_the_agent_and_one_for_its_child(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = tmp_path / "system.slice/agent.service"
    service.mkdir(parents=True)
    own = "0::/system.slice/agent.service\n"
    assert control_groups.group_for_child("trainer", tmp_path, own) is None, "not delegated"
    monkeypatch.setattr("os.getxattr", lambda path, name: b"1" if path == service else b"0")
    group = control_groups.group_for_child("trainer", tmp_path, own)
    assert group == service / "trainer"
    assert (service / "agent/cgroup.procs").read_text() == str(os.getpid())
    assert (service / "cgroup.subtree_control").read_text() == "+memory +pids"
    moved = control_groups.group_for_child("trainer", tmp_path, "0::/system.slice/agent.service/agent\n")
    assert moved == group
    control_groups.put_into(group, 7)
    control_groups.limit_memory(group, 99)
    assert ((group / "cgroup.procs").read_text(), (group / "memory.max").read_text()) == ("7", "99")
    assert control_groups.group_for_child("trainer", tmp_path, "4:memory:/x\n") is None


def test_the_bench_says_what_it_found_beside_what_is_printed(tmp_path: Path) -> None:
    source, sink = os.pipe()
    command = processes.command("liberatai_agent.children.bench", "--no-arithmetic", "--answer", str(sink))
    done = subprocess.run(command, pass_fds=(sink,), capture_output=True, check=True)
    os.close(sink)
    assert done.stdout == b""
    assert "mlp" in json.loads(os.read(source, 1 << 16))["families"]
    os.close(source)
