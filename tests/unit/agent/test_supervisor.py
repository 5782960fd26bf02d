"""Whoever stands still is found out, and a machine that slept is not."""

import asyncio

import pytest

from liberatai_agent.health import supervisor
from liberatai_agent.health.supervisor import Signs, StandstillError, Supervisor, stands_still


def signs(**changes: float | bool | None) -> Signs:
    fields = {"connected": True, "moved_s": 1000.0, "keepalive_s": 60.0} | changes
    return Signs(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("found", "now", "word"),
    [
        (signs(), 1239.0, ""),
        (signs(), 1241.0, "link"),
        (signs(connected=False, retry_s=900.0), 2019.0, ""),
        (signs(connected=False, retry_s=900.0), 2021.0, "link"),
        (signs(keepalive_s=1.0), 1029.0, ""),
        (signs(keepalive_s=1.0), 1031.0, "link"),
        (signs(publishing_s=900.0), 1079.0, ""),
        (signs(publishing_s=900.0), 1081.0, "message"),
        (signs(stopping_s=1000.0), 1061.0, "training"),
    ],
)
def test_every_part_must_show_a_sign_of_life(found: Signs, now: float, word: str) -> None:
    what = stands_still(found, now)
    assert word in what
    assert bool(what) == bool(word)


def watch(monkeypatch: pytest.MonkeyPatch, *found: Signs) -> tuple[list[str], BaseException | None]:
    """Run the watch over these signs; return what systemd was told, and how it ended."""
    told: list[str] = []
    left = list(found)

    def next_signs() -> Signs:
        if not left:
            raise asyncio.CancelledError
        return left.pop(0)

    monkeypatch.setattr(supervisor, "notify", told.append)
    monkeypatch.setattr(supervisor, "pause_s", lambda: 0.0)
    monkeypatch.setattr("liberatai_agent.health.supervisor.time.monotonic", lambda: 2000.0)
    try:
        asyncio.run(Supervisor(next_signs).watch())
    except (StandstillError, asyncio.CancelledError) as error:
        return told, error
    return told, None


def test_the_watchdog_is_fed_while_all_is_well_and_not_by_a_part_that_stands_still(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    well, still = signs(moved_s=1999.0), signs(moved_s=1.0)
    assert watch(monkeypatch, well, well)[0] == ["WATCHDOG=1"] * 2
    told, error = watch(monkeypatch, well, still, still)
    assert told == ["WATCHDOG=1"]
    assert isinstance(error, StandstillError)
    told, error = watch(monkeypatch, still, well, still, well)
    assert told == ["WATCHDOG=1"] * 2, "once is a process that was stopped for a while"
    assert not isinstance(error, StandstillError)


def test_a_part_that_crashes_ends_the_agent() -> None:
    async def play() -> None:
        keeper = Supervisor(signs)

        async def broken() -> None:
            raise ValueError("a bug")

        keeper.run_part(broken())
        await keeper.wait()
        await keeper.close()
        keeper.require_no_crash()

    with pytest.raises(ValueError, match="a bug"):
        asyncio.run(play())
