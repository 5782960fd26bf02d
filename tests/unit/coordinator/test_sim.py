"""What a simulation is made of: its files, who gets which data, what happens when, its page and its commands."""

import contextlib
import json
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from liberatai_coordinator.cli import main
from liberatai_coordinator.sim import control, report, split, up
from liberatai_coordinator.sim import scenario as scenarios
from liberatai_coordinator.sim.fleet_file import FleetFile, load_fleet
from liberatai_coordinator.sim.process import backend
from liberatai_coordinator.sim.record import (
    DeviceRecord,
    FaultRecord,
    Moment,
    Point,
    Record,
    RoundRecord,
    with_ends,
)
from liberatai_core.errors import ConfigError, DataError, NotFoundError

DEVICES = [f"pi4-{number:04}" for number in range(1, 41)]


# --- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("devices: {pi4: 0}", "devices: 0 in all"),
        ("devices: {toaster: 1}", "no profile 'toaster'"),
        ("devices: {pi4: -1}", "devices"),
        ("devices: {pi4: 1}\nbackend: process\ntraining: drawn", "training: drawn needs backend: virtual"),
        ("devices: {pi4: 1}\nbackend: process\nawake: 0.5", "awake:"),
        ("devices: {pi4: 1}\nseeds: 1", "seeds: unknown key"),
    ],
)
def test_a_fleet_that_cannot_be_simulated_is_refused_in_words(text: str, fault: str, tmp_path: Path) -> None:
    (tmp_path / "fleet.yaml").write_text(text)
    with pytest.raises(ConfigError, match=fault):
        load_fleet(tmp_path / "fleet.yaml")


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("outages: [{share: 1}]", "give at_s or every_s"),
        ("outages: [{at_s: 1, every_s: 2}]", "give at_s or every_s"),
        ("nights: {least: 0.9, most: 0.1}", "least is more than most"),
        ("crashes: {per_minute: 2}", "crashes.per_minute"),
        ("earthquake: {}", "earthquake: unknown key"),
    ],
)
def test_a_scenario_with_faults_is_refused_in_words(text: str, fault: str, tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(f"name: s\ndescription: d\n{text}\n")
    with pytest.raises(ConfigError, match=fault):
        scenarios.load_scenario(str(tmp_path / "s.yaml"))


def test_an_unknown_scenario_is_refused_with_those_that_exist() -> None:
    with pytest.raises(ConfigError, match=r"known: always-fails, .*steady"):
        scenarios.load_scenario("rain")


# --- what happens --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", scenarios.scenario_names())
def test_happenings_are_those_of_the_seed_and_everything_that_begins_ends(name: str) -> None:
    scenario = scenarios.load_scenario(name)
    found = [one for window in range(12) for one in scenarios.happenings(scenario, DEVICES, 7, window)]
    assert found == [
        one for window in range(12) for one in scenarios.happenings(scenario, DEVICES[::-1], 7, window)
    ]
    begun = [one for one in found if one.what in scenarios.ENDS and one.what != "asleep"]
    ended = [one.what for one in found]
    for one in begun:
        assert ended.count(scenarios.ENDS[one.what]) >= [b.what for b in begun].count(one.what)


def test_a_share_of_the_devices_crashes_in_a_minute() -> None:
    scenario = scenarios.load_scenario("brown-out")
    crashes = [
        one
        for window in range(50)
        for one in scenarios.happenings(scenario, DEVICES, 1, window)
        if one.what == "crash"
    ]
    assert 150 <= len(crashes) <= 250, "50 minutes of 40 devices, a tenth of them in each"


def test_four_times_as_many_devices_are_awake_at_night_as_by_day() -> None:
    scenario = scenarios.load_scenario("day-and-night")
    awake, counts = set(DEVICES), []
    for window in range(10):
        for one in scenarios.happenings(scenario, DEVICES, 3, window):
            (awake.add if one.what == "awake" else awake.discard)(one.device)
            counts.append(len(awake))
    assert max(counts) >= 38
    assert min(counts) <= 14


def test_what_needs_virtual_time_is_refused_by_processes() -> None:
    fleet = FleetFile(devices={"pi4": 3}, backend="process")
    with pytest.raises(ConfigError, match="hostile needs backend: virtual"):
        backend.check(fleet, scenarios.load_scenario("hostile"))
    with pytest.raises(ConfigError, match="201 processes, at most 200"):
        backend.check(replace(fleet, devices={"pi4": 201}), scenarios.load_scenario("steady"))


# --- data ----------------------------------------------------------------------------------------


def a_file(folder: Path, count: int = 400, **more: Any) -> Path:
    random = np.random.default_rng(0)
    path = folder / "all.npz"
    np.savez(path, x=random.normal(size=(count, 1, 2, 2)), y=np.arange(count) % 4, **more)
    return path


def labels(files: dict[str, Path]) -> dict[str, list[int]]:
    return {name: np.bincount(np.load(path)["y"], minlength=4).tolist() for name, path in files.items()}


@pytest.mark.parametrize("how", ["even", "dirichlet:0.3"])
def test_every_sample_goes_to_one_device_or_to_the_test(how: str, tmp_path: Path) -> None:
    parts = {"a": 1, "b": 1, "gateway": 8}
    files, (x, y) = split.split(a_file(tmp_path), parts, how, 1, tmp_path / "data")
    counts = labels(files)
    assert sum(map(sum, counts.values())) + len(y) == 400
    assert (len(x), len(y)) == (40, 40)
    if how == "even":
        assert sum(counts["gateway"]) == 8 * sum(counts["a"]), "a gateway has what its leaves sent"
    else:
        assert max(counts["a"]) > 1.5 * sum(counts["a"]) / 4, "classes are unlike"
    again, _ = split.split(a_file(tmp_path), parts, how, 1, tmp_path / "again")
    assert labels(again) == counts


def test_a_natural_split_keeps_the_samples_of_one_owner_together(tmp_path: Path) -> None:
    path = a_file(tmp_path, group=np.repeat(np.arange(8), 50))
    files, _ = split.split(path, {"a": 1, "b": 1}, "natural", 0, tmp_path / "data")
    assert len(files) == 2
    with pytest.raises(DataError, match="8 groups for 9 devices"):
        split.split(path, {"a": 9}, "natural", 0, tmp_path / "data")
    with pytest.raises(DataError, match="needs an array 'group'"):
        split.split(a_file(tmp_path), {"a": 1}, "natural", 0, tmp_path / "data")


def test_every_device_has_a_sample_however_unlike_they_are(tmp_path: Path) -> None:
    parts = {f"d{number}": 1 for number in range(30)}
    files, _ = split.split(a_file(tmp_path, 80), parts, "dirichlet:0.01", 0, tmp_path / "data")
    assert min(sum(counts) for counts in labels(files).values()) >= 1


@pytest.mark.parametrize("how", ["odd", "dirichlet:", "dirichlet:0", "dirichlet:nan", "dirichlet:x"])
def test_another_way_to_split_is_refused(how: str) -> None:
    with pytest.raises(ConfigError, match="must be even, natural or dirichlet"):
        split.check(how)


# --- page and commands ---------------------------------------------------------------------------


def a_record(**changes: Any) -> Record:
    moments = tuple(
        Moment(at_s=at, what=what) for at, what in enumerate(("idle", "fetching", "training", "sending"))
    )
    record = Record(
        fleet="sim",
        backend="virtual",
        scenario="brown-out",
        description="Some crash.",
        seed=1,
        job="<digits>",
        state="finished",
        job_s=9.0,
        wall_s=1.0,
        known=2,
        updates=3,
        up_bytes=3000,
        down_bytes=5000,
        digests={"mlp": "00"},
        rounds=(
            RoundRecord(
                round=1,
                state="published",
                invited=2,
                updates=2,
                seconds=4,
                at_s=4,
                held_by=("pi4-0002", "pi4-0001"),
            ),
        ),
        devices=tuple(
            DeviceRecord(id=f"pi4-000{n}", profile="pi4", rounds=1, moments=moments) for n in (1, 2)
        ),
        faults=(
            FaultRecord(at_s=2, what="crash", device="pi4-0001", ended_s=7),
            FaultRecord(at_s=3, what="broker stops", ended_s=4),
        ),
        points=(Point(profile="pi4", at_s=4, version=1, figure=0.5, up_bytes=1000, down_bytes=2000),),
    )
    return replace(record, **changes)


def test_a_page_shows_who_held_a_round_and_how_faults_ended(tmp_path: Path) -> None:
    page = report.write(a_record(), tmp_path).read_text()
    assert report.read(tmp_path) == a_record()
    assert "pi4-0002, pi4-0001" in page
    assert "&lt;digits&gt; finished" in page
    assert page.count("data:image/png;base64,") == 3
    assert "<script" not in page
    assert "50.0 %" in page


def test_how_a_fault_ended_follows_from_what_its_device_did_next() -> None:
    moments = tuple(
        Moment(at_s=at, what=what)
        for at, what in ((0, "idle"), (3, "crashed"), (9.5, "idle"), (10, "fetching"), (12, "receipt"))
    )
    record = a_record(began_s=1.0, devices=(DeviceRecord(id="pi4-0001", profile="pi4", moments=moments),))
    crash, broker = with_ends(record).faults
    assert crash.how == "there again after 1.5 s, next update counted after 4.0 s"
    assert broker.how == "round 1: published, 2 of 2"
    gone = a_record(devices=(DeviceRecord(id="pi4-0001", profile="pi4", moments=moments[:2]),))
    assert with_ends(gone).faults[0].how == "not back before the end"


def test_a_page_of_a_job_without_versions_is_made_too(tmp_path: Path) -> None:
    empty = a_record(points=(), devices=(), faults=(), rounds=(), state="failed", reason="E_DATA: none")
    page = report.write(empty, tmp_path).read_text()
    assert "failed: E_DATA: none" in page
    assert "data:image" not in page


def test_commands_ask_the_simulation_that_runs_in_a_folder(tmp_path: Path, capsys: Any) -> None:
    asked: list[Any] = []

    def scale(request: Any) -> tuple[int, int]:
        if request["count"] > 9:
            raise ConfigError("scale", ["too many"])
        asked.append((request["profile"], request["count"]))
        return 2, 0

    handlers = {
        "scale": scale,
        "status": lambda _: {"state": "running", "running": {"pi4": 3}},
        "fault": asked.append,
    }
    where = ["--dir", str(tmp_path)]
    assert main(["sim", "status", *where]) == 4
    with control.Control(tmp_path, handlers):
        assert main(["sim", "scale", "pi4=7", *where]) == 0
        assert main(["sim", "status", *where]) == 0
        assert main(["sim", "fault", "cut", "pi4-0001", "--for", "3", *where]) == 0
        shown = capsys.readouterr().out
        assert "pi4: 2 started, 0 stopped" in shown
        assert "pi4=3" in shown
        assert main(["sim", "scale", "pi4=10", *where]) in (1, 2)
        assert main(["sim", "scale", "pi4", *where]) == 2
        assert main(["sim", "fault", "broker", "pi4-0001", *where]) == 2
        assert main(["sim", "fault", "crash", *where]) == 2
        with pytest.raises(Exception, match="no request of this release"):
            control.ask(tmp_path, "explode")
    assert asked[0] == ("pi4", 7)
    assert asked[1]["what"] == "cut"
    with pytest.raises(NotFoundError, match="no simulation runs here"):
        control.ask(tmp_path, "status")


FLEET = "devices: {pi4: 3}\ntraining: drawn\nsamples: 100000\n"
JOB = """
name: tiny
data: {input_shape: [1, 4, 4], classes: 3}
structures: [{family: mlp, params: {hidden: 8}}]
rounds: {count: 3, min_devices: 3, deadline_s: 60}
"""


def test_a_simulation_goes_from_its_files_to_its_page(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "fleet.yaml").write_text(FLEET)
    (tmp_path / "job.yaml").write_text(JOB)
    folder = tmp_path / "sim"
    where = ["--dir", str(folder)]
    files = ["-f", str(tmp_path / "fleet.yaml"), "--job", str(tmp_path / "job.yaml")]
    assert main(["sim", "up", *files, *where, "-o", "json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["state"], facts["updates"], facts["lost"]) == ("finished", 9, 0)
    assert main(["sim", "status", *where]) == 0
    assert "9 receipted, 0 lost" in capsys.readouterr().out
    (folder / "report.html").unlink()
    assert main(["sim", "report", *where]) == 0
    assert (folder / "report.html").is_file()
    assert main(["sim", "up", *files, *where, "--scenario", "rain"]) == 2
    assert main(["sim", "up", *files, *where, "--backend", "process"]) == 2
    assert main(["sim", "scenarios"]) == 0
    assert "brown-out" in capsys.readouterr().out


def test_data_is_asked_for_where_training_is_real(tmp_path: Path) -> None:
    (tmp_path / "fleet.yaml").write_text("devices: {pi4: 3}\n")
    (tmp_path / "job.yaml").write_text(JOB)
    wanted = up.Wanted(
        fleet=tmp_path / "fleet.yaml",
        job=tmp_path / "job.yaml",
        data=None,
        how="even",
        test=None,
        folder=tmp_path,
    )
    with pytest.raises(ConfigError, match=r"give a \.npz"):
        up.run(wanted)


# --- links of processes ----------------------------------------------------------------------------


def test_a_link_over_tcp_has_rate_delay_and_outages() -> None:
    import socket
    from random import Random

    from liberatai_coordinator.sim.process.proxy import Proxies, Proxy
    from liberatai_core.profile import Network

    server = socket.create_server(("127.0.0.1", 0))

    def heard(client: Any) -> bytes:
        """Return what comes; a connection that breaks is one that ends."""
        with contextlib.suppress(OSError):
            client.sendall(b"y")
            return bytes(client.recv(1))
        return b""

    def echo() -> None:
        while True:
            try:
                peer, _ = server.accept()
            except OSError:
                return
            threading.Thread(target=_echo, args=(peer,), daemon=True).start()

    def _echo(peer: Any) -> None:
        while data := peer.recv(65536):
            peer.sendall(data)

    threading.Thread(target=echo, daemon=True).start()
    links = Proxies()
    try:
        net = Network(up_mbit=2, down_mbit=1000, rtt_ms=100)
        port = links.add("d", net, Random(0), lambda: server.getsockname())
        with socket.create_connection(("127.0.0.1", port), 60) as client:
            began = time.monotonic()
            client.sendall(b"x" * 100_000)
            left = 100_000
            while left:
                left -= len(client.recv(65536))
            # 0.8 Mbit at 2 Mbit/s, and a round trip: no less, however slow this machine is.
            assert time.monotonic() - began >= 0.4 + 0.1 - 0.01
            assert links.moved("d") == (100_000, 100_000)
            links.do("d", Proxy.cut)
            assert heard(client) == b""
        with socket.create_connection(("127.0.0.1", port), 60) as client:
            assert heard(client) == b"", "new ones are refused"
        links.do("d", Proxy.mend)
        with socket.create_connection(("127.0.0.1", port), 60) as client:
            assert heard(client) == b"y"
    finally:
        links.close()
        server.close()
