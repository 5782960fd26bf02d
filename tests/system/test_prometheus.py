"""Debian's Prometheus reads what a real coordinator says, and its tools find no fault with alerts and names."""

import json
import shutil
import socket
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.system.conftest import MOSQUITTO, fleet_host
from tests.system.machine import ROOT, until

DEPLOY = ROOT / "deploy" / "prometheus"
pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(
        shutil.which("prometheus") is None or MOSQUITTO is None, reason="needs prometheus and mosquitto"
    ),
]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@pytest.fixture
def metrics(tmp_path: Path) -> Iterator[str]:
    """A coordinator with a broker; return where its metrics are."""
    address = f"127.0.0.1:{free_port()}"
    with fleet_host(tmp_path, "127.0.0.1", f"metrics: {address}"):
        yield address


def check(*command: str, text: bytes = b"") -> None:
    run = subprocess.run(
        ["promtool", "check", *command], input=text, capture_output=True, check=False, timeout=60
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert not run.stderr, "no advice is left"


def test_prometheus_scrapes_a_coordinator_and_evaluates_the_alerts(metrics: str, tmp_path: Path) -> None:
    with urllib.request.urlopen(f"http://{metrics}/metrics", timeout=30) as answer:
        check("metrics", text=answer.read())
    check("rules", str(DEPLOY / "alerts.yaml"))
    text = (DEPLOY / "prometheus.yaml").read_text(encoding="utf-8")
    text = text.replace("127.0.0.1:9464", metrics).replace("15s", "1s")
    text = text.replace("alerts.yaml", str(DEPLOY / "alerts.yaml"))
    (tmp_path / "prometheus.yaml").write_text(text, encoding="utf-8")
    web = f"127.0.0.1:{free_port()}"
    command = [f"--config.file={tmp_path / 'prometheus.yaml'}", f"--storage.tsdb.path={tmp_path / 'tsdb'}"]
    with subprocess.Popen(["prometheus", *command, f"--web.listen-address={web}"]) as prometheus:
        try:
            until(lambda: value(web, "liberatai_broker_connected") == 1, "the coordinator was scraped")
            assert value(web, 'up{job="liberatai"}') == 1
            assert value(web, 'liberatai_devices{state="online"}') == 0
            rules = asked(web, "rules")["groups"][0]["rules"]
            until(lambda: all(rule["health"] == "ok" for rule in evaluated(web)), "every alert is evaluated")
            assert len(rules) > 8
            assert not [rule["name"] for rule in rules if rule["state"] == "firing"]
        finally:
            prometheus.terminate()
            prometheus.wait(60)


def evaluated(web: str) -> list[Any]:
    return list(asked(web, "rules")["groups"][0]["rules"])


def asked(web: str, question: str) -> Any:
    try:
        with urllib.request.urlopen(f"http://{web}/api/v1/{question}", timeout=30) as answer:
            return json.load(answer)["data"]
    except OSError:
        return {}


def value(web: str, query: str) -> float | None:
    found = asked(web, f"query?query={urllib.parse.quote(query)}").get("result", [])
    return float(found[0]["value"][1]) if found else None
