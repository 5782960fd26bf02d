"""The demo, as a user starts it: processes of its own, a real broker, a report at the end."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from liberatai_coordinator.brokers.start import find_mosquitto
from liberatai_coordinator.demo.outcome import dense_bytes
from liberatai_coordinator.pictures import report as reports

BROKERS = ["amqtt", "mosquitto"]


def listen() -> None:
    """Let Ctrl-C through: a shell that runs the tests in the background has it ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(tmp_path: Path, *options: str) -> "subprocess.Popen[str]":
    """Start the demo with its temporary folder inside of ours."""
    scratch = tmp_path / "t"
    scratch.mkdir()
    return subprocess.Popen(
        [sys.executable, "-m", "liberatai_coordinator", "demo", "--report", str(tmp_path / "out"), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "TMPDIR": str(scratch)},
        preexec_fn=listen,  # noqa: PLW1509 - this process starts no threads before it
    )


@pytest.mark.timeout(150)
@pytest.mark.parametrize("broker", BROKERS)
def test_demo_trains_unlike_devices_and_writes_its_report(tmp_path, broker):
    if broker == "mosquitto" and find_mosquitto() is None:
        pytest.skip("mosquitto is not installed")
    demo = start(tmp_path, "--devices", "4", "--rounds", "2", "--broker", broker)
    output, _ = demo.communicate(timeout=140)
    assert demo.returncode == 0, output
    made = reports.read((tmp_path / "out" / "report.json").read_bytes())

    assert made.broker.startswith(broker)
    assert made.protocol == {"amqtt": "MQTT 3.1.1", "mosquitto": "MQTT 5"}[broker]
    assert len({device.profile for device in made.devices}) == 4
    assert len({device.structure for device in made.devices}) >= 3
    assert len({row.family for row in made.structures}) >= 2
    for device in made.devices:
        assert 0 < device.variant_bytes <= device.budget_bytes
        assert device.structure in device.why
        assert device.sent_bytes > 1000
        assert device.received_bytes > 1000

    structures = {row.id: row.parameters for row in made.structures}
    assert [row.round for row in made.rounds] == [1, 2]
    for row in made.rounds:
        assert set(row.accuracy) == {*structures, "ensemble"}
        assert row.updates == row.invited == 4
        assert 0 < row.train_seconds_max < row.seconds
        assert min(row.up_bytes, row.down_bytes) > 0
    assert set(made.final) == {*structures, "ensemble", "best_member", "centralised"}
    assert made.final["best_member"] == max(made.final[name] for name in structures)
    assert made.final["ensemble"] > 0.3  # two rounds: far above chance, far below what twelve reach
    assert made.dense_bytes == dense_bytes([structures[device.structure] for device in made.devices], 2)
    counted = sum(row.up_bytes + row.down_bytes for row in made.rounds)
    assert counted <= made.total_bytes == sum(d.sent_bytes + d.received_bytes for d in made.devices)
    assert len(made.model_versions) == len(set(made.model_versions)) == 3

    page = (tmp_path / "out" / "report.html").read_text()
    assert all(device.id in page for device in made.devices)
    assert "round  1/2" in output
    assert str(tmp_path / "out" / "report.html") in output.replace("\n", "")
    assert not list((tmp_path / "t").glob("liberatai-demo-*"))


@pytest.mark.timeout(120)
def test_stopping_the_demo_leaves_no_process_and_no_folder(tmp_path):
    demo = start(tmp_path, "--devices", "2", "--rounds", "500")
    try:
        assert demo.stdout is not None
        while "round  1/" not in (line := demo.stdout.readline()):
            assert line, "the demo ended before its first round"
        children = psutil.Process(demo.pid).children(recursive=True)
        assert len(children) >= 4  # broker, coordinator, two agents, and their trainers
        demo.send_signal(signal.SIGINT)
        rest, _ = demo.communicate(timeout=60)
    finally:
        demo.kill()
    assert demo.returncode == 130, rest
    assert "Traceback" not in rest
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
    assert not list((tmp_path / "t").glob("liberatai-demo-*"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--devices", "41"), "--devices"),
        (("--broker", "carrier-pigeon"), "broker"),
        (("--broker", "mqtt://127.0.0.1:1", "--devices", "2"), "127.0.0.1:1"),
    ],
)
def test_wrong_options_end_in_one_line(tmp_path, options, text):
    demo = start(tmp_path, *options)
    output, _ = demo.communicate(timeout=60)
    assert demo.returncode in {1, 2}
    assert text in output
    assert "Traceback" not in output
    shutil.rmtree(tmp_path / "t")
