"""`liberatai jobs watch`: a job as it goes on, over restarts of the coordinator too."""

import shutil
from collections.abc import Iterator
from typing import Final

from liberatai_coordinator.cli.job_text import ROUND_COLUMNS, job_line, round_line
from liberatai_coordinator.cli.tables import patiently, redraw, rendered, wrapped
from liberatai_coordinator.client.client import Client
from liberatai_coordinator.client.views import JobView

ENDED: Final = frozenset({"finished", "aborted", "failed"})


def watch_lines(client: Client, name: str, interval_s: float) -> JobView:
    """Print one line per change of state; the numbers of an open round are left to the screen."""
    said: dict[int, str] = {}
    said_job: tuple[str, str] | None = None
    for job in _looks(client, name, interval_s):
        for view in job.rounds:
            if said.get(view.round) != view.state:
                said[view.round] = view.state
                print(round_line(view), flush=True)
        if said_job != (job.state, job.reason):
            said_job = (job.state, job.reason)
            print(job_line(job), flush=True)
        if job.state in ENDED:
            return job
    raise AssertionError


def watch_screen(client: Client, name: str, interval_s: float) -> JobView:
    """Draw the newest rounds until the job ends."""
    for job in _looks(client, name, interval_s):
        size = shutil.get_terminal_size()
        rows = job.rounds[-max(3, size.lines - 6) :]
        lines = [wrapped(job_line(job), size.columns)]
        redraw([*lines, *rendered(rows, ROUND_COLUMNS, width=size.columns)] if rows else lines)
        if job.state in ENDED:
            return job
    raise AssertionError


def _looks(client: Client, name: str, interval_s: float) -> Iterator[JobView]:
    return patiently(lambda: client.jobs.show(name), every_s=interval_s)
