"""What a person sees of the demo while it runs."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Self

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from liberatai_coordinator.client.views import DeviceView, JobView, RoundView
from liberatai_coordinator.demo.examiner import Evaluated
from liberatai_coordinator.pictures.report import percent, size

SHOWN_ROUNDS: Final = 6


@dataclass(slots=True)
class Screen:
    """A live picture on a terminal, one line per round elsewhere."""

    console: Console
    _live: Live | None = None
    _said: int = 0
    _told: set[str] = field(default_factory=set)
    _started_s: float = field(default_factory=time.perf_counter)

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._live = Live(console=self.console, refresh_per_second=4, transient=True)
            self._live.start()
        return self

    def __exit__(self, *_error: object) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, job: JobView, devices: Sequence[DeviceView], evaluated: Mapping[int, Evaluated]) -> None:
        """Show the newest state."""
        if self._live is not None:
            self._live.update(self._picture(job, devices, evaluated))
            return
        rounds = published(job)
        while self._said < len(rounds) and self._said + 1 in evaluated:
            row = rounds[self._said]
            self._said += 1
            self.console.print(_line(row, job.rounds_total, evaluated[self._said]), soft_wrap=True)
        for trouble in _troubles(job, devices):
            if trouble not in self._told:
                self._told.add(trouble)
                self.console.print(escape(trouble), style="yellow", soft_wrap=True)

    def _picture(
        self, job: JobView, devices: Sequence[DeviceView], evaluated: Mapping[int, Evaluated]
    ) -> Group:
        rounds = published(job)
        carried = sum(row.up_bytes + row.down_bytes for row in rounds)
        seconds = time.perf_counter() - self._started_s
        head = Text.assemble(
            ("LiberatAI demo  ", "bold"),
            f"round {min(len(rounds) + 1, job.rounds_total)} of {job.rounds_total}, {job.state}   ",
            (f"{seconds:.0f} s   {size(carried)} on the wire", "dim"),
        )
        troubles = [Text(trouble, "yellow") for trouble in _troubles(job, devices)[-3:]]
        return Group(head, _device_table(devices), _round_table(rounds, evaluated), *troubles)


def _troubles(job: JobView, devices: Sequence[DeviceView]) -> list[str]:
    """Return what went wrong, one line each."""
    failed = [f"{d.id} failed in round {d.round}: {d.reason}" for d in devices if d.phase == "failed"]
    return failed + [f"round {r.round} abandoned: {r.reason}" for r in job.rounds if r.state == "abandoned"]


def _device_table(devices: Sequence[DeviceView]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in ("device", "structure", "doing", "samples"):
        table.add_column(title, justify="right" if title == "samples" else "left", header_style="dim")
    for device in devices:
        doing = device.phase or device.state
        style = {"training": "green", "failed": "red", "lost": "red"}.get(doing, "dim")
        table.add_row(device.id, device.structure or "-", Text(doing, style), str(device.samples))
    return table


def _round_table(rows: Sequence[RoundView], evaluated: Mapping[int, Evaluated]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    names = sorted({name for found in evaluated.values() for name in found.accuracy} - {"ensemble"})
    for title in ("round", "s", "carried", *names, "ensemble"):  # fits 80 columns
        table.add_column(title, justify="right", header_style="dim", no_wrap=True)
    first = max(0, len(rows) - SHOWN_ROUNDS)
    for version, row in enumerate(rows[first:], start=first + 1):
        accuracy = evaluated[version].accuracy if version in evaluated else {}
        shown = [percent(accuracy[name]) if name in accuracy else "…" for name in (*names, "ensemble")]
        table.add_row(
            str(row.round),
            f"{row.seconds:.1f}",
            size(row.up_bytes + row.down_bytes),
            *shown[:-1],
            Text(shown[-1], "bold"),
        )
    return table


def _line(row: RoundView, total: int, evaluated: Evaluated) -> str:
    members = ", ".join(
        f"{name} {percent(share)}" for name, share in sorted(evaluated.accuracy.items()) if name != "ensemble"
    )
    return (
        f"round {row.round:>2}/{total}  {row.seconds:4.1f} s  {row.updates}/{row.invited} updates  "
        f"up {size(row.up_bytes)}  down {size(row.down_bytes)}  "
        f"ensemble {percent(evaluated.accuracy['ensemble'])}  ({members})"
    )


def published(job: JobView) -> list[RoundView]:
    """Return the rounds that made a version, in order: the n-th made version n."""
    return [row for row in job.rounds if row.state == "published"]
