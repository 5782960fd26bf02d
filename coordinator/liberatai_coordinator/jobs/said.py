"""What the log says of jobs and rounds: one line when something begins or ends, with its figures."""

import logging
from typing import Final

from liberatai_coordinator.jobs.records import Stats
from liberatai_core.units import count_text, duration_text, size_text

log: Final = logging.getLogger("liberatai_coordinator.jobs")


def job(name: str, words: str) -> None:
    """Say what became of a job."""
    log.info("job %s: %s", name, words, extra={"job": name})


def opened(name: str, number: int, invited: int) -> None:
    """Say that a round asks devices."""
    words = f"{count_text(invited)} device{'s' if invited != 1 else ''} invited"
    log.info("round %d of %s: open, %s", number, name, words, extra={"job": name, "round": number})


def published(name: str, number: int, version: int, answered: tuple[int, int], stats: Stats) -> None:
    """Say that a round made a version, and what that took.

    Args:
        name: of the job.
        number: of the round.
        version: that it made.
        answered: updates, and devices that were invited.
        stats: of the round.
    """
    words = [
        f"published version {version}",
        f"{count_text(answered[0])} of {count_text(answered[1])} updates",
        *([duration_text(stats.seconds)] if stats.seconds else []),  # 0: it was made before a restart
        f"{size_text(stats.up_bytes)} up",
        f"{size_text(stats.down_bytes)} down",
    ]
    judged = stats.test or stats.central
    if judged is not None:
        words.append(f"accuracy {judged.ensemble:.1%}")
    words += [f"{sid} frozen: {why}" for sid, why in stats.frozen.items()]
    log.info(
        "round %d of %s: %s",
        number,
        name,
        ", ".join(words),
        extra={"job": name, "round": number, "version": version},
    )


def abandoned(name: str, number: int, reason: str) -> None:
    """Say that a round made no version, and why."""
    log.warning("round %d of %s: abandoned, %s", number, name, reason, extra={"job": name, "round": number})
