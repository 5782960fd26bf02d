"""Service managers are told what they asked to hear, and nobody else anything."""

import socket
from pathlib import Path

import pytest

from liberatai_core import sd_notify


@pytest.mark.parametrize("abstract", [False, True])
def test_lines_are_one_datagram_to_the_socket_of_the_manager(
    abstract: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"liberatai-{tmp_path.name}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind("\0" + name if abstract else name)
        monkeypatch.setenv("NOTIFY_SOCKET", "@" + name if abstract else name)
        sd_notify.notify("READY=1", "STATUS=two\nWATCHDOG=trigger")
        manager.settimeout(10)
        assert manager.recv(1000) == b"READY=1\nSTATUS=two WATCHDOG=trigger", "no line is smuggled in"


def test_without_a_manager_or_with_one_that_is_gone_nothing_happens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    sd_notify.notify("READY=1")
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nobody"))
    sd_notify.notify("READY=1")


def test_a_manager_hears_twice_in_its_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "10000000")
    assert sd_notify.pause_s() == 5.0
    for nonsense in ("", "0", "nonsense", "-5"):
        monkeypatch.setenv("WATCHDOG_USEC", nonsense)
        assert sd_notify.pause_s() == sd_notify.LONGEST_PAUSE_S
