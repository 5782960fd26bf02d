"""A coordinator that was put back from a copy asks for its work under new names.

Devices know by its name what they have done, and do nothing twice. What they did for the coordinator of
before, after the copy was made, this one has never seen: it must ask anew, or its rounds would wait for ever.
"""

import msgspec

from liberatai_coordinator.jobs.queue import LIVE
from liberatai_coordinator.jobs.tasks import RUN
from liberatai_coordinator.rounds.round import Invitation
from liberatai_coordinator.store.ledger import Ledger
from liberatai_core.contract.messages import update_id


def renew(ledger: Ledger, run: bytes) -> None:
    """Let all jobs that have not ended ask for new work.

    Who has answered in an open round has answered; its other invitations are replaced.

    Args:
        ledger: opened, and nobody works on it.
        run: new, of 8 bytes.

    Raises:
        DiskError, BusyError: it cannot be written; what was begun may be done again.
    """
    for job in ledger.jobs.all():
        if job.state not in LIVE:
            continue
        invited = {}
        row = ledger.rounds.newest(job.name)
        if row is not None and row.state == "open":
            answered = {device for device, _ in ledger.updates.senders(job.name, row.round)}
            listed = msgspec.msgpack.decode(row.invited, type=list[Invitation])
            renewed = [
                one if one.device in answered else _renewed(one, job.name, row.round, run) for one in listed
            ]
            invited[row.round] = msgspec.msgpack.encode(renewed)
        ledger.rounds.invite_anew(job.name, invited, {RUN: run})


def _renewed(one: Invitation, job: str, number: int, run: bytes) -> Invitation:
    name = update_id(one.device, job, one.round or number, one.base, run)
    return msgspec.structs.replace(one, update_id=name)
