"""Simulated devices as child processes: the same weights and files as in virtual time, and faults that heal."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from liberatai_coordinator.sim import control, up
from liberatai_coordinator.sim.record import Record
from liberatai_core.errors import NotFoundError

pytestmark = pytest.mark.system
pytest.importorskip("torch")

FLEET = "devices: {pi4: 2, pi-zero-2w: 1}\nseed: 3\n"
JOB = """
name: tiny
data: {input_shape: [1, 4, 4], classes: 3}
structures: [{family: mlp, params: {hidden: 8}}]
rounds: {count: COUNT, min_devices: 3, quorum: 0.5, deadline_s: 120}
training: {epochs: 2}
sparsify: {up_density: 0.3}
seed: 1
"""


def run(folder: Path, backend: Any, rounds: int = 3, scenario: str = "steady") -> Record:
    folder.mkdir(exist_ok=True)
    random = np.random.default_rng(0)
    y = random.integers(0, 3, 240)
    x = random.normal(0, 0.3, (240, 1, 4, 4)).astype(np.float32)
    x[np.arange(240), 0, y, 0] += 2
    np.savez(folder / "all.npz", x=x, y=y)
    (folder / "fleet.yaml").write_text(FLEET)
    (folder / "job.yaml").write_text(JOB.replace("COUNT", str(rounds)))
    return up.run(
        up.Wanted(
            fleet=folder / "fleet.yaml",
            job=folder / "job.yaml",
            data=folder / "all.npz",
            how="dirichlet:0.5",
            test=None,
            folder=folder / "sim",
            backend=backend,
            scenario=scenario,
        )
    )


def test_processes_and_virtual_time_give_the_same_weights_files_and_streams(tmp_path: Path) -> None:
    virtual, process = run(tmp_path / "v", "virtual"), run(tmp_path / "p", "process")
    assert (virtual.state, process.state) == ("finished", "finished")
    assert process.updates == virtual.updates == 9
    assert process.digests == virtual.digests
    assert process.file_bytes == virtual.file_bytes
    assert process.last_body_bytes == virtual.last_body_bytes
    assert [one.figure for one in process.points[-2:]] == [one.figure for one in virtual.points[-2:]]


def test_devices_are_cut_killed_and_scaled_while_a_job_runs(tmp_path: Path) -> None:
    folder, found = tmp_path / "sim", []

    def work() -> None:
        found.append(run(tmp_path, "process", rounds=15))

    running = threading.Thread(target=work)
    running.start()
    try:
        ended = 0
        while running.is_alive() and ended < 2:
            try:
                ended = int(str(control.ask(folder, "status")["rounds"]).split("/")[0])
            except NotFoundError:
                running.join(0.2)
        control.ask(folder, "fault", what="crash", device="pi4-0001", for_s=1)
        control.ask(folder, "fault", what="cut", device="pi4-0002", for_s=2)
        control.ask(folder, "fault", what="coordinator stops", device="", for_s=1)
        assert control.ask(folder, "scale", profile="pi4", count=3) == [1, 0]
        assert control.ask(folder, "status")["running"]["pi4"] >= 1
        with pytest.raises(NotFoundError, match="no device"):
            control.ask(folder, "fault", what="cut", device="pi9-0001", for_s=1)
    finally:
        running.join(240)
    (record,) = found
    assert record.state == "finished"
    assert {one.what for one in record.faults} == {"crash", "cut", "coordinator stops"}
    assert all(one.ended_s is not None for one in record.faults)
    assert len(record.rounds) == 15
