"""Which versions keep their files. What the others were stays in the ledger; their weights go.

Kept are versions with a tag or a variant, a job's first one, the newest ones, every so many, and those that a
running job needs: a device that holds one of them is brought up to date from there.
"""

import logging
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import Final

from liberatai_coordinator.config import Keep
from liberatai_coordinator.store.ledger import Ledger
from liberatai_coordinator.store.repository import Repository

log = logging.getLogger(__name__)

COLLECT_AT: Final = 10
"""Versions that may go before any does: the repository is read through once for all of them."""


def superseded(numbers: Sequence[int], newest: int, keep: Keep, needed: AbstractSet[int]) -> list[int]:
    """Return which of these versions need no files.

    Args:
        numbers: of versions that may go.
        newest: number of the model's newest version.
        keep: how many stay.
        needed: numbers that a running job needs.
    """
    return [
        number
        for number in numbers
        if number <= newest - keep.newest
        and not (keep.every and number % keep.every == 0)
        and number not in needed
    ]


def collect(
    ledger: Ledger, repository: Repository, model: str, keep: Keep, needed: AbstractSet[int]
) -> list[int]:
    """Remove the files of old versions of a model, once there are some; may take a while.

    Returns:
        The numbers of the versions that have none any more.

    Raises:
        DiskError: the disk refuses; the next call tries again.
    """
    newest = ledger.versions.newest(model)
    if newest is None:
        return []
    numbers = superseded(ledger.versions.collectable(model), newest.number, keep, needed)
    if len(numbers) < COLLECT_AT:
        return []
    ledger.versions.set_collected(model, numbers)
    sweep(ledger, repository)
    return numbers


def sweep(ledger: Ledger, repository: Repository) -> int:
    """Remove files that nothing in the ledger needs, e.g. what a crash left; returns the bytes freed.

    Raises:
        DiskError: the disk refuses.
    """
    with repository.holding():
        freed = repository.collect(ledger.versions.needed_blobs())
    if freed:
        log.info("removed %.1f MB of files that no version needs any more", freed / 1e6)
    return freed
