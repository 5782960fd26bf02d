"""`liberatai jobs watch`: a job as it goes on."""

# ruff: noqa: PLC0415 - a command imports what it needs when it runs, see `cli`

import time
from typing import Final

from liberatai_coordinator.cli.job_text import ROUND_COLUMNS, job_line, round_line
from liberatai_coordinator.cli.tables import plain, rich_table
from liberatai_coordinator.client.client import Client
from liberatai_coordinator.client.views import JobView

ENDED: Final = frozenset({"finished", "aborted", "failed"})


def watch_lines(client: Client, name: str, interval_s: float) -> JobView:
    """Print one line per change of state; the numbers of an open round are left to the screen."""
    said: dict[int, str] = {}
    said_job: tuple[str, str] | None = None
    while True:
        job = client.jobs.show(name)
        for view in job.rounds:
            if said.get(view.round) != view.state:
                said[view.round] = view.state
                print(round_line(view), flush=True)
        if said_job != (job.state, job.reason):
            said_job = (job.state, job.reason)
            print(job_line(job), flush=True)
        if job.state in ENDED:
            return job
        time.sleep(interval_s)


def watch_screen(client: Client, name: str, interval_s: float) -> JobView:
    """Draw the newest rounds until the job ends."""
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    with Live(refresh_per_second=4) as live:
        while True:
            job = client.jobs.show(name)
            rows = job.rounds[-max(3, live.console.height - 6) :]
            live.update(Group(Text(job_line(job)), rich_table(rows, plain(ROUND_COLUMNS))), refresh=True)
            if job.state in ENDED:
                return job
            time.sleep(interval_s)
