"""The status file is written when something changed, and not for counters that move all the time."""

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from liberatai_agent.cli import main
from liberatai_agent.health import overview
from liberatai_agent.health.overview import StatusFile
from liberatai_agent.store import files, status
from liberatai_agent.store.counters import Counters
from liberatai_agent.store.faults import Faults
from liberatai_agent.store.outbox import open_database
from liberatai_agent.store.status import last_error, read_status


def test_only_changes_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: dict[str, Any] = {"phase": "idle", "sent_bytes": 1, "link": {"day_bytes": 1, "quota_spent": False}}
    written: list[dict[str, Any]] = []

    def replace_quickly(path: Path, content: bytes) -> None:
        written.append(json.loads(content))
        files.replace_quickly(path, content)

    monkeypatch.setattr(overview, "replace_quickly", replace_quickly)
    monkeypatch.setattr(overview, "PAUSE_S", 0.0)

    async def turns() -> None:
        for _ in range(20):
            await asyncio.sleep(0)

    async def play() -> None:
        file = StatusFile(tmp_path, lambda **_: json.loads(json.dumps(shown)))
        running = asyncio.create_task(file.run())
        await turns()
        assert len(written) == 1
        for number in range(100):
            shown["sent_bytes"] = number
            shown["link"]["day_bytes"] = number
            file.changed()
            await turns()
        assert len(written) == 1, "260 MB of a card a day"
        shown["link"]["quota_spent"] = True
        file.changed()
        await turns()
        shown["phase"] = "training"
        file.changed()
        await turns()
        assert [found["phase"] for found in written] == ["idle", "idle", "training"]
        running.cancel()

    asyncio.run(play())
    assert (read_status(tmp_path) or {})["sent_bytes"] == 99
    assert (tmp_path / status.FILE).stat().st_mode & 0o777 == 0o600


def test_a_file_that_is_no_status_is_none(tmp_path: Path) -> None:
    assert read_status(tmp_path) is None
    (tmp_path / status.FILE).write_bytes(b"\xff\x00")
    assert read_status(tmp_path) is None


def test_an_error_has_a_time_and_goes_when_it_is_an_hour_old_or_healed(tmp_path: Path) -> None:
    assert last_error("E_DISK: full", 1000.0, 1010.0) == {
        "last_error": "E_DISK: full",
        "last_error_at": 1000.0,
    }
    gone = {"last_error": "", "last_error_at": None}
    assert last_error("E_DISK: full", 1000.0, 1000.0 + status.LASTS_S + 1) == gone
    assert last_error("", 0.0, 5.0) == gone
    database = open_database(tmp_path, "dev-a")
    faults = Faults(Counters(database, "dev-a"))
    database.close()
    faults.note("E_LINK", "connection refused")
    assert faults.last_at > 0
    faults.heal("E_DISK")
    assert faults.last == "E_LINK: connection refused"
    faults.heal("E_LINK")
    assert (faults.last, faults.last_at) == ("", 0.0)


def test_an_old_error_is_not_shown_by_a_status_that_was_written_long_ago(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = {"running": False, "device": "d", "last_error": "E_DISK: full", "last_error_at": 1.0}
    (tmp_path / status.FILE).write_text(json.dumps(told))
    assert main(["status", "--state-dir", str(tmp_path)]) == 1
    assert "E_DISK" not in capsys.readouterr().out
    (tmp_path / status.FILE).write_text(json.dumps(told | {"last_error_at": time.time() - 60}))
    assert main(["status", "--state-dir", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "E_DISK: full" in out
    assert "last_error_at" in out


@pytest.mark.parametrize("output", ["table", "wide", "json", "yaml", "name"])
def test_a_status_has_every_form(tmp_path: Path, capsys: pytest.CaptureFixture[str], output: str) -> None:
    told = {"device": "dev-a", "running": False, "storage_bytes": 65_536, "reason": "", "updated_at": 1.7e9}
    (tmp_path / status.FILE).write_text(json.dumps(told))
    assert main(["status", "--state-dir", str(tmp_path), "-o", output]) == 1
    out = capsys.readouterr().out
    match output:
        case "json" | "yaml":
            assert (json.loads(out) if output == "json" else msgspec.yaml.decode(out))[
                "storage_bytes"
            ] == 65_536
        case "name":
            assert out == "dev-a\n"
        case _:
            assert "64 KiB" in out
            assert ("reason" in out) == (output == "wide")
            assert "1700000000" not in out
