"""A training process that a service manager started is used like a child, and ends with the agent."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from liberatai_agent.children import control_groups, workers
from liberatai_agent.children.messages import Work
from liberatai_agent.children.trainer import Trainer, TrainerDiedError
from liberatai_core.contract.messages import Training
from liberatai_core.errors import DigestError, MemoryLimitError, TrainingError
from liberatai_core.structure import DataContract, Structure, Tensor

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
CHILD = "from liberatai_agent.children.trainer_child import main; main([])"
STUCK = f"""
import time
from liberatai_agent.children import trainer_child
trainer_child.serve = lambda source, sink: time.sleep(600)
{CHILD.replace("from liberatai_agent.children.trainer_child import main; ", "trainer_child.")}
"""
ACTIVATED = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1"}
os.execv(sys.executable, [sys.executable, "-c", sys.argv[2]])
"""


class Manager:
    """Starts a process per connection, as a socket unit with Accept=yes does."""

    def __init__(self, path: Path, state: Path) -> None:
        self.program = CHILD
        self.processes: list[subprocess.Popen[bytes]] = []
        self._state = state
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:
                passed = connection.fileno()
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, "-c", ACTIVATED, str(passed), self.program],
                        pass_fds=(passed,),
                        env={**os.environ, "STATE_DIRECTORY": str(self._state)},
                    )
                )

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()
        for process in self.processes:
            process.wait(60)


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Manager]:
    path = tmp_path / "trainer.sock"
    monkeypatch.setenv(workers.SOCKET, str(path))
    manager = Manager(path, tmp_path)
    yield manager
    manager.close()


def test_it_answers_and_works_in_a_folder_of_its_own(manager: Manager, tmp_path: Path) -> None:
    async def scenario() -> None:
        trainer = Trainer(60.0)
        await trainer.warm()
        running = psutil.Process(trainer.pid)
        assert running.ppid() == os.getpid()
        assert running.pid == manager.processes[0].pid
        for _ in range(2):
            with pytest.raises(DigestError, match="no file leads to the base"):
                await trainer.train(WORK)
        assert Path(running.cwd()) == tmp_path / "children" / "trainer"
        await trainer.close()
        assert trainer.pid is None

    asyncio.run(scenario())
    assert [process.wait(60) for process in manager.processes] == [-signal.SIGKILL]


def test_it_ends_with_the_connection_whatever_it_does(manager: Manager) -> None:
    manager.program = STUCK

    async def scenario() -> None:
        worker = await workers.started([], None)
        worker.channel[1].transport.abort()
        await asyncio.wait_for(worker.wait(), 60)
        assert worker.pid is None

    asyncio.run(scenario())
    assert manager.processes[0].wait(60) == 1


def test_a_cancelled_training_leaves_no_process_and_the_next_one_gets_another(manager: Manager) -> None:
    manager.program = STUCK

    async def scenario() -> None:
        trainer = Trainer(60.0)
        training = asyncio.create_task(trainer.train(WORK))
        while trainer.pid is None:
            await asyncio.sleep(0.01)
        training.cancel()
        with pytest.raises(asyncio.CancelledError):
            await training
        assert trainer.pid is None
        manager.program = CHILD
        with pytest.raises(DigestError):
            await trainer.train(WORK)
        await trainer.close()

    asyncio.run(scenario())
    assert len(manager.processes) == 2


@pytest.mark.parametrize("counted", [False, True])
def test_a_kill_for_memory_is_told_from_other_ends_by_the_kernels_counter(
    manager: Manager, counted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    kills = iter([4, 5 if counted else 4])
    monkeypatch.setattr("liberatai_agent.children.control_groups.out_of_memory_kills", lambda: next(kills))
    manager.program = STUCK.replace("time.sleep(600)", "__import__('os').kill(0, 9)").replace(
        "kill(0", "kill(__import__('os').getpid()"
    )

    async def scenario() -> None:
        trainer = Trainer(60.0)
        try:
            await trainer.train(WORK)
        finally:
            await trainer.close()

    with pytest.raises(MemoryLimitError if counted else TrainerDiedError):
        asyncio.run(scenario())


def test_a_process_that_does_not_come_up_is_an_error_in_words(
    manager: Manager, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    manager.program = "raise SystemExit(3)"
    with pytest.raises(TrainingError, match="journalctl"):
        asyncio.run(Trainer(60.0).warm())
    monkeypatch.setenv(workers.SOCKET, str(tmp_path / "nobody"))
    with pytest.raises(TrainingError, match="cannot be started"):
        asyncio.run(Trainer(60.0).warm())


def test_a_training_process_that_nobody_started_properly_says_so() -> None:
    run = subprocess.run(
        [sys.executable, "-c", CHILD], capture_output=True, text=True, check=False, timeout=60
    )
    assert (run.returncode, run.stderr[:9]) == (2, "E_STATE: ")


def test_the_limits_of_a_device_are_those_of_the_group_its_trainings_run_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path, memory in (("own", "100"), ("fleet/training", "700"), ("fleet", "max")):
        (tmp_path / path).mkdir(parents=True, exist_ok=True)
        (tmp_path / path / "memory.max").write_text(memory + "\n")
    assert control_groups.limits(tmp_path, "0::/own\n").memory_bytes == 100
    monkeypatch.setenv(control_groups.TRAINING, "/fleet/training")
    assert control_groups.limits(tmp_path, "0::/own\n").memory_bytes == 700
