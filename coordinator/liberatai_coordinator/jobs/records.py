"""What the ledger keeps for a job beside its own columns."""

import heapq
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Final

import msgspec
import numpy as np

from liberatai_coordinator.models.evaluation import CentralScores, LocalScores
from liberatai_coordinator.models.updates import decode_update
from liberatai_coordinator.rounds import round as deciding
from liberatai_coordinator.rounds import selection
from liberatai_coordinator.store.ledger import Ledger
from liberatai_coordinator.store.rows import RoundRow, StoredUpdate
from liberatai_core.aggregator import rules

MAX_CONTRIBUTIONS: Final = 20
"""Shown of one device: enough to see a habit, and the rest of a long job stays in the ledger."""


class Contribution(msgspec.Struct, frozen=True, array_like=True):
    """`aggregator.rules.Contribution` of one device; some 30 bytes."""

    verdict: str
    norm: float
    cosine: float


class Stats(msgspec.Struct, frozen=True, kw_only=True):
    """What a finished round took, and how it was merged.

    Attributes:
        rule: by which updates were merged.
        ensemble, use: method that found the weights, and what the guard chose.
        frozen: per structure that merged nothing, why.
        untaught: per structure that teaching made worse, by how much.
        teachers: who taught, in words; absent where nobody chose.
        contributions: per device; in the ledger they lie apart (`parts_of`).
        verdicts: how many devices got which, where contributions lie apart.
        local, central, test: see `evaluation`; absent in rounds of a release that did not know them.
    """

    seconds: float = 0.0
    train_seconds_max: float = 0.0
    teach_seconds: float = 0.0
    up_bytes: int = 0
    down_bytes: int = 0
    guard: str = ""
    rule: str = ""
    ensemble: str = ""
    use: str = ""
    frozen: dict[str, str] = {}
    untaught: dict[str, str] = {}
    contributions: dict[str, Contribution] = {}
    local: LocalScores | None = None
    central: CentralScores | None = None
    test: CentralScores | None = None
    verdicts: dict[str, int] | msgspec.UnsetType = msgspec.UNSET
    teachers: str | msgspec.UnsetType = msgspec.UNSET

    @property
    def merged(self) -> str:
        """How the round was merged, in words."""
        if not self.rule:
            return ""
        counts = self.verdicts or Counter(one.verdict for one in self.contributions.values())
        told = ", ".join(f"{number} {verdict}" for verdict, number in sorted(counts.items()))
        return "; ".join(
            [
                f"{self.rule}: {told}",
                *(f"{sid} frozen: {why}" for sid, why in self.frozen.items()),
                *([self.teachers] if self.teachers else []),
                *(f"{sid} not taught: {why}" for sid, why in self.untaught.items()),
            ]
        )


def kept(contributions: Mapping[str, rules.Contribution]) -> dict[str, Contribution]:
    """Return what the ledger keeps of contributions, by device: seven digits, as float32 has."""
    return {
        device: Contribution(one.verdict, float(f"{one.norm:.7g}"), round(one.cosine, 6))
        for device, one in sorted(contributions.items())
    }


def newest_contributions(ledger: Ledger, device: str) -> list[tuple[str, int, Contribution]]:
    """Return (job, round, what it gave) of a device's newest merged updates, the newest first."""
    by_job = [_contributions(ledger, job.name, device) for job in ledger.jobs.all()]
    newest = heapq.merge(*by_job, key=lambda found: found[0], reverse=True)
    return [found[1:] for found in islice(newest, MAX_CONTRIBUTIONS)]


def _contributions(ledger: Ledger, job: str, device: str) -> Iterator[tuple[float, str, int, Contribution]]:
    """Yield (time of its round, job, round, what it gave) of one job, the newest first."""
    for row in ledger.rounds.newest_first(job):
        given = _contribution(row, device)
        if given is not None:
            yield row.opened_s, job, row.round, given


class _Apart(msgspec.Struct, frozen=True, array_like=True):
    """Contributions of many devices: names and verdicts, then float32 (little-endian), all in one order."""

    devices: tuple[str, ...]
    verdicts: tuple[str, ...]
    norms: bytes
    cosines: bytes


def parts_of(stats: Stats) -> tuple[bytes, bytes]:
    """Return what the ledger keeps of a round: what lists of rounds show, and contributions apart."""
    given = stats.contributions
    if not given:
        return msgspec.msgpack.encode(stats), b""
    verdicts = tuple(one.verdict for one in given.values())
    norms = np.array([one.norm for one in given.values()], "<f4").tobytes()
    cosines = np.array([one.cosine for one in given.values()], "<f4").tobytes()
    apart = _Apart(tuple(given), verdicts, norms, cosines)
    short = msgspec.structs.replace(stats, contributions={}, verdicts=dict(Counter(verdicts)))
    return msgspec.msgpack.encode(short), msgspec.msgpack.encode(apart)


def _contribution(row: RoundRow, device: str) -> Contribution | None:
    if not row.details:  # a round without any, or of a release that kept them with the rest
        return stats_of(row.stats).contributions.get(device)
    apart = msgspec.msgpack.decode(row.details, type=_Apart)
    if device not in apart.devices:
        return None
    place = apart.devices.index(device)
    norm, cosine = (float(np.frombuffer(one, "<f4")[place]) for one in (apart.norms, apart.cosines))
    return Contribution(apart.verdicts[place], float(f"{norm:.7g}"), round(cosine, 6))


def stats_of(stats: bytes) -> Stats:
    """Return what the ledger knows of a round."""
    return msgspec.msgpack.decode(stats, type=Stats) if stats else Stats()


def shortened(invited: bytes) -> bytes:
    """Return what a round that is long over keeps of its invitations: whom it asked itself."""
    listed = msgspec.msgpack.decode(invited, type=list[deciding.Invitation])
    newest = max((one.round for one in listed), default=0)
    return msgspec.msgpack.encode(
        [
            deciding.Invitation(device=one.device, structure="", base=b"", update_id=b"", round=one.round)
            for one in listed
            if one.round in (0, newest)
        ]
    )


def invited_in(row: RoundRow) -> list[deciding.Invitation]:
    """Return the invitations that a round made itself."""
    listed = msgspec.msgpack.decode(row.invited, type=list[deciding.Invitation])
    return [one for one in listed if one.round in (0, row.round)]


def with_round(
    history: selection.History, row: RoundRow, stored: Sequence[StoredUpdate]
) -> selection.History:
    """Return a history with one round more.

    Args:
        history: up to the round before.
        row: the round.
        stored: its updates, with their frames.
    """
    devices = dict(history.devices)
    for one in invited_in(row):
        past = devices.get(one.device, selection.Past())
        devices[one.device] = msgspec.structs.replace(past, invited=past.invited + 1)
    listed = msgspec.msgpack.decode(row.invited, type=list[deciding.Invitation])
    opened = {one.device: one.opened_s or row.opened_s for one in listed}
    for found in stored:
        update = decode_update(found.frame)
        devices[found.device] = msgspec.structs.replace(
            devices.get(found.device, selection.Past()),
            round=row.round,
            loss=update.loss,
            samples=update.samples,
            seconds=max(0.0, found.received_s - opened.get(found.device, row.opened_s)),
        )
    return selection.History(round=row.round, devices=devices)
