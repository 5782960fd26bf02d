"""The status file is written when something changed, and not for counters that move all the time."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from liberatai_agent import files, overview, status
from liberatai_agent.overview import StatusFile
from liberatai_agent.status import read_status


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
