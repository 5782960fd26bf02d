"""What a simulation saw: one value for the report, the command line and the comparison of backends."""

from typing import Final

import msgspec
from msgspec.structs import replace

AWAY: Final = frozenset({"crashed", "left", "away", "stopped"})
"""Moments of a device that is not there."""


class Value(msgspec.Struct, frozen=True, kw_only=True):
    """Base of all parts."""


class Moment(Value, frozen=True, kw_only=True):
    """A device began to do something at this second of the job."""

    at_s: float
    what: str


class DeviceRecord(Value, frozen=True, kw_only=True):
    """One device.

    Attributes:
        rounds: receipted updates.
        busy_s: seconds of training.
        up_bytes, down_bytes: through its link, everything counted.
        moments: what it did and when; empty in large fleets.
    """

    id: str
    profile: str
    rounds: int = 0
    busy_s: float = 0.0
    up_bytes: int = 0
    down_bytes: int = 0
    moments: tuple[Moment, ...] = ()


class RoundRecord(Value, frozen=True, kw_only=True):
    """One round.

    Attributes:
        at_s: second of the job in which it ended.
        held_by: devices whose updates came last, the last one first: who held the round.
    """

    round: int
    state: str
    invited: int
    updates: int
    seconds: float
    at_s: float
    held_by: tuple[str, ...] = ()
    reason: str = ""


class FaultRecord(Value, frozen=True, kw_only=True):
    """Something that was done to the fleet, and how it ended.

    Attributes:
        ended_s: when it was over; None: not before the job.
        how: what became of it, in words.
    """

    at_s: float
    what: str
    device: str = ""
    ended_s: float | None = None
    how: str = ""


class Point(Value, frozen=True, kw_only=True):
    """How good the model of one profile was at a second of the job.

    Attributes:
        figure: accuracy on the held-out samples, or the distance to the hidden weights where training is
            drawn.
        up_bytes, down_bytes: through the links of all devices of the profile until then.
    """

    profile: str
    at_s: float
    version: int
    figure: float
    up_bytes: int
    down_bytes: int


class Record(Value, frozen=True, kw_only=True):
    """One simulated job.

    Attributes:
        figure: what `points` show: "accuracy" or "distance".
        began_s: second at which the job was created, on the clock of the devices' moments.
        job_s: seconds of the job; virtual ones in the virtual backend.
        wall_s, rss_mb: what the simulation took; memory in 10^6 bytes.
        updates: receipted.
        update_bytes: of their frames (virtual).
        last_body_bytes: of the newest sparse stream of every device.
        file_bytes: of the newest version's files by structure.
        blob_bytes: of files that devices fetched, each as often as it was fetched (virtual).
        up_bytes, down_bytes: through all links.
        lost: virtual: updates whose receipt a device has, and that the ledger does not; in real programs:
            updates that the coordinator counts for a device, and that are in no round that ended.
        digests: of the newest weights by structure.
    """

    fleet: str
    backend: str
    scenario: str
    description: str
    seed: int
    job: str
    state: str
    reason: str = ""
    figure: str = "accuracy"
    began_s: float = 0.0
    job_s: float
    wall_s: float
    rss_mb: float = 0.0
    known: int
    updates: int
    update_bytes: int = 0
    last_body_bytes: int = 0
    blob_bytes: int = 0
    up_bytes: int
    down_bytes: int
    lost: int = 0
    digests: dict[str, str]
    file_bytes: dict[str, int] = {}
    rounds: tuple[RoundRecord, ...] = ()
    devices: tuple[DeviceRecord, ...] = ()
    faults: tuple[FaultRecord, ...] = ()
    points: tuple[Point, ...] = ()


def with_ends(record: Record) -> Record:
    """Return the record with words for how every fault ended, as its device's moments tell."""
    moments = {device.id: device.moments for device in record.devices}
    return replace(
        record,
        faults=tuple(
            replace(one, how=_how(one, moments.get(one.device, ()), record)) for one in record.faults
        ),
    )


def _how(fault: FaultRecord, moments: tuple[Moment, ...], record: Record) -> str:
    if not fault.device:
        after = next((one for one in record.rounds if one.at_s > fault.at_s), None)
        return (
            f"round {after.round}: {after.state}, {after.updates} of {after.invited}"
            if after
            else "the job was over"
        )
    over_s = record.began_s + (fault.at_s if fault.ended_s is None else fault.ended_s)
    later = [one for one in moments if one.at_s >= over_s and one.what not in AWAY]
    if not later:
        return (
            "still there: nothing else to do"
            if moments and moments[-1].what not in AWAY
            else "not back before the end"
        )
    words = f"there again after {max(0.0, later[0].at_s - over_s):.1f} s"
    counted = next((one for one in later if one.what == "receipt"), None)
    return f"{words}, next update counted after {counted.at_s - over_s:.1f} s" if counted else words
