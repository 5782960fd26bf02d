"""What a client asks costs what it asks for: a list reads no round, and what ended is read once."""

import asyncio
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import msgspec
import pytest

from liberatai_coordinator.api import jobs, plans, present
from liberatai_coordinator.api.names import not_found
from liberatai_coordinator.api.rounds import MAX_REMEMBERED, EndedRounds
from liberatai_coordinator.config import parse_job
from liberatai_coordinator.fleet.devices import Device
from liberatai_coordinator.jobs.records import Stats
from liberatai_coordinator.service import Service
from liberatai_coordinator.store.ledger import Ledger
from liberatai_coordinator.store.rounds import RoundStore
from liberatai_coordinator.store.rows import RoundRow, RoundSummary, VersionRow
from liberatai_core.contract.messages import Report
from liberatai_core.errors import NotFoundError, StateError

JOB = """
name: digits
data: {input_shape: [2], classes: 4}
structures: [{family: mlp, params: {hidden: 4}}]
rounds: {count: 3}
"""


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    opened = Ledger.open(tmp_path)
    opened.jobs.create("digits", msgspec.json.encode(parse_job(JOB, "job")), ".", 1.0)
    yield opened
    opened.close()


def open_round(ledger: Ledger, number: int, job: str = "digits") -> None:
    invited = msgspec.msgpack.encode([["a"], ["b"]])
    ledger.rounds.open(RoundRow(job=job, round=number, epoch=1, opened_s=float(number), invited=invited))


def publish(ledger: Ledger, number: int, job: str = "digits") -> None:
    ledger.rounds.close(job, number, [])
    ledger.rounds.set_aggregated(job, number, f"v{number}", msgspec.msgpack.encode(Stats(up_bytes=number)))
    ledger.rounds.set_published(job, number)


def test_a_job_of_another_release_is_shown_with_what_can_be_done(ledger: Ledger) -> None:
    ledger.jobs.create("later", b'{"name": "later", "new_key": 1}', ".", 2.0)
    _, job = jobs.summaries(ledger, {})
    assert (job.name, job.state, job.rounds_total) == ("later", "failed", 0)
    assert "another release wrote this job" in job.reason
    view = jobs._view(ledger, EndedRounds(), ledger.jobs.get("later"), {}, "")
    assert (view.state, view.reason, view.rounds, view.lacks) == (job.state, job.reason, (), ())


def test_a_list_of_jobs_reads_no_round(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    open_round(ledger, 1)

    def refuse(*_args: object, **_more: object) -> None:
        raise AssertionError("a round is read")

    for name in ("all", "get", "summaries"):
        monkeypatch.setattr(RoundStore, name, refuse)
    (job,) = jobs.summaries(ledger, {"digits": "waits: 0 of 2 devices"})
    assert (job.name, job.state, job.rounds_total, job.reason) == (
        "digits",
        "waiting",
        3,
        "waits: 0 of 2 devices",
    )


def test_rounds_that_ended_are_read_once_and_the_open_one_again(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    real = RoundStore.summaries

    def noted(store: RoundStore, job: str, *, after: int = 0) -> list[RoundSummary]:
        rows = real(store, job, after=after)
        read.extend(row.round for row in rows)
        return rows

    monkeypatch.setattr(RoundStore, "summaries", noted)
    ended, row = EndedRounds(), ledger.jobs.get("digits")
    open_round(ledger, 1)
    publish(ledger, 1)
    open_round(ledger, 2)
    first = ended.rounds(ledger, row, {2: 1})
    assert [(view.round, view.state, view.invited, view.updates) for view in first] == [
        (1, "published", 2, 0),
        (2, "open", 2, 1),
    ]
    ledger.rounds.abandon("digits", 2, "too few")
    open_round(ledger, 3)
    second = ended.rounds(ledger, row, {})
    assert [view.state for view in second] == ["published", "abandoned", "open"]
    assert ended.rounds(ledger, row, {}) == second
    assert read == [1, 2, 2, 3, 3]


def test_a_job_that_is_created_again_shows_none_of_the_rounds_of_the_old_one(ledger: Ledger) -> None:
    ended, row = EndedRounds(), ledger.jobs.get("digits")
    open_round(ledger, 1)
    publish(ledger, 1)
    assert len(ended.rounds(ledger, row, {})) == 1
    again = type(row)(name=row.name, spec=row.spec, base_dir=row.base_dir, created_s=row.created_s + 1)
    open_round(ledger, 2)
    assert [view.round for view in ended.rounds(ledger, again, {})] == [1, 2]


def test_a_job_counts_only_the_versions_that_it_made_itself(ledger: Ledger) -> None:
    manifest = b"m"
    version = VersionRow(
        model="digits",
        number=0,
        id=sha256(manifest).hexdigest(),
        parent=None,
        manifest=manifest,
        created_s=1.0,
    )
    ledger.versions.add(version)
    (job,) = jobs.summaries(ledger, {})
    assert (job.rounds_done, job.version) == (0, 0)
    ledger.jobs.set_state("digits", "finished")
    ledger.jobs.delete("digits")
    ledger.jobs.create("digits", msgspec.json.encode(parse_job(JOB, "job")), ".", 2.0)
    assert jobs.summaries(ledger, {})[0].rounds_done == 0
    for number in (1, 2):
        manifest = bytes([number])
        version = VersionRow(
            model="digits",
            number=number,
            id=sha256(manifest).hexdigest(),
            parent=version.id,
            manifest=manifest,
            created_s=2.0,
        )
        ledger.versions.add(version)
    (job,) = jobs.summaries(ledger, {})
    assert (job.rounds_done, job.version) == (1, 2)


@pytest.mark.parametrize(("asked", "meant"), [("camera-0l", "camera-01"), ("gatewy", "gateway"), ("zzz", "")])
def test_a_misspelt_name_is_answered_with_the_one_that_is_most_like_it(asked: str, meant: str) -> None:
    error = asyncio.run(not_found(NotFoundError("no device"), asked, ["camera-01", "gateway", "x"]))
    assert str(error) == ("no device" + (f"; did you mean {meant}?" if meant else ""))


def test_a_job_that_is_not_there_is_answered_with_the_one_that_was_meant(ledger: Ledger) -> None:
    asked = jobs.JobOperations(cast("Service", SimpleNamespace(ledger=ledger, runners={})))
    with pytest.raises(NotFoundError, match=r"job digts: .*; did you mean digits\?"):
        asyncio.run(asked.show("digts"))
    with pytest.raises(NotFoundError, match=r"did you mean digits\?"):
        asyncio.run(asked.delete("digts"))


def test_the_plan_of_a_job_of_another_release_says_so(ledger: Ledger) -> None:
    ledger.jobs.create("new", b'{"name": "new", "later": 1}', ".", 2.0)
    asked = plans.PlanOperations(cast("Service", SimpleNamespace(ledger=ledger, runners={})))
    with pytest.raises(StateError, match="job new: another release wrote this job"):
        asyncio.run(asked.show(None, None))
    with pytest.raises(NotFoundError, match=r"did you mean digits\?"):
        asyncio.run(asked.show("digit", None))


def a_report(phase: str, number: int) -> Report:
    return Report(device="a", session=1, phase=phase, job="digits" if number else "", round=number)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("report", "invited", "shown"),
    [
        (None, None, ("", "", 0)),
        (None, ("digits", 3), ("invited", "digits", 3)),
        (a_report("idle", 0), None, ("idle", "", 0)),
        (a_report("idle", 0), ("digits", 3), ("invited", "digits", 3)),
        (a_report("training", 2), None, ("idle", "", 0)),  # its update is here: the round waits no more
        (a_report("failed", 2), None, ("failed", "digits", 2)),
        (a_report("training", 2), ("digits", 3), ("invited", "digits", 3)),
        (a_report("training", 3), ("digits", 3), ("training", "digits", 3)),
        (a_report("gated", 0), ("digits", 3), ("gated", "digits", 3)),
        (a_report("failed", 3), ("digits", 3), ("failed", "digits", 3)),
        (a_report("failed", 2), ("digits", 3), ("invited", "digits", 3)),
        (a_report("failed", 0), ("digits", 3), ("failed", "digits", 3)),
    ],
)
def test_a_device_that_was_invited_and_says_nothing_is_not_shown_as_idle(
    report: Report | None, invited: tuple[str, int] | None, shown: tuple[str, str, int]
) -> None:
    device = Device(id="a", public_key=b"k" * 32, status="approved", report=report)
    view = present.device_view(device, ("online", ""), "", {}, invited)
    assert (view.phase, view.job, view.round) == shown


def test_only_the_jobs_asked_for_last_are_remembered(ledger: Ledger) -> None:
    ended = EndedRounds()
    for number in range(MAX_REMEMBERED + 3):
        name = f"job-{number}"
        ledger.jobs.create(name, b"{}", ".", float(number))
        open_round(ledger, 1, name)
        publish(ledger, 1, name)
        assert len(ended.rounds(ledger, ledger.jobs.get(name), {})) == 1
    assert len(ended) == MAX_REMEMBERED
