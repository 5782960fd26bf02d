"""The agent's rules, as lists of events: late, doubled, lost and hostile ones included."""

import math
from typing import Any, TypeVar

import pytest
from msgspec.structs import replace

from liberatai_agent import actions as do
from liberatai_agent import events as on
from liberatai_agent import session as s
from liberatai_agent.session.state import final_of
from liberatai_core.contract.messages import (
    SPARSE_METHODS,
    BlobRef,
    Cancel,
    Capability,
    Receipt,
    Step,
    Task,
    TaskSpec,
    update_id,
)
from liberatai_core.contract.topics import blob_id
from liberatai_core.structure import DataContract, Structure, Tensor

STRUCTURE = Structure(family="mlp", params={}, tensors=(Tensor(name="w", shape=(4,)),))
DATA = DataContract(input_shape=(4,), classes=2)
Kind = TypeVar("Kind")
RESULT = on.TrainingResult(body=b"body", residual=b"rest", samples=7)


def a_step(version: int, size: int = 100) -> Step:
    name = f"{version}".encode()
    return Step(
        version=version,
        blob=BlobRef(blob=blob_id(name), size_bytes=size),
        digest=name.ljust(16, b"."),
    )


def a_spec(**changes: Any) -> TaskSpec:
    fields: dict[str, Any] = {"job": "digits", "structure": STRUCTURE, "data": DATA}
    return TaskSpec(**(fields | changes))


SPEC = BlobRef(blob=blob_id(b"spec"), size_bytes=4)


def a_task(number: int = 1, epoch: int = 1, job: str = "digits", **changes: Any) -> Task:
    fields: dict[str, Any] = {
        "epoch": epoch,
        "coordinator": "co1",
        "device": "dev",
        "job": job,
        "round": number,
        "spec": SPEC,
        "density": 0.05,
        "steps": (a_step(number - 1),),
    } | changes
    base = fields["steps"][-1].digest if fields["steps"] else fields["held"]
    return Task(**({"task_id": update_id("dev", job, number, base)} | fields))


def a_cancel(number: int = 1, epoch: int = 1, job: str = "digits", **changes: Any) -> Cancel:
    return Cancel(device="dev", epoch=epoch, coordinator="co1", job=job, round=number, **changes)


def a_receipt(uid: bytes, accepted: bool = True, **changes: Any) -> on.ReceiptArrived:
    return on.ReceiptArrived(receipt=Receipt(device="dev", update_id=uid, accepted=accepted, **changes))


class Play:
    """Feeds events and remembers all actions."""

    def __init__(self, *events: on.Happened, spec: TaskSpec | None = None) -> None:
        self.session = s.Session(device="dev")
        self.spec = spec or a_spec()
        self.log: list[do.Action] = []
        self(*events)

    def __call__(self, *events: on.Happened) -> list[do.Action]:
        """Return what follows but reports; a spec that is asked for is read at once, as the service does."""
        new: list[do.Action] = []
        waiting = list(events)
        while waiting:
            self.session, actions = s.step(self.session, waiting.pop(0))
            new += actions
            reads = [action.blob for action in actions if isinstance(action, do.ReadSpec)]
            waiting[:0] = [on.SpecRead(blob=blob, spec=self.spec) for blob in reads]
        self.log += new
        return [action for action in new if not isinstance(action, do.PublishReport)]

    def of(self, kind: type[Kind]) -> list[Kind]:
        return [action for action in self.log if isinstance(action, kind)]

    @property
    def phase(self) -> str:
        return s.report_of(self.session).phase


def of(actions: list[do.Action], kind: type[Kind]) -> list[Kind]:
    return [action for action in actions if isinstance(action, kind)]


def online(spec: TaskSpec | None = None, **started: Any) -> Play:
    begin = on.Started(**started)
    return Play(
        on.Tick(now_s=0.0), begin, on.LinkUp(), on.CoordinatorChanged(state="online", epoch=1), spec=spec
    )


def stored(task: Task) -> list[on.BlobStored]:
    """Return the arrival of every blob that a task names."""
    return [on.BlobStored(blob=blob) for blob in (SPEC.blob, *(step.blob.blob for step in task.steps))]


def until_sent(task: Task, play: Play | None = None) -> Play:
    play = play or online()
    play(on.TaskArrived(task=task), *stored(task))
    play(
        on.Trained(update_id=task.task_id, result=RESULT),
        on.OutboxStored(update_id=task.task_id),
    )
    return play


def test_one_round_goes_through_all_phases_in_order() -> None:
    task, play = a_task(), online()
    assert play.phase == "idle"
    got = play(on.TaskArrived(task=task))
    assert [type(action) for action in got[:3]] == [do.DropBlobs, do.WarmTrainer, do.FetchBlobs]
    assert play.phase == "fetching"
    assert of(play(*stored(task)), do.StartTraining) == [
        do.StartTraining(task=task, spec=a_spec(), path=task.steps, update_id=task.task_id)
    ]
    assert play.phase == "training"
    got = play(on.Trained(update_id=task.task_id, result=RESULT))
    assert of(got, do.StoreUpdate)
    assert not of(got, do.SendUpdate), "sent before it was stored"
    assert of(play(on.OutboxStored(update_id=task.task_id)), do.SendUpdate)
    assert play.phase == "sending"
    assert of(play(a_receipt(task.task_id)), do.Forget) == [do.Forget(update_id=task.task_id)]
    assert play.phase == "idle"


def test_a_task_that_comes_twice_is_done_once() -> None:
    task, play = a_task(), online()
    play(on.TaskArrived(task=task), on.TaskArrived(task=task), *stored(task), on.TaskArrived(task=task))
    assert len(play.of(do.StartTraining)) == 1
    assert len(play.of(do.FetchBlobs)) == 1


def test_a_task_whose_update_waits_is_answered_with_that_update() -> None:
    task = a_task()
    play = until_sent(task)
    got = play(on.TaskArrived(task=task))
    assert of(got, do.SendUpdate) == [do.SendUpdate(update_id=task.task_id)]
    assert not of(got, do.StartTraining)


def test_a_finished_task_is_not_done_again_even_after_a_restart() -> None:
    task = a_task()
    play = until_sent(task)
    play(a_receipt(task.task_id))
    assert not play(on.TaskArrived(task=task))
    again = Play(on.Started(finished=(task.task_id,)), on.LinkUp())
    assert not of(again(on.TaskArrived(task=task)), do.FetchBlobs)


def test_after_a_restart_the_update_of_the_outbox_is_sent_and_the_task_not_trained() -> None:
    task = a_task()
    unsent = on.Unsent(update_id=task.task_id, job="digits", round=1)
    play = Play(on.Started(unsent=(unsent,), finished=(task.task_id,)))
    assert of(play(on.LinkUp()), do.SendUpdate)
    play(on.TaskArrived(task=task))
    assert not play.of(do.StartTraining)


def test_a_new_round_stops_the_training_of_the_old_one() -> None:
    first, second, play = a_task(1), a_task(2), online()
    play(on.TaskArrived(task=first), *stored(first))
    got = play(on.TaskArrived(task=second))
    assert of(got, do.StopTraining)
    assert of(got, do.FetchBlobs)
    late = play(on.Trained(update_id=first.task_id, result=RESULT))
    assert not of(late, do.StoreUpdate), "a result nobody waits for was stored"
    assert of(play(*stored(second)), do.StartTraining)[0].task == second


def test_a_lower_epoch_is_ignored_and_reported() -> None:
    play = online()
    play(on.TaskArrived(task=a_task(2, epoch=5)))
    for event in (
        on.TaskArrived(task=a_task(3, epoch=4)),
        on.CancelArrived(cancel=a_cancel(9, epoch=4)),
        on.CoordinatorChanged(state="lost", epoch=4),
    ):
        got = play(event)
        assert [e.code for e in of(got, do.Emit)] == ["E_REPLAY"]
        assert play.session.task is not None
        assert play.session.task.round == 2
        assert not play.session.away
    assert play.of(do.RememberEpoch) == [do.RememberEpoch(epoch=1), do.RememberEpoch(epoch=5)]


def test_the_end_of_an_old_job_that_stands_at_the_broker_is_no_news_at_every_connection() -> None:
    """A job was aborted, the coordinator started anew: its old word stays there for whoever connects."""
    play = Play(on.Started(epoch=2), on.LinkUp())
    got = play(on.CancelArrived(cancel=a_cancel(9, epoch=1, job="old")))
    assert got == []
    assert play.session.stale == 0, "the device would be shown as gated"
    play(on.TaskArrived(task=a_task(2, epoch=2)))
    assert play(on.CancelArrived(cancel=a_cancel(9, epoch=1, job="old"))) == []
    assert play.session.task is not None


def test_the_epoch_is_fenced_across_restarts() -> None:
    play = Play(on.Started(epoch=7), on.LinkUp())
    assert of(play(on.TaskArrived(task=a_task(epoch=6))), do.Emit)[0].code == "E_REPLAY"


def test_a_restarted_coordinator_that_repeats_the_task_does_not_restart_the_training() -> None:
    task, play = a_task(epoch=1), online()
    play(on.TaskArrived(task=task), *stored(task))
    newer = a_task(epoch=2)
    got = play(on.TaskArrived(task=newer))
    assert not of(got, do.StopTraining)
    stores = of(play(on.Trained(update_id=task.task_id, result=RESULT)), do.StoreUpdate)
    assert stores[0].task.epoch == 2


def test_an_update_is_resent_with_doubling_pauses_until_a_receipt_comes() -> None:
    task = a_task()
    play = until_sent(task)
    sent_at = [now for now in range(1, 400) if of(play(on.Tick(now_s=float(now))), do.SendUpdate)]
    assert sent_at == [5, 15, 35, 75, 155, 275, 395]
    play(a_receipt(task.task_id))
    assert not any(play(on.Tick(now_s=t)) for t in (600.0, 900.0))


def test_everything_is_resent_when_the_link_or_the_coordinator_comes_back() -> None:
    task = a_task()
    play = until_sent(task)
    play(on.LinkDown())
    assert not play(on.Tick(now_s=1000.0)), "sent without a connection"
    assert of(play(on.LinkUp()), do.SendUpdate)
    play(on.CoordinatorChanged(state="lost", epoch=1))
    assert of(play(on.CoordinatorChanged(state="online", epoch=1)), do.SendUpdate)
    assert of(play(on.CoordinatorChanged(state="online", epoch=2)), do.SendUpdate), "a new coordinator"


def test_uploads_are_held_while_the_coordinator_is_away() -> None:
    play, task = online(), a_task()
    play(on.CoordinatorChanged(state="lost", epoch=1))
    until_sent(task, play)
    assert not play.of(do.SendUpdate)
    assert not of(play(on.Tick(now_s=60.0)), do.SendUpdate)
    # Its word may have been lost: after two minutes the broker's queue gets the update anyway.
    assert of(play(on.Tick(now_s=121.0)), do.SendUpdate)


def test_e_dup_is_a_success() -> None:
    task = a_task()
    play = until_sent(task)
    got = play(a_receipt(task.task_id, accepted=False, code="E_DUP"))
    assert of(got, do.Forget)
    assert not of(got, do.RestoreResidual)


@pytest.mark.parametrize("code", ["E_ROUND_CLOSED", "E_BASE_MODEL", "E_NORM", "E_QUOTA"])
def test_a_refused_update_is_dropped_counted_and_its_content_kept_for_learning(code: str) -> None:
    task = a_task()
    play = until_sent(task)
    got = play(a_receipt(task.task_id, accepted=False, code=code))
    assert of(got, do.RestoreResidual) == [do.RestoreResidual(update_id=task.task_id)]
    assert [e.code for e in of(got, do.Emit)] == [code]
    assert dict(play.session.refusals) == {code: 1}
    assert not play.session.pending


def test_an_update_in_whose_place_another_was_counted_is_not_added_again() -> None:
    task = a_task()
    got = until_sent(task)(a_receipt(task.task_id, accepted=False, code="E_DUP_CONFLICT"))
    assert of(got, do.Forget)
    assert not of(got, do.RestoreResidual)


def test_a_refusal_with_retry_keeps_the_update_and_tries_later() -> None:
    task = a_task()
    play = until_sent(task)
    got = play(a_receipt(task.task_id, accepted=False, code="E_BUSY", retry=True))
    assert not of(got, do.Forget) + of(got, do.RestoreResidual)
    assert of(play(on.Tick(now_s=30.0)), do.SendUpdate)


def test_a_receipt_for_nothing_we_have_is_ignored() -> None:
    assert online()(a_receipt(b"x" * 16)) == []
    task = a_task()
    play = until_sent(task)
    play(a_receipt(task.task_id))
    assert play(a_receipt(task.task_id)) == [], "a doubled receipt"


def test_a_credit_sends_chunks_and_restarts_the_timer() -> None:
    task = a_task()
    play = until_sent(task)
    play(on.Tick(now_s=4.0))


def test_cancel_stops_the_round_it_names_and_no_later_one() -> None:
    task, play = a_task(2), online()
    play(on.TaskArrived(task=task), *stored(task))
    assert not of(play(on.CancelArrived(cancel=a_cancel(1))), do.StopTraining)
    assert not of(play(on.CancelArrived(cancel=a_cancel(2, job="other"))), do.StopTraining)
    assert of(play(on.CancelArrived(cancel=a_cancel(2))), do.StopTraining)
    assert play.phase == "idle"
    assert not play(on.Trained(update_id=task.task_id, result=RESULT))


def test_cancel_brings_the_finished_model_once() -> None:
    final = (a_step(7), a_step(8))
    play = online()
    cancel = on.CancelArrived(cancel=a_cancel(8, final=final))
    got = play(cancel)
    assert {r.blob for r in of(got, do.FetchBlobs)[0].refs} == {step.blob.blob for step in final}
    assert not play(cancel), "a doubled cancel"
    play(*(on.BlobStored(blob=step.blob.blob) for step in final))
    assert play.phase == "idle"
    assert final_of(play.session.work) == final


def test_a_closed_gate_holds_the_training_and_an_open_one_starts_it() -> None:
    task, play = a_task(), online()
    play(on.GateChanged(open=False, reason="90 °C"), on.TaskArrived(task=task))
    assert not of(play(*stored(task)), do.StartTraining)
    assert (play.phase, s.report_of(play.session).reason) == ("gated", "90 °C")
    assert of(play(on.GateChanged(open=True)), do.StartTraining)
    assert of(play(on.GateChanged(open=False, reason="battery")), do.StopTraining)
    assert of(play(on.GateChanged(open=True)), do.StartTraining)


def test_the_deadline_stops_training_and_fails_the_task() -> None:
    task, play = a_task(), online(a_spec(deadline_s=10.0))
    play(on.TaskArrived(task=task), *stored(task))
    assert not of(play(on.Tick(now_s=10.0)), do.StopTraining)
    got = play(on.Tick(now_s=10.1))
    assert of(got, do.StopTraining)
    assert [e.code for e in of(got, do.Emit)] == ["E_TRAIN"]
    assert play.phase == "failed"


def test_training_waits_for_all_blobs_and_fetches_lost_ones_again() -> None:
    keyframe, delta = a_step(1), a_step(9)
    task = a_task(2, steps=(keyframe, delta))
    play = online()
    play(on.TaskArrived(task=task))
    assert not of(play(*stored(task)[:-1]), do.StartTraining)
    play(on.BlobFailed(blob=delta.blob.blob, code="E_NOT_FOUND", text="not there"))
    assert (play.phase, s.report_of(play.session).reason) == ("fetching", "E_NOT_FOUND: not there")
    got = play(on.Tick(now_s=5.0))
    assert of(got, do.FetchBlobs)[0].refs == (delta.blob,)
    assert of(play(on.BlobStored(blob=delta.blob.blob)), do.StartTraining)


def after_round_one() -> tuple[Play, Task]:
    first = a_task(1)
    play = until_sent(first)
    play(a_receipt(first.task_id))
    return play, first


def test_the_next_round_fetches_only_what_leads_on_from_what_is_here() -> None:
    play, first = after_round_one()
    (told,) = play.of(do.KeepPath)
    assert told.path == first.steps
    assert told.spec is not None
    delta = a_step(7)
    second = a_task(8, held=first.base, steps=(delta,))
    got = play(on.TaskArrived(task=second))
    assert of(got, do.FetchBlobs) == [do.FetchBlobs(refs=(delta.blob,))], (
        "the spec is known, the keyframe here"
    )
    kept = {SPEC.blob, delta.blob.blob, first.steps[0].blob.blob}
    assert of(got, do.DropBlobs) == [do.DropBlobs(keep=frozenset(kept))]
    started = of(play(on.BlobStored(blob=delta.blob.blob)), do.StartTraining)
    assert started[0].path == (*first.steps, delta)
    done = on.Trained(update_id=second.task_id, result=RESULT), on.OutboxStored(update_id=second.task_id)
    got = play(*done)
    kinds = [type(action) for action in got]
    assert kinds.index(do.KeepPath) < kinds.index(do.SendUpdate), (
        "the coordinator goes on from what is stored"
    )
    assert play.session.path == (*first.steps, delta)


def test_a_task_may_go_on_from_any_point_of_the_path() -> None:
    """The update of the last round was refused: the coordinator goes on from the one before."""
    path = (a_step(0), a_step(3), a_step(5))
    play = online(path=path)
    merged = a_step(6)
    task = a_task(7, held=path[1].digest, steps=(merged,))
    play(on.TaskArrived(task=task))
    assert of(play(*stored(task)), do.StartTraining)[0].path == (path[0], path[1], merged)


def test_a_task_that_starts_where_the_device_is_fetches_nothing_but_its_spec() -> None:
    path = (a_step(0), a_step(3))
    play = online(path=path)
    task = a_task(4, held=path[1].digest, steps=())
    got = play(on.TaskArrived(task=task))
    assert of(got, do.FetchBlobs) == [do.FetchBlobs(refs=(SPEC,))]
    assert of(play(on.BlobStored(blob=SPEC.blob)), do.StartTraining)[0].path == path


def test_what_is_not_held_is_asked_for_until_the_whole_path_comes() -> None:
    play = online(path=(a_step(0),))
    task = a_task(4, held=b"unknown".ljust(16), steps=(a_step(3),))
    got = play(on.TaskArrived(task=task))
    assert [(e.name, e.code) for e in of(got, do.Emit)] == [("base_missing", "E_BASE")]
    assert not of(got, do.FetchBlobs)
    assert play.phase == "fetching"
    assert of(play(on.Tick(now_s=6.0)), do.Emit), "the first word may have been lost"
    play(on.LinkDown(), on.LinkUp())
    assert of(play(on.TaskArrived(task=task)), do.Emit), "the retained task comes again"
    whole = a_task(4, steps=(a_step(9), a_step(3)))
    assert whole.task_id == task.task_id
    assert len(of(play(on.TaskArrived(task=whole)), do.FetchBlobs)[0].refs) == 3
    assert of(play(*stored(whole)), do.StartTraining)[0].path == whole.steps


def test_an_old_path_stays_until_the_new_one_is_worked_from_if_there_is_room() -> None:
    old, fresh = (a_step(0, 60), a_step(1, 30)), (a_step(5, 80),)
    for storage, kept in ((200, {*old, *fresh}), (100, {*fresh})):
        play = online(path=old, storage_bytes=storage)
        drop = of(play(on.TaskArrived(task=a_task(6, steps=fresh))), do.DropBlobs)[0]
        assert drop.keep == {SPEC.blob} | {step.blob.blob for step in kept}


def test_a_rotten_file_on_a_path_asks_for_the_whole_path_once() -> None:
    play = online(path=(a_step(0),))
    task = a_task(4, held=a_step(0).digest, steps=(a_step(3),))
    failed = on.TrainingFailed(update_id=task.task_id, code="E_DIGEST", text="rotten")
    play(on.TaskArrived(task=task), *stored(task))
    got = play(failed)
    assert of(got, do.DropBlobs) == [do.DropBlobs(keep=frozenset({SPEC.blob}))]
    assert [e.code for e in of(got, do.Emit)] == ["E_BASE"]
    whole = a_task(4, steps=(a_step(9), a_step(3)))
    play(on.TaskArrived(task=whole), *stored(whole))
    assert [e.code for e in of(play(failed), do.Emit)] == ["E_DIGEST"]
    assert play.phase == "failed"


def test_the_final_model_goes_on_from_the_path_and_becomes_it() -> None:
    path = (a_step(0), a_step(3))
    play = online(path=path)
    cancel = on.CancelArrived(cancel=a_cancel(9, held=path[1].digest, final=(a_step(9),)))
    assert of(play(cancel), do.FetchBlobs)[0].refs == (a_step(9).blob,)
    assert [one.path for one in of(play(on.BlobStored(blob=a_step(9).blob.blob)), do.KeepPath)] == [
        (*path, a_step(9))
    ]
    assert final_of(play.session.work) == (*path, a_step(9))
    assert not play(cancel), "a doubled cancel"
    again = online(path=(*path, a_step(9)))
    got = again(on.CancelArrived(cancel=a_cancel(9, held=path[1].digest, final=(a_step(9),))))
    assert final_of(again.session.work) == (*path, a_step(9)), "the retained word after a restart"
    assert not of(got, do.Emit)


def test_the_path_to_the_final_model_is_asked_for_until_it_comes_and_more_and_more_rarely() -> None:
    """A new card; the coordinator is down, or restarts, when the device asks for the first time."""
    play, whole = online(), (a_step(0), a_step(9))
    cancel = on.CancelArrived(cancel=a_cancel(9, held=a_step(3).digest, final=(a_step(9),)))
    got = play(cancel)
    assert [(e.name, e.code) for e in of(got, do.Emit)] == [("base_missing", "E_BASE")]
    assert (play.phase, not of(got, do.FetchBlobs)) == ("fetching", True)
    asked = [now for now in range(1, 86_400, 5) if of(play(on.Tick(now_s=float(now))), do.Emit)]
    assert asked[0] <= 10, "the first word may have been lost"
    assert len(asked) < 40, "nothing ends it, so it must not cost much"
    got = play(on.CancelArrived(cancel=a_cancel(9, final=whole)))
    assert of(got, do.FetchBlobs)[0].refs == tuple(step.blob for step in whole)
    play(*(on.BlobStored(blob=step.blob.blob) for step in whole))
    assert (play.session.path, play.phase) == (whole, "idle")
    assert not play(on.Tick(now_s=1e6)), "the question is answered"


def test_a_task_ends_the_questions_for_the_final_model_and_is_worked_on() -> None:
    play, task = online(), a_task(10)
    play(on.CancelArrived(cancel=a_cancel(9, held=a_step(3).digest, final=(a_step(9),))))
    until_sent(task, play)
    assert not of(play(on.Tick(now_s=4.0)), do.Emit)
    assert not of(play(on.Tick(now_s=1e5)), do.Emit)


def test_a_final_model_that_is_here_stays_while_the_path_to_another_is_asked_for() -> None:
    path = (a_step(0), a_step(3))
    play = online(path=path)
    play(on.CancelArrived(cancel=a_cancel(9, held=path[0].digest, final=path[1:])))
    play(on.BlobStored(blob=path[1].blob.blob))
    assert final_of(play.session.work) == path
    play(on.CancelArrived(cancel=a_cancel(4, job="other", held=a_step(7).digest, final=(a_step(8),))))
    assert final_of(play.session.work) == path
    play(on.CancelArrived(cancel=a_cancel(9, held=path[0].digest, final=path[1:])))
    assert not of(play(on.Tick(now_s=1e5)), do.Emit)


def test_a_task_that_grows_beyond_the_storage_asks_for_the_whole_path_before_it_fails() -> None:
    """The storage has shrunk since the path was fetched; keyframe and deltas anew are shorter."""
    path = (a_step(0, 600), a_step(3, 300))
    play = online(path=path, storage_bytes=1000)
    task = a_task(7, held=path[1].digest, steps=(a_step(6, 200),))
    got = play(on.TaskArrived(task=task))
    assert [(e.name, e.code) for e in of(got, do.Emit)] == [("base_missing", "E_BASE")]
    assert "1100 bytes, 1000 are allowed" in s.report_of(play.session).reason
    assert not of(got, do.FetchBlobs)
    again = of(play(on.Tick(now_s=6.0)), do.Emit)
    assert ["1100 bytes" in e.text for e in again] == [True], "the first word may have been lost"
    whole = a_task(7, steps=(a_step(5, 700), a_step(6, 200)))
    play(on.TaskArrived(task=whole))
    assert of(play(*stored(whole)), do.StartTraining)[0].path == whole.steps
    too_long = a_task(7, steps=(a_step(5, 900), a_step(6, 200)))
    fails = online(path=path, storage_bytes=1000)
    assert [e.code for e in of(fails(on.TaskArrived(task=task)), do.Emit)] == ["E_BASE"]
    assert [e.code for e in of(fails(on.TaskArrived(task=too_long)), do.Emit)] == ["E_QUOTA"]
    assert not fails(on.Tick(now_s=1e5)), "it has failed"


def test_a_final_model_that_grows_beyond_the_storage_asks_for_the_whole_path_before_it_is_given_up() -> None:
    path = (a_step(0, 600), a_step(3, 300))
    play = online(path=path, storage_bytes=1000)
    grown = a_cancel(9, held=path[1].digest, final=(a_step(9, 200),))
    got = play(on.CancelArrived(cancel=grown))
    assert [(e.name, e.code) for e in of(got, do.Emit)] == [("base_missing", "E_BASE")]
    got = play(on.CancelArrived(cancel=a_cancel(9, final=(a_step(9, 2000),))))
    assert [(e.name, e.code) for e in of(got, do.Emit)] == [("final_model", "E_QUOTA")]
    assert not play(on.Tick(now_s=1e5)), "given up"
    assert play.phase == "idle"


def test_left_overs_that_cannot_be_used_are_told_and_the_training_goes_on() -> None:
    task, play = a_task(), online()
    play(on.TaskArrived(task=task), *stored(task))
    got = play(on.LeftoverDropped(code="E_CODEC", text="residual: damaged"))
    assert [(e.name, e.code, e.text) for e in of(got, do.Emit)] == [
        ("residual_dropped", "E_CODEC", "residual: damaged")
    ]
    assert of(play(on.Trained(update_id=task.task_id, result=RESULT)), do.StoreUpdate)


def test_a_spec_that_cannot_be_read_is_fetched_again_and_one_of_nonsense_fails_the_task() -> None:
    task, play = a_task(), online()
    session = play.session
    events: list[on.Happened] = [on.TaskArrived(task=task), *stored(task)]
    for event in events:
        session, actions = s.step(session, event)
    assert of(list(actions), do.ReadSpec) == [do.ReadSpec(blob=SPEC.blob)]
    waiting, _ = s.step(session, on.BlobFailed(blob=SPEC.blob, code="E_DIGEST", text="rotten"))
    _, actions = s.step(waiting, on.Tick(now_s=6.0))
    assert of(list(actions), do.FetchBlobs)[0].refs == (SPEC,)
    failed, _ = s.step(session, on.BlobFailed(blob=SPEC.blob, code="E_SCHEMA", text="nonsense"))
    assert s.report_of(failed).phase == "failed"


@pytest.mark.parametrize(
    ("machine", "changes", "code"),
    [
        ({"tier": "observe"}, {}, "E_TIER"),
        ({"storage_bytes": 99}, {}, "E_QUOTA"),
    ],
)
def test_a_task_that_does_not_fit_fails_with_its_code_and_fetches_nothing(
    machine: dict[str, Any], changes: dict[str, Any], code: str
) -> None:
    play = Play(on.Started(**machine), on.LinkUp())
    got = play(on.TaskArrived(task=a_task(**changes)))
    assert [e.code for e in of(got, do.Emit)] == [code]
    assert not of(got, do.FetchBlobs)
    assert s.report_of(play.session).reason.startswith(code)


@pytest.mark.parametrize(("spec", "code"), [(a_spec(codec="gzip"), "E_CODEC"), (a_spec(job="x"), "E_SCHEMA")])
def test_a_spec_of_another_method_or_job_fails_the_task(spec: TaskSpec, code: str) -> None:
    task, play = a_task(), online(spec)
    got = play(on.TaskArrived(task=task), *stored(task))
    assert [e.code for e in of(got, do.Emit)] == [code]
    assert not of(got, do.StartTraining)


def test_a_task_that_is_too_large_for_the_device_fails_before_anything_is_started() -> None:
    wide = Structure("mlp", {"hidden": 1}, (Tensor("w", (16_000_000,)),))
    task, play = a_task(), online(a_spec(structure=wide))
    play(looked(memory_bytes=512 << 20))
    got = play(on.TaskArrived(task=task), *stored(task))
    assert [e.code for e in of(got, do.Emit)] == ["E_MEMORY"]
    assert not of(got, do.StartTraining)
    assert play.phase == "failed"


def test_the_agent_knows_exactly_the_methods_that_there_are() -> None:
    from liberatai_core.sparsifier.methods import METHODS

    assert set(SPARSE_METHODS) == set(METHODS)


def test_a_fault_in_the_data_is_reported_while_idle() -> None:
    play = Play(on.Started(fault="E_DATA: no such file"), on.LinkUp())
    play(on.Tick(now_s=0.5))
    assert play.of(do.PublishReport)[-1] == do.PublishReport(phase="failed", reason="E_DATA: no such file")
    play(on.MachineChanged(tier="full", storage_bytes=1 << 30))
    assert play.phase == "idle"


def test_a_wrong_digest_fetches_the_whole_path_once_more_and_then_fails() -> None:
    task, play = a_task(), online()
    play(on.TaskArrived(task=task), *stored(task))
    failed = on.TrainingFailed(update_id=task.task_id, code="E_DIGEST", text="keyframe")
    got = play(failed)
    assert of(got, do.DropBlobs) == [do.DropBlobs(keep=frozenset({SPEC.blob}))]
    assert of(got, do.FetchBlobs)
    play(*stored(task))
    got = play(failed)
    assert [e.code for e in of(got, do.Emit)] == ["E_DIGEST"]
    assert play.phase == "failed"


def test_a_killed_training_is_tried_again_twice_and_faulty_data_never() -> None:
    task, play = a_task(), online()
    play(on.TaskArrived(task=task), *stored(task))
    killed = on.TrainingFailed(update_id=task.task_id, code="E_INTERNAL", text="signal 9")
    play(killed)
    assert of(play(on.Tick(now_s=6.0)), do.StartTraining)
    play(killed)
    assert of(play(on.Tick(now_s=30.0)), do.StartTraining)
    assert [e.code for e in of(play(killed), do.Emit)] == ["E_INTERNAL"]
    play = online()
    play(on.TaskArrived(task=task), *stored(task))
    got = play(on.TrainingFailed(update_id=task.task_id, code="E_DATA", text="no such file"))
    assert [e.code for e in of(got, do.Emit)] == ["E_DATA"]


def test_a_full_disk_keeps_the_result_and_stores_it_when_there_is_space() -> None:
    task, play = a_task(), online()
    play(on.TaskArrived(task=task), *stored(task), on.Trained(update_id=task.task_id, result=RESULT))
    play(on.StoreFailed(update_id=task.task_id, code="E_DISK", text="full"))
    assert "E_DISK" in s.report_of(play.session).reason
    assert of(play(on.Tick(now_s=6.0)), do.StoreUpdate)[0].result == RESULT
    assert of(play(on.OutboxStored(update_id=task.task_id)), do.SendUpdate)


def test_an_update_that_the_full_outbox_dropped_is_not_sent_any_more() -> None:
    task = a_task()
    play = until_sent(task)
    got = play(on.UpdateDropped(update_id=task.task_id, reason="the outbox is full"))
    assert [e.name for e in of(got, do.Emit)] == ["update_dropped"]
    assert not of(play(on.Tick(now_s=500.0)), do.SendUpdate)


def test_training_goes_on_while_the_link_is_down_and_is_sent_when_it_is_back() -> None:
    task, play = a_task(), online()
    play(on.TaskArrived(task=task), *stored(task), on.LinkDown())
    assert not play.of(do.StopTraining)
    play(on.Trained(update_id=task.task_id, result=RESULT), on.OutboxStored(update_id=task.task_id))
    assert not play.of(do.SendUpdate)
    assert of(play(on.LinkUp()), do.SendUpdate)


def test_every_connection_repeats_state_and_report() -> None:
    play = online()
    play(on.Tick(now_s=1.0), on.LinkDown())
    assert play(on.LinkUp(session_present=True)) == [do.PublishState()]
    play(on.Tick(now_s=2.0))
    assert play.of(do.PublishReport) == [do.PublishReport(phase="idle")] * 2


def test_an_ordinary_round_needs_no_report_unless_it_lasts() -> None:
    play, task = online(), a_task()
    play(on.Tick(now_s=1.0))
    until_sent(task, play)
    play(a_receipt(task.task_id), on.Tick(now_s=60.0))
    assert [report.phase for report in play.of(do.PublishReport)] == ["idle"]
    play(on.TaskArrived(task=a_task(2)))
    assert s.due_s(play.session) == 80.0
    play(on.Tick(now_s=79.9))
    assert len(play.of(do.PublishReport)) == 1
    play(on.Tick(now_s=80.0))
    assert [report.phase for report in play.of(do.PublishReport)] == ["idle", "fetching"]


def test_a_fault_is_reported_soon_and_nothing_is_due_after_it() -> None:
    play = online()
    play(on.Tick(now_s=1.0), on.GateChanged(open=False, reason="90 °C"))
    assert s.due_s(play.session) == 1.5
    play(on.Tick(now_s=1.5))
    assert play.of(do.PublishReport)[-1] == do.PublishReport(phase="gated", reason="90 °C")
    assert s.due_s(play.session) == math.inf, "an idle device needs no clock"


def a_capability(**changes: Any) -> Capability:
    fields: dict[str, Any] = {
        "device": "dev",
        "public_key": b"k" * 32,
        "session": 1,
        "agent_version": "1",
        "tier": "full",
        "disk_free_bytes": 1 << 30,
        "storage_bytes": 1 << 30,
    }
    return Capability(**(fields | changes))


def looked(**changes: Any) -> on.MachineChanged:
    found = a_capability(**changes)
    return on.MachineChanged(tier=found.tier, storage_bytes=found.storage_bytes, capability=found)


def test_nothing_is_said_before_the_first_look_at_the_machine_and_then_everything() -> None:
    unsent = on.Unsent(update_id=b"u" * 16, job="digits", round=1, size_bytes=10)
    play = Play(on.Started(measured=False, unsent=(unsent,)), on.LinkUp())
    assert not play.log
    assert s.due_s(play.session) == math.inf
    assert [type(action) for action in play(looked())] == [do.PublishState, do.SendUpdate]
    assert play.of(do.PublishState)[0].capability == a_capability()


def test_free_space_that_moves_around_a_boundary_is_told_once() -> None:
    play = Play(on.Started(measured=False), on.LinkUp(), looked())
    edge = 1 << 29
    moves = [looked(disk_free_bytes=edge + (1 << 20) * (1 - 2 * (n % 2))) for n in range(10)]
    told = [action for move in moves for action in play(move)]
    assert len(of(told, do.PublishCapability)) == 1
    assert of(play(looked(disk_free_bytes=edge, samples=5)), do.PublishCapability)
    play(on.LinkDown())
    assert not play(looked(samples=6)), "nobody is there"
    assert of(play(on.LinkUp()), do.PublishState)[0].capability == a_capability(samples=6)


KIB = 1024


def offered(size_bytes: int = 10 * 128 * KIB) -> Play:
    unsent = on.Unsent(update_id=b"u" * 16, job="digits", round=1, transfer="x", size_bytes=size_bytes)
    play = Play(on.Started(unsent=(unsent,)))
    assert of(play(on.LinkUp()), do.SendOffer) == [do.SendOffer(update_id=b"u" * 16, chunk_bytes=128 * KIB)]
    return play


def a_credit(*have: int, chunks: int = 4) -> on.CreditArrived:
    bits = sum(1 << number for number in have)
    return on.CreditArrived(transfer="x", have=bits.to_bytes(2, "little"), chunks=chunks)


def numbers(actions: list[do.Action]) -> list[int]:
    return [number for action in of(actions, do.SendChunks) for number in action.numbers]


def test_a_credit_sends_the_next_chunks_and_its_repetitions_nothing() -> None:
    play = offered()
    assert numbers(play(a_credit())) == [0, 1, 2, 3]
    assert not any(numbers(play(a_credit())) for _ in range(100)), "each of them would cost 512 KiB"
    assert numbers(play(a_credit(0, 1))) == [4, 5], "four are under way at most"
    assert numbers(play(a_credit(0, 1, 2, 3, 4, 5))) == [6, 7, 8, 9]
    assert not numbers(play(a_credit(0, 1, 2, 3, 4))), "an older word"
    assert play(on.CreditArrived(transfer="y", have=b"", chunks=4)) == []


def test_a_lost_chunk_is_sent_again_after_a_new_offer() -> None:
    play = offered()
    play(a_credit())
    play(on.Tick(now_s=1.0))
    assert s.due_s(play.session) == math.inf, "the link may take long for them"
    play(on.ChunksSent(update_id=b"u" * 16))
    assert not numbers(play(a_credit(1, 2, 3, chunks=1)))
    assert of(play(on.Tick(now_s=11.0)), do.SendOffer)
    assert numbers(play(a_credit(1, 2, 3))) == [0, 4, 5, 6]


def test_a_used_up_quota_lets_every_byte_of_an_update_go_once_more_at_most() -> None:
    play = offered()
    play(on.QuotaChanged(words="used up"))
    sent: list[int] = []
    for n in range(1, 200):
        play(on.ChunksSent(update_id=b"u" * 16), on.Tick(now_s=200.0 * n))
        sent += numbers(play(a_credit()))
    assert sorted(sent) == list(range(10))
    play(on.QuotaChanged(), on.ChunksSent(update_id=b"u" * 16), on.Tick(now_s=1e6))
    assert numbers(play(a_credit())) == [0, 1, 2, 3], "a new day"


def test_a_short_update_is_sent_once_when_the_quota_is_used_up() -> None:
    task = a_task()
    play = until_sent(task)
    play(on.QuotaChanged(words="used up"))
    got = [action for n in range(50) for action in play(on.Tick(now_s=200.0 * n), on.LinkDown(), on.LinkUp())]
    assert len(of(got, do.SendUpdate)) == 1
    assert of(play(on.QuotaChanged(), on.Tick(now_s=1e6)), do.SendUpdate)


def test_a_used_up_quota_holds_downloads_and_trainings_and_lets_the_running_one_end() -> None:
    play, task = online(), a_task()
    play(on.QuotaChanged(words="the link quota is used up"))
    assert not of(play(on.TaskArrived(task=task)), do.FetchBlobs)
    assert s.report_of(play.session).reason == "the link quota is used up"
    assert of(play(on.QuotaChanged()), do.FetchBlobs)
    play(*stored(task))
    assert not of(play(on.QuotaChanged(words="again")), do.StopTraining)
    assert of(play(on.Trained(update_id=task.task_id, result=RESULT)), do.StoreUpdate)


def test_what_breaks_a_bound_fails_the_task_and_is_not_tried_again() -> None:
    task, play = a_task(), online()
    play(on.TaskArrived(task=task), *stored(task), on.Trained(update_id=task.task_id, result=RESULT))
    got = play(on.StoreFailed(update_id=task.task_id, code="E_SCHEMA", text="10000001 samples"))
    assert [e.code for e in of(got, do.Emit)] == ["E_SCHEMA"]
    assert play.phase == "failed"
    assert not of(play(on.Tick(now_s=1e5)), do.StoreUpdate)


def test_an_update_that_is_stored_after_the_next_task_came_is_sent() -> None:
    first, second, play = a_task(1), a_task(2), online()
    play(on.TaskArrived(task=first), *stored(first), on.Trained(update_id=first.task_id, result=RESULT))
    play(on.TaskArrived(task=second))
    got = play(on.OutboxStored(update_id=first.task_id, job="digits", round=1))
    assert of(got, do.SendUpdate) == [do.SendUpdate(update_id=first.task_id)]
    assert play.session.task == second
    assert not of(play(on.TaskArrived(task=first)), do.FetchBlobs), "it is done"


def test_a_coordinator_with_a_lower_epoch_is_shown_the_higher_one_and_the_reason_is_told() -> None:
    play = Play(on.Started(epoch=7), on.LinkUp(), on.Tick(now_s=1.0))
    lower = on.CoordinatorChanged(state="online", epoch=3)
    assert [type(action) for action in play(lower)] == [do.Emit, do.ShowEpoch]
    assert not of(play(lower), do.ShowEpoch), "not in every breath"
    assert of(play(on.Tick(now_s=11.0), lower), do.ShowEpoch)
    assert "epoch 3, 7 was seen" in s.report_of(play.session).reason
    play(on.CoordinatorChanged(state="online", epoch=8, word=b"signed"))
    assert (play.phase, s.report_of(play.session).reason) == ("idle", "")
    assert play.of(do.RememberEpoch) == [do.RememberEpoch(epoch=8, word=b"signed")]


def test_no_signed_epoch_is_so_large_that_its_coordinator_cannot_go_above_it() -> None:
    play = online()
    play(on.CoordinatorChanged(state="online", epoch=2**53))
    assert play.session.epoch == 1, "it may be anybody's who had the key for a moment"
    play(on.CoordinatorChanged(state="online", epoch=2**52, word=b"word"))
    assert play.of(do.RememberEpoch)[-1] == do.RememberEpoch(epoch=2**52, word=b"word")
    assert of(play(on.CoordinatorChanged(state="online", epoch=1)), do.ShowEpoch)
    got = play(on.TaskArrived(task=a_task(epoch=2**52 + 1)))
    assert of(got, do.FetchBlobs)


def test_a_device_that_was_put_back_from_a_copy_takes_a_higher_number_once() -> None:
    play = Play(on.Started(number=3), on.LinkUp())
    assert play(on.SessionBehind(session=9)) == [do.RaiseSession(known=9)]
    play(on.Renumbered(number=10))
    assert play(on.SessionBehind(session=9)) == [], "a replayed word"


def test_what_the_broker_refuses_is_told_until_the_next_connection() -> None:
    play = online()
    play(on.BrokerRefused(topic="caps", words="the broker refuses messages to caps"))
    assert s.report_of(play.session).reason == "E_BROKER: the broker refuses messages to caps"
    play(on.LinkDown(), on.LinkUp())
    assert play.phase == "idle"


def test_an_update_that_is_too_long_for_the_broker_goes_in_smaller_pieces() -> None:
    task = a_task()
    play = online()
    play(on.TaskArrived(task=task), *stored(task), on.Trained(update_id=task.task_id, result=RESULT))
    got = play(on.OutboxStored(update_id=task.task_id, transfer="x", size_bytes=20_000))
    assert of(got, do.SendUpdate)
    got = play(on.BrokerRefused(topic="x", words="", packet_bytes=5096))
    assert of(got, do.SendOffer)[0].chunk_bytes == 5096 - 512
    assert numbers(play(a_credit())) == [0, 1, 2, 3]
    got = play(on.BrokerRefused(topic="x", words="", packet_bytes=3000))
    assert of(got, do.SendOffer)
    assert of(play(a_credit()), do.SendChunks)[0].chunk_bytes == of(got, do.SendOffer)[0].chunk_bytes


def test_every_state_of_the_work_is_in_the_table() -> None:
    from typing import get_args

    from liberatai_agent.session.state import Work
    from liberatai_agent.session.work import TABLE

    assert set(TABLE) == set(get_args(Work))


def test_the_clock_never_goes_back() -> None:
    play = Play(on.Tick(now_s=10.0), on.Tick(now_s=3.0))
    assert play.session.now_s == 10.0


def test_a_step_leaves_the_old_session_alone() -> None:
    before = online().session
    s.step(before, on.TaskArrived(task=a_task()))
    assert before == replace(before)
    assert before.task is None


def test_a_device_at_rest_says_so_and_says_when_it_is_back() -> None:
    play = online()
    rests = on.GateChanged(open=False, reason="paused at the device", resting=True)
    assert of(play(rests), do.PublishState) == [do.PublishState(resting=True)]
    assert of(play(rests), do.PublishState) == []
    # a new connection says everything again, and so that it still rests
    assert [one.resting for one in of(play(on.LinkDown(), on.LinkUp()), do.PublishState)] == [True]
    assert play.phase == "gated"
    assert of(play(on.GateChanged(open=True)), do.PublishState) == [do.PublishState()]
    # heat and load are no rest: the device may be asked, and begins when it can
    assert of(play(on.GateChanged(open=False, reason="90 °C")), do.PublishState) == []
