"""Rounds as they are shown, read from the ledger once."""

import threading
from collections import OrderedDict
from collections.abc import Mapping
from itertools import takewhile
from typing import Final

from liberatai_coordinator.api import present
from liberatai_coordinator.client.views import RoundView
from liberatai_coordinator.store.ledger import Ledger
from liberatai_coordinator.store.rows import JobRow, RoundSummary

ENDED: Final = frozenset({"published", "abandoned"})
MAX_REMEMBERED: Final = 4
"""Jobs whose rounds are remembered as they are shown: some kilobytes per round."""


class EndedRounds:
    """Rounds as they are shown, of the jobs that were asked for last.

    What ended never changes: somebody who watches a long job pays for its new rounds only.
    """

    def __init__(self) -> None:
        self._jobs: OrderedDict[tuple[str, float], tuple[RoundView, ...]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Return the number of jobs whose rounds are remembered."""
        return len(self._jobs)

    def rounds(self, ledger: Ledger, row: JobRow, stored: Mapping[int, int]) -> tuple[RoundView, ...]:
        """Return all rounds of a job.

        Args:
            ledger: has them.
            row: the job.
            stored: updates of the open round that are known in memory, by its number.
        """
        job = (row.name, row.created_s)
        with self._lock:
            known = self._jobs.get(job, ())
        after = known[-1].round if known else 0
        views = known + tuple(_round(one, stored) for one in ledger.rounds.summaries(row.name, after=after))
        with self._lock:
            self._jobs[job] = tuple(takewhile(lambda view: view.state in ENDED, views))
            self._jobs.move_to_end(job)
            while len(self._jobs) > MAX_REMEMBERED:
                self._jobs.popitem(last=False)
        return views


def _round(row: RoundSummary, stored: Mapping[int, int]) -> RoundView:
    return present.round_view(row, stored.get(row.round, row.updates))
