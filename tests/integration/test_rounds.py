"""Whole rounds over the in-memory link: a coordinator with a real ledger, devices with real frames."""

import asyncio
import dataclasses
import hashlib
import itertools
import time
from collections import Counter
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from tests.integration.kit import (
    FLEET,
    ScriptedDevice,
    coordinator,
    decode,
    devices,
    ended,
    job_yaml,
    replaced,
    runner_of,
    until,
)

from liberatai_coordinator.api.operations import Operations
from liberatai_coordinator.fleet import link_tries
from liberatai_coordinator.jobs import queue as queue_module
from liberatai_coordinator.jobs.roster import tightest
from liberatai_coordinator.jobs.tasks import _decode_path
from liberatai_coordinator.models import versions as versions_module
from liberatai_coordinator.models.versions import Versions
from liberatai_coordinator.service import Service
from liberatai_coordinator.store.ledger import Ledger
from liberatai_coordinator.store.rows import VersionRow
from liberatai_core.contract.frame import Signer, seal
from liberatai_core.contract.messages import Cancel, Event, Head, Offer, Report, State, Step
from liberatai_core.contract.topics import blob_id
from liberatai_core.errors import ConfigError, DataError, DiskError, NotFoundError, StateError
from liberatai_core.link.memory import MemoryBroker
from liberatai_core.sparsifier.codec import encode_plain


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, 90))


def finished(service: Service) -> bool:
    return service.ledger.jobs.get("tiny").state == "finished"


async def final_digests(service: Service) -> dict[str, str]:
    return (await Operations.of(service).models.version("tiny", "latest")).digests


async def undisturbed(folder: Path, rounds: int = 3) -> dict[str, str]:
    broker = MemoryBroker()
    async with devices(broker, "a", "b", "c"), coordinator(broker, folder) as service:
        await Operations.of(service).jobs.create(job_yaml(rounds=rounds), str(folder))
        await until(lambda: finished(service))
        return await final_digests(service)


def test_a_job_runs_to_its_end_and_every_update_is_counted_once(tmp_path: Path) -> None:
    async def scenario() -> None:
        broker = MemoryBroker()
        async with devices(broker, "a", "b", "c") as fleet, coordinator(broker, tmp_path) as service:
            await Operations.of(service).jobs.create(job_yaml(rounds=3), str(tmp_path))
            await until(lambda: finished(service))
            versions = await Operations.of(service).models.log("tiny")
            assert [v.version for v in versions] == [3, 2, 1, 0]
            assert [v.parent for v in versions] == [*(v.id for v in versions[1:]), None]
            assert [v.updates for v in versions] == [3, 3, 3, 0]
            await until(lambda: all(device.cancels for device in fleet))
            for device in fleet:
                assert len({r.update_id for r in device.receipts if r.accepted}) == 3
                assert device.cancels[-1].final[-1].digest.hex() in {
                    d[:32] for d in versions[0].digests.values()
                }

    run(scenario())


def test_the_job_shows_its_rounds_its_plan_and_its_weights(tmp_path: Path) -> None:
    async def scenario() -> None:
        broker = MemoryBroker()
        async with devices(broker, "a", "b", "c"), coordinator(broker, tmp_path) as service:
            await Operations.of(service).jobs.create(job_yaml(rounds=2), str(tmp_path))
            await until(lambda: finished(service))
            job = await Operations.of(service).jobs.show("tiny")
            assert [(r.round, r.state, r.updates) for r in job.rounds] == [
                (1, "published", 3),
                (2, "published", 3),
            ]
            plan = await Operations.of(service).plans.show("tiny", None)
            assert {a.structure for a in plan.assignments} == {"mlp-hidden8"}
            structure, data, weights = await Operations.of(service).models.weights(
                "tiny", "latest", "mlp-hidden8"
            )
            assert len(weights) == 4 * structure.parameters
            assert data.classes == 3
            with pytest.raises(NotFoundError):
                await Operations.of(service).models.weights("tiny", "latest", "cnn")
            with pytest.raises(StateError):
                await Operations.of(service).jobs.pause("tiny")

    run(scenario())


class Crash(BaseException):
    """Not an Exception: nothing in the product may catch it, like a kill -9."""


def crash_at(ledger: Ledger, name: str, call: int, *, after: bool) -> None:
    """Let the n-th call of a store's method end the job's task, before or after it is done."""
    store, method = name.split(".")
    owner = getattr(ledger, store)
    real, calls = getattr(owner, method), itertools.count(1)

    def wrapped(*args: Any, **more: Any) -> Any:
        if next(calls) != call:
            return real(*args, **more)
        if after:
            real(*args, **more)
        raise Crash

    setattr(owner, method, wrapped)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("jobs.set_value", 1),
        ("jobs.set_value", 2),
        ("versions.add", 1),
        ("versions.add", 3),
        ("rounds.open", 1),
        ("rounds.open", 2),
        ("rounds.close", 1),
        ("rounds.close", 3),
        ("rounds.set_aggregated", 2),
        ("rounds.set_published", 2),
        ("rounds.set_published", 3),
        ("jobs.end", 1),
    ],
)
def test_a_crash_at_any_step_changes_nothing(tmp_path: Path, name: str, call: int, after: bool) -> None:
    """P1, P2, P4: the final weights are those of the undisturbed run, bit for bit."""

    async def scenario() -> None:
        wanted = await undisturbed(tmp_path / "calm")
        broker, folder = MemoryBroker(), tmp_path / "crashed"
        async with devices(broker, "a", "b", "c"):
            async with coordinator(broker, folder) as service:
                crash_at(service.ledger, name, call, after=after)
                await Operations.of(service).jobs.create(job_yaml(rounds=3), str(folder))
                await until(lambda: ended(service))
                assert isinstance(service.jobs._running["tiny"].exception(), Crash)
            async with coordinator(broker, folder) as service:
                await until(lambda: finished(service))
                assert await final_digests(service) == wanted
                assert [v.updates for v in await Operations.of(service).models.log("tiny")] == [3, 3, 3, 0]

    run(scenario())


def test_an_update_that_comes_while_the_coordinator_resumes_is_not_refused(tmp_path: Path) -> None:
    """It waits until the job knows its round again; a refusal would throw away what the round waits for."""

    async def scenario() -> None:
        wanted = await undisturbed(tmp_path / "calm")
        broker, folder = MemoryBroker(), tmp_path / "resumed"
        async with devices(broker, "a", "b", "c") as fleet:
            fleet[2].answers = False
            async with coordinator(broker, folder) as service:
                await Operations.of(service).jobs.create(job_yaml(rounds=3), str(folder))
                await until(lambda: bool(fleet[2].tasks) and len(fleet[2].blobs) > 0)
            fleet[2].answers = True
            await fleet[2]._answer(fleet[2].tasks[-1])
            slow = Versions.restore

            def restore(self: Versions, row: VersionRow) -> None:
                time.sleep(0.3)
                slow(self, row)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Versions, "restore", restore)
                async with coordinator(broker, folder) as service:
                    await until(lambda: finished(service))
                    assert await final_digests(service) == wanted
            assert all(receipt.accepted for device in fleet for receipt in device.receipts)

    run(scenario())


def test_a_broker_that_forgets_everything_is_told_again(tmp_path: Path) -> None:
    async def scenario() -> None:
        wanted = await undisturbed(tmp_path / "calm")
        broker, folder = MemoryBroker(), tmp_path / "wiped"
        async with devices(broker, "a", "b", "c") as fleet, coordinator(broker, folder) as service:
            fleet[2].answers = False
            await Operations.of(service).jobs.create(job_yaml(rounds=3), str(folder))
            await until(lambda: bool(fleet[2].tasks))
            broker.stop(forget=True)
            fleet[2].answers = True
            broker.start()
            await until(lambda: finished(service))
            assert await final_digests(service) == wanted

    run(scenario())


def test_a_round_without_quorum_is_abandoned_and_the_next_one_goes_on(tmp_path: Path) -> None:
    async def scenario() -> None:
        broker = MemoryBroker()
        async with devices(broker, "a", "b", "c") as fleet, coordinator(broker, tmp_path) as service:
            fleet[0].answers = fleet[1].answers = False
            await Operations.of(service).jobs.create(
                job_yaml(rounds=1, quorum=0.6, deadline_s=1), str(tmp_path)
            )
            await until(lambda: any(row.state == "abandoned" for row in service.ledger.rounds.all("tiny")))
            fleet[0].answers = fleet[1].answers = True
            await until(lambda: finished(service))
            first, *_, last = (await Operations.of(service).jobs.show("tiny")).rounds
            assert first.state == "abandoned"
            assert "1 of 2" in first.reason
            assert (last.state, last.updates) == ("published", 3)

    run(scenario())


def test_one_silent_device_does_not_hold_up_a_round_with_quorum(tmp_path: Path) -> None:
    async def scenario() -> None:
        broker = MemoryBroker()
        async with devices(broker, "a", "b", "c") as fleet, coordinator(broker, tmp_path) as service:
            fleet[1].answers = False
            await Operations.of(service).jobs.create(
                job_yaml(rounds=2, quorum=0.6, deadline_s=1), str(tmp_path)
            )
            await until(lambda: finished(service))
            assert [r.updates for r in (await Operations.of(service).jobs.show("tiny")).rounds] == [2, 2]

    run(scenario())


def test_hostile_updates_are_refused_with_a_code_and_the_round_goes_on(tmp_path: Path) -> None:
    """Wrong base, structure, codec, body, class counts; unsigned, other device's topic, replay."""

    async def scenario() -> None:
        broker = MemoryBroker()
        async with devices(broker, "a", "b", "c") as fleet, coordinator(broker, tmp_path) as service:
            bad = fleet[2]
            bad.answers = False
            await Operations.of(service).jobs.create(job_yaml(rounds=1), str(tmp_path))
            await until(lambda: bool(bad.tasks) and len(bad.blobs) > 0)
            honest = bad.train(bad.tasks[-1])
            hostile = {
                "E_BASE_MODEL": replaced(honest, base=b"x" * 16),
                "E_ROUND_UNKNOWN": replaced(honest, round=99),
                "E_CODEC": replaced(honest, codec="pickle"),
                "E_SCHEMA": replaced(honest, class_counts=(1, 2)),
            }
            topic = bad.topics.upload(bad.name, "b" * 26)
            for code, update in hostile.items():
                bad.receipts.clear()
                await bad.say(topic, update)
                await until(lambda: bool(bad.receipts))
                assert (bad.receipts[0].accepted, bad.receipts[0].code) == (False, code)
            size = bad.spec(bad.tasks[-1]).structure.parameters
            huge = encode_plain(np.array([0]), np.array([3e38], np.float32), size)
            broken = [honest.body[:-1], honest.body + b"\0", b"", b"\xff" * 64, huge]
            for body in broken:
                bad.receipts.clear()
                await bad.say(topic, replaced(honest, body=body))
                await until(lambda: bool(bad.receipts))
                assert not bad.receipts[0].accepted
            frame = seal(honest, bad.signer)
            other = bad.topics.upload("a", "b" * 26)
            stranger = Signer.from_seed(b"s" * 32, FLEET)
            for place, payload in (
                (topic, b""),
                (topic, b"garbage"),
                (topic, frame[:-1]),
                (topic, frame[:12] + bytes(64) + frame[76:]),
                (topic, seal(honest, stranger)),
                (other, frame),
                (bad.topics.up(bad.name, "state"), frame),
                (topic, b"cos\nsystem\n(S'true'\ntR."),
                ("lai/v1/test/up/c/x/!!/m", frame),
                (bad.topics.upload(bad.name, "b" * 26, 3), b"chunk of nothing"),
            ):
                await bad.link.publish(place, payload)
            await bad.say(bad.topics.up(bad.name, "rep"), Report(device=bad.name, session=0, phase="idle"))
            assert (await Operations.of(service).health())["ok"]
            bad.receipts.clear()
            for _ in range(3):
                await bad.say(topic, honest)
            await until(lambda: finished(service))
            assert [v.updates for v in await Operations.of(service).models.log("tiny")] == [3, 0]
            await until(lambda: len(bad.receipts) >= 1)
            assert all(receipt.accepted for receipt in bad.receipts)
            refused = service.fleet.refusals
            assert refused["c"]["E_TOPIC"] >= 1
            assert refused["c"]["E_REPLAY"] >= 1
            assert sum(refused[""].values()) >= 3

    run(scenario())


def test_no_device_can_answer_in_the_name_of_another(tmp_path: Path) -> None:
    """Not even with a key that the coordinator knows, on the victim's own topic, without access rules."""

    async def scenario() -> None:
        broker = MemoryBroker()
        async with devices(broker, "a", "b", "evil") as fleet, coordinator(broker, tmp_path) as service:
            victim, evil = fleet[0], fleet[2]
            victim.answers = False
            await Operations.of(service).jobs.create(job_yaml(rounds=1), str(tmp_path))
            await until(lambda: bool(victim.tasks) and len(victim.blobs) > 0)
            forged = seal(victim.train(victim.tasks[-1]), evil.signer)
            await evil.link.publish(victim.topics.upload("a", "d" * 26), forged)
            await until(lambda: service.fleet.refusals.get("evil", Counter())["E_SIG"] == 1)
            assert "a" not in service.runners["tiny"].open_round.stored  # type: ignore[union-attr]
            chunked = blob_id(forged)
            offer = Offer(
                device="a",
                transfer=chunked,
                size_bytes=len(forged),
                chunk_bytes=1024,
                sha256=hashlib.sha256(forged).digest(),
                update_id=victim.train(victim.tasks[-1]).update_id,
                job="tiny",
                round=1,
            )
            await evil.say(victim.topics.upload("a", chunked), offer)
            await until(lambda: service.fleet.refusals["evil"]["E_SIG"] == 2)
            await victim.say(victim.topics.upload("a", chunked), offer)
            for part in range(-(-len(forged) // 1024)):
                content = forged[part * 1024 : (part + 1) * 1024]
                await evil.link.publish(victim.topics.upload("a", chunked, part), content)
            await until(lambda: sum(sum(c.values()) for c in service.fleet.refusals.values()) >= 3)
            assert "a" not in service.runners["tiny"].open_round.stored  # type: ignore[union-attr]

    run(scenario())


def test_a_replay_after_the_job_is_receipted_as_a_duplicate_and_counts_nowhere(tmp_path: Path) -> None:
    async def scenario() -> None:
        broker = MemoryBroker()
        async with devices(broker, "a", "b", "c") as fleet, coordinator(broker, tmp_path) as service:
            await Operations.of(service).jobs.create(job_yaml(rounds=2), str(tmp_path))
            await until(lambda: finished(service))
            before = await final_digests(service)
            fleet[0].receipts.clear()
            await fleet[0].link.publish(fleet[0].topics.upload("a", "c" * 26), fleet[0].sent[1])
            await until(lambda: bool(fleet[0].receipts))
            assert (fleet[0].receipts[0].accepted, fleet[0].receipts[0].code) == (True, "E_DUP")
            assert await final_digests(service) == before

    run(scenario())


def test_deltas_without_an_exact_sum_are_followed_one_by_one_until_a_keyframe_replaces_them(
    tmp_path: Path,
) -> None:
    """Devices check every digest on the way, so they hold what the coordinator believes they hold."""

    async def scenario() -> None:
        broker = MemoryBroker()
        async with devices(broker, "a", "b", "c") as fleet, coordinator(broker, tmp_path) as service:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(versions_module, "MAX_STEPS", 3)
                patch.setattr(versions_module, "exact_deltas", lambda *_: None)
                await Operations.of(service).jobs.create(job_yaml(rounds=5), str(tmp_path))
                await until(lambda: finished(service))
            await until(lambda: all(device.cancels for device in fleet))
            told = [(bool(task.held), [step.version for step in task.steps]) for task in fleet[0].tasks]
            assert told == [(False, [0]), (True, [1]), (True, [2]), (False, [3]), (True, [4])]
            assert [v.updates for v in await Operations.of(service).models.log("tiny")] == [3, 3, 3, 3, 3, 0]

    run(scenario())


def test_a_device_that_was_away_gets_one_delta_for_all_versions_that_it_missed(tmp_path: Path) -> None:
    """It leads from what it holds to the base of everybody else, and whoever missed the same gets the same."""

    async def scenario() -> None:
        broker = MemoryBroker()
        async with devices(broker, "a", "b", "c") as fleet, coordinator(broker, tmp_path) as service:
            text = job_yaml(rounds=9, devices=1).replace("rounds: {", "rounds: {target: 1, overselect: 1, ")
            await Operations.of(service).jobs.create(text, str(tmp_path))
            await until(lambda: finished(service))
            await until(lambda: all(device.cancels for device in fleet))
            digests = {
                v.version: v.digests["mlp-hidden8"] for v in await Operations.of(service).models.log("tiny")
            }
            jumps = []
            for device in fleet:
                first, *later = device.tasks
                assert first.held == b""
                for before, task in itertools.pairwise(device.tasks):
                    assert task.held == before.base
                    assert [step.version for step in task.steps] == [task.round - 1]
                    jumps.append(task.round - before.round)
                assert all(task.base.hex() == digests[task.round - 1][:32] for task in (first, *later))
                assert device.cancels[-1].held == device.tasks[-1].base
                assert device.cancels[-1].final[-1].digest.hex() == digests[9][:32]
            assert max(jumps) > 1, "nobody was ever away"

    run(scenario())


def test_a_device_that_lost_its_files_gets_the_whole_path_again(tmp_path: Path) -> None:
    async def scenario() -> None:
        broker = MemoryBroker()
        async with devices(broker, "a", "b", "c") as fleet, coordinator(broker, tmp_path) as service:
            fleet[1].answers = False
            await Operations.of(service).jobs.create(job_yaml(rounds=3), str(tmp_path))
            await until(lambda: bool(fleet[1].tasks) and len(fleet[1].blobs) == 2)
            fleet[1].answers = True
            await fleet[1]._answer(fleet[1].tasks[-1])
            fleet[1].path = ()
            await until(lambda: finished(service))
            told = [(task.round, bool(task.held)) for task in fleet[1].tasks]
            assert told == [(1, False), (2, True), (2, False), (3, True)]
            assert fleet[1].tasks[1].task_id == fleet[1].tasks[2].task_id
            assert [v.updates for v in await Operations.of(service).models.log("tiny")] == [3, 3, 3, 0]

    run(scenario())


def test_a_device_without_files_is_not_believed_twice_in_one_round(tmp_path: Path) -> None:
    """Otherwise a faulty one could make the coordinator publish for ever."""

    async def scenario() -> None:
        broker = MemoryBroker()
        async with devices(broker, "a", "b", "c") as fleet, coordinator(broker, tmp_path) as service:
            fleet[1].answers = False
            await Operations.of(service).jobs.create(job_yaml(rounds=1), str(tmp_path))
            await until(lambda: bool(fleet[1].tasks))
            for number in range(5):
                missing = Event(device="b", session=1, number=number, name="base_missing", code="E_BASE")
                await fleet[1].say(fleet[1].topics.up("b", "ev"), missing)
            fleet[1].answers = True
            await fleet[1]._answer(fleet[1].tasks[-1])
            await until(lambda: finished(service))
            assert len(fleet[1].tasks) == 1

    run(scenario())


def test_what_devices_hold_is_known_after_a_crash(tmp_path: Path) -> None:
    """It is written with the update that proves it: no device fetches its keyframe a second time."""

    async def scenario() -> None:
        broker = MemoryBroker()
        async with devices(broker, "a", "b", "c") as fleet:
            async with coordinator(broker, tmp_path) as service:
                crash_at(service.ledger, "rounds.close", 2, after=False)
                await Operations.of(service).jobs.create(job_yaml(rounds=4), str(tmp_path))
                await until(lambda: ended(service))
            async with coordinator(broker, tmp_path) as service:
                await until(lambda: finished(service))
            for device in fleet:
                assert [task.round for task in device.tasks if not task.held] == [1]

    run(scenario())


def test_the_broker_holds_the_newest_version_and_nothing_of_older_ones(tmp_path: Path) -> None:
    """A keyframe and one delta per structure, however many rounds there were."""

    async def scenario() -> None:
        broker = MemoryBroker()
        async with devices(broker, "a", "b", "c"), coordinator(broker, tmp_path) as service:
            await Operations.of(service).jobs.create(job_yaml(rounds=6), str(tmp_path))
            await until(lambda: finished(service))
            head = decode(broker.retained["lai/v1/test/pub/head/tiny"])
            assert isinstance(head, Head)
            assert [step.version for step in head.chains["mlp-hidden8"]] == [0, 6]
            blobs = {topic.split("/")[5] for topic in broker.retained if "/pub/b/" in topic}
            cancels = [
                message
                for topic, frame in broker.retained.items()
                if topic.endswith("/task") and isinstance(message := decode(frame), Cancel)
            ]
            assert len(cancels) == 3
            final = {step.blob.blob for cancel in cancels for step in cancel.final}
            assert blobs == final | {step.blob.blob for step in head.chains["mlp-hidden8"]}

    run(scenario())


@pytest.mark.parametrize("rule", ["fedavgm", "fedadam"])
def test_the_state_of_a_server_optimiser_survives_a_restart(tmp_path: Path, rule: str) -> None:
    """Its moments are part of the version: a crash between two rounds changes no weight."""

    async def scenario() -> None:
        text = job_yaml(rounds=3) + f"aggregate: {{server_optimizer: {rule}}}\n"
        digests = []
        for name in ("calm", "crashed"):
            broker, folder = MemoryBroker(), tmp_path / name
            async with devices(broker, "a", "b", "c"):
                async with coordinator(broker, folder) as service:
                    if name == "crashed":
                        crash_at(service.ledger, "rounds.open", 3, after=False)
                    await Operations.of(service).jobs.create(text, str(folder))
                    await until(lambda: ended(service))
                async with coordinator(broker, folder) as service:
                    await until(lambda: finished(service))
                    digests.append(await final_digests(service))
        assert digests[0] == digests[1]
        assert digests[0] != await undisturbed(tmp_path / "plain")

    run(scenario())


def test_a_full_disk_pauses_a_job_and_changes_nothing(tmp_path: Path) -> None:
    """P8: it goes on by itself when there is room again, with the weights of the undisturbed run."""

    async def scenario() -> None:
        wanted = await undisturbed(tmp_path / "calm")
        broker, folder = MemoryBroker(), tmp_path / "full"
        async with devices(broker, "a", "b", "c"), coordinator(broker, folder) as service:
            real, calls = service.repository.put_all, itertools.count(1)

            def put_all(contents: Sequence[bytes]) -> list[str]:
                if next(calls) in (2, 4):
                    raise DiskError("no space left")
                return real(contents)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(service.repository, "put_all", put_all)
                patch.setattr(queue_module, "DISK_RETRY_S", 0.05)
                await Operations.of(service).jobs.create(job_yaml(rounds=3), str(folder))
                await until(lambda: finished(service))
            assert next(calls) > 4
            assert await final_digests(service) == wanted
            assert [v.updates for v in await Operations.of(service).models.log("tiny")] == [3, 3, 3, 0]

    run(scenario())


def test_a_paused_job_opens_no_round_and_goes_on_when_resumed(tmp_path: Path) -> None:
    async def scenario() -> None:
        broker = MemoryBroker()
        async with devices(broker, "a", "b", "c") as fleet, coordinator(broker, tmp_path) as service:
            fleet[0].answers = False
            await Operations.of(service).jobs.create(job_yaml(rounds=2), str(tmp_path))
            await until(lambda: bool(fleet[0].tasks))
            assert (await Operations.of(service).jobs.pause("tiny")).state == "paused"
            fleet[0].answers = True
            await fleet[0]._answer(fleet[0].tasks[-1])
            await until(lambda: service.ledger.rounds.all("tiny")[0].state == "published")
            assert len(service.ledger.rounds.all("tiny")) == 1
            await Operations.of(service).jobs.resume("tiny")
            await until(lambda: finished(service))

    run(scenario())


def test_an_aborted_job_takes_its_tasks_away_and_keeps_its_versions(tmp_path: Path) -> None:
    async def scenario() -> None:
        broker = MemoryBroker()
        async with devices(broker, "a", "b", "c") as fleet, coordinator(broker, tmp_path) as service:
            fleet[0].answers = False
            await Operations.of(service).jobs.create(job_yaml(rounds=2), str(tmp_path))
            await until(lambda: bool(fleet[0].tasks))
            assert (await Operations.of(service).jobs.abort("tiny")).state == "aborted"
            await until(lambda: all(device.cancels for device in fleet))
            assert len(await Operations.of(service).models.log("tiny")) == 1
            assert all(device.cancels[-1].round >= device.tasks[-1].round for device in fleet)
            (row,) = service.ledger.rounds.all("tiny")
            assert row.state == "abandoned"
            assert list(row.frozen) == service.ledger.updates.ids("tiny", 1)
            fleet[0].receipts.clear()
            await fleet[0].say(fleet[0].topics.upload("a", "b" * 26), fleet[0].train(fleet[0].tasks[-1]))
            await until(lambda: bool(fleet[0].receipts))
            assert not fleet[0].receipts[0].accepted

    run(scenario())


def test_a_device_that_comes_later_gets_a_part(tmp_path: Path) -> None:
    async def scenario() -> None:
        broker = MemoryBroker()
        async with devices(broker, "a", "b"), coordinator(broker, tmp_path) as service:
            await Operations.of(service).jobs.create(
                job_yaml(rounds=4, devices=2, quorum=0.5, deadline_s=5), str(tmp_path)
            )
            await until(lambda: service.ledger.rounds.all("tiny") != [])
            async with devices(broker, "late") as newcomers:
                await until(lambda: bool(newcomers[0].tasks) or finished(service))
                await until(lambda: finished(service))
                assert newcomers[0].tasks
                plan = await Operations.of(service).plans.show("tiny", None)
                assert {a.device for a in plan.assignments} == {"a", "b", "late"}

    run(scenario())


def test_a_quarantined_device_counts_no_more(tmp_path: Path) -> None:
    async def scenario() -> None:
        broker = MemoryBroker()
        async with devices(broker, "a", "b", "c") as fleet, coordinator(broker, tmp_path) as service:
            fleet[2].answers = False
            await Operations.of(service).jobs.create(job_yaml(rounds=1, quorum=0.6), str(tmp_path))
            await until(lambda: bool(fleet[2].tasks))
            await Operations.of(service).devices.quarantine("c", "odd")
            await until(lambda: finished(service))
            fleet[2].receipts.clear()
            await fleet[2].say(fleet[2].topics.upload("c", "b" * 26), fleet[2].train(fleet[2].tasks[-1]))
            await until(lambda: bool(fleet[2].receipts))
            assert fleet[2].receipts[0].code == "E_REVOKED"
            assert (await Operations.of(service).models.log("tiny"))[0].updates == 2

    run(scenario())


def test_faults_of_a_job_come_when_it_is_created(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with coordinator(MemoryBroker(), tmp_path) as service:
            with pytest.raises(ConfigError, match="rounds.deadline_s: must be > 0"):
                await Operations.of(service).jobs.create(job_yaml(deadline_s="soon"), str(tmp_path))  # type: ignore[arg-type]
            with pytest.raises(DataError, match="nowhere.npz"):
                await Operations.of(service).jobs.create(
                    job_yaml() + "teach: {unlabeled: nowhere.npz}\n", str(tmp_path)
                )
            assert await Operations.of(service).jobs.list() == ()

    run(scenario())


def test_presence_and_tasks_are_signed_by_the_coordinator_and_blobs_are_what_they_are_called(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        broker = MemoryBroker()
        async with devices(broker, "a", "b", "c"), coordinator(broker, tmp_path) as service:
            await Operations.of(service).jobs.create(job_yaml(rounds=1), str(tmp_path))
            await until(lambda: finished(service))
            for topic, payload in broker.retained.items():
                if "/pub/b/" in topic:
                    assert blob_id(payload) == topic.split("/")[5]
                elif "/up/" not in topic:
                    decode(payload)

    run(scenario())


def test_a_will_of_an_old_session_does_not_declare_a_living_device_lost(tmp_path: Path) -> None:
    async def scenario() -> None:
        broker = MemoryBroker()
        async with devices(broker, "a") as fleet, coordinator(broker, tmp_path) as service:
            device: ScriptedDevice = fleet[0]
            await until(lambda: bool(service.fleet.ready()))
            topic = device.topics.up("a", "state")
            await device.say(topic, State(device="a", state="online", session=5), retain=True)
            await device.say(topic, State(device="a", state="lost", session=4), retain=True)
            await device.say(device.topics.up("a", "rep"), Report(device="a", session=5, phase="gated"))
            await until(lambda: service.fleet.require("a").report is not None)
            (view,) = await Operations.of(service).devices.list()
            assert view.phase == "gated"
            assert service.fleet.require("a").online

    run(scenario())


def base_missing(device: ScriptedDevice) -> tuple[str, Event]:
    event = Event(device=device.name, session=1, number=1, name="base_missing", code="E_BASE")
    return device.topics.up(device.name, "ev"), event


def test_after_a_restart_a_finished_job_still_gives_its_model_to_who_lost_files(tmp_path: Path) -> None:
    async def scenario() -> None:
        broker = MemoryBroker()
        async with devices(broker, "a", "b") as fleet:
            async with coordinator(broker, tmp_path) as service:
                await Operations.of(service).jobs.create(job_yaml(rounds=2, devices=2), str(tmp_path))
                await until(lambda: service.ledger.jobs.get("tiny").state == "finished")
                await until(lambda: all(device.cancels for device in fleet))
                assert fleet[0].cancels[-1].held
            async with coordinator(broker, tmp_path) as service:
                await until(lambda: len(service.fleet.ready()) == 2)
                fleet[0].cancels.clear()
                await fleet[0].say(*base_missing(fleet[0]))
                await until(lambda: bool(fleet[0].cancels))
                told = fleet[0].cancels[-1]
                assert (told.job, told.held) == ("tiny", b"")
                assert told.final == service.jobs._recalled["tiny"].versions.now.chains["mlp-hidden8"]
                assert {step.blob.blob for step in told.final} <= set(service.publisher.blobs)
                await fleet[0].say(*base_missing(fleet[0]))
                await fleet[1].say(*base_missing(fleet[1]))
                await until(lambda: bool(fleet[1].cancels) and not fleet[1].cancels[-1].held)
                assert len(fleet[0].cancels) == 1, "it holds nothing that it could lack"

    run(scenario())


def test_the_ledger_names_what_devices_hold_by_number_and_reads_it_back(tmp_path: Path) -> None:
    """Thousands of devices hold the same files: their names stand there once, as in a ledger of old ones."""

    async def scenario() -> None:
        broker = MemoryBroker()
        async with devices(broker, "a", "b") as fleet:
            async with coordinator(broker, tmp_path) as service:
                await Operations.of(service).jobs.create(job_yaml(rounds=9, devices=2), str(tmp_path))
                await until(lambda: all(3 in device.sent for device in fleet))
                for device in fleet:
                    device.answers = False
                await until(lambda: all(device.tasks[-1].round not in device.sent for device in fleet))
                stored = service.ledger.updates.paths("tiny")
                steps = service.ledger.jobs.value("tiny", "steps") or b""
                known = msgspec.msgpack.decode(steps, type=dict[int, Step])
                held = {
                    name: [known[one] for one in msgspec.msgpack.decode(path, type=list[int])]
                    for name, path in stored.items()
                }
                assert {device.name: list(device.path) for device in fleet} == held
                assert all(len(path) > 1 for path in held.values())
                assert all(len(path) < 16 for path in stored.values())
            async with coordinator(broker, tmp_path) as service:
                await until(lambda: "tiny" in service.jobs.runners)
                tasks = service.jobs.runners["tiny"].tasks
                await until(lambda: bool(tasks.paths))
                assert {name: list(path) for name, path in tasks.paths.items()} == held
                old = {name: msgspec.msgpack.encode(path) for name, path in held.items()}
                assert {name: list(_decode_path(path, {})) for name, path in old.items()} == held
                assert _decode_path(b"\x91\x07", {}) == ()

    run(scenario())


def test_only_the_job_whose_round_is_open_answers_who_lost_files(tmp_path: Path) -> None:
    """Another one's answer would take the task away."""

    async def scenario() -> None:
        broker = MemoryBroker()
        async with devices(broker, "a", "b") as fleet, coordinator(broker, tmp_path) as service:
            text = job_yaml(rounds=2, devices=2)
            await Operations.of(service).jobs.create(text.replace("name: tiny", "name: first"), str(tmp_path))
            await until(lambda: service.ledger.jobs.get("first").state == "finished")
            await until(lambda: all(device.cancels for device in fleet))
            held = service.ledger.updates.paths("first")
            for device in fleet:
                device.sent.clear()
            await Operations.of(service).jobs.create(
                text.replace("name: tiny", "name: second"), str(tmp_path)
            )
            lost = fleet[1]
            await until(lambda: bool(lost.tasks) and lost.tasks[-1].job == "second" and 1 in lost.sent)
            lost.answers = False
            await until(lambda: lost.tasks[-1].round == 2 and bool(lost.tasks[-1].held))
            before = len(lost.tasks)
            lost.cancels.clear()
            lost.path = ()
            await lost.say(*base_missing(lost))
            await until(lambda: len(lost.tasks) > before)
            assert (lost.tasks[-1].job, lost.tasks[-1].held) == ("second", b"")
            assert service.ledger.updates.paths("first") == held
            lost.answers = True
            await lost._answer(lost.tasks[-1])
            await until(lambda: service.ledger.jobs.get("second").state == "finished")
            await until(lambda: bool(lost.cancels))
            assert {cancel.job for cancel in lost.cancels} == {"second"}

    run(scenario())


SLOW_JOB = """
name: tiny
data: {input_shape: [1, 4, 4], classes: 3}
structures: [{family: mlp, params: {hidden: 400}}]
rounds: {count: 2, min_devices: 2, deadline_s: 13}
sparsify: {up_density: 0.02, down_density: 0.02, warmup_rounds: 1, warmup_factor: 40}
"""


def test_a_warm_up_that_a_link_cannot_carry_starves_no_job(tmp_path: Path) -> None:
    """Densities above the usual ones are capped by the link, and keep nobody out."""

    async def scenario() -> None:
        broker = MemoryBroker()
        async with devices(broker, "a", "b") as fleet:
            for device in fleet:
                device.link_bits_s = (1e5, 1600.0)
            async with coordinator(broker, tmp_path) as service:
                await Operations.of(service).jobs.create(SLOW_JOB, str(tmp_path))
                await until(lambda: finished(service))
                assert [task.round for task in fleet[0].tasks] == [1, 2]
                assert fleet[0].tasks[0].density > fleet[0].tasks[1].density == 0.02

    run(scenario())


def test_a_link_that_was_measured_to_be_hopeless_is_tried_again_and_until_then_the_job_says_why_it_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        broker = MemoryBroker()
        async with devices(broker, "a", "b") as fleet:
            for device in fleet:
                device.link_bits_s = (1.0, 1.0)
            async with coordinator(broker, tmp_path) as service:
                await Operations.of(service).jobs.create(job_yaml(rounds=1, devices=2), str(tmp_path))
                await until(lambda: bool(service.runners["tiny"].waits))
                reason = (await Operations.of(service).jobs.show("tiny")).reason
                assert reason.startswith("waits: no device can take part (a: link of 1 bit/s measured: ")
                assert not fleet[0].tasks
                monkeypatch.setattr(link_tries, "LINK_S", 0.0)
                service.runners["tiny"].opening.fleet_changed.set()
                await until(lambda: finished(service))
                assert (await Operations.of(service).jobs.show("tiny")).reason == ""
                (task,) = fleet[0].tasks
                assert 0 < task.density < 0.01

    run(scenario())


def test_what_a_device_has_room_for_now_counts_and_how_often_it_takes_part(tmp_path: Path) -> None:
    async def scenario() -> None:
        broker = MemoryBroker()
        async with devices(broker, "a", "b", "c"), coordinator(broker, tmp_path) as service:
            await Operations.of(service).jobs.create(job_yaml(rounds=3), str(tmp_path))
            await until(lambda: finished(service))
            job = (await runner_of(service)).roster
            assert job.room("a") == 100_000
            known = service.fleet.devices["a"]
            assert known.capability
            shrunk = msgspec.structs.replace(known.capability, storage_bytes=1000)
            service.fleet.devices["a"] = dataclasses.replace(known, capability=shrunk)
            assert job.room("a") == 1000
            assert tightest(job.assigned.values()) == {"mlp-hidden8": 100_000}, "others need no new keyframe"
            opened = [row.opened_s for row in service.ledger.rounds.all("tiny")]
            long = msgspec.structs.replace(
                job.job, rounds=msgspec.structs.replace(job.job.rounds, count=10**6)
            )
            job.job = long
            gap_s = job.spacing_s("a")
            assert 0 < gap_s < long.rounds.deadline_s
            assert gap_s == pytest.approx(max(86_400 / 10**6, (time.time() - opened[0]) / 3), rel=0.2)
            assert job.spacing_s("stranger") == long.rounds.deadline_s

    run(scenario())


def test_a_job_counts_its_own_bytes_and_says_for_whom_it_waits(tmp_path: Path) -> None:
    async def scenario() -> None:
        broker = MemoryBroker()
        async with devices(broker, "a", "b") as fleet, coordinator(broker, tmp_path) as service:
            jobs = Operations.of(service).jobs
            await until(lambda: len(service.fleet.ready()) == 2)
            await jobs.create(job_yaml(rounds=1, devices=3), str(tmp_path))
            await until(lambda: bool(service.runners["tiny"].waits))
            reason = (await jobs.show("tiny")).reason
            assert reason == "waits: 2 of 3 devices are online (rounds.min_devices)"
            async with devices(broker, "c") as more:
                await until(lambda: finished(service))
                for device in (*fleet, *more):
                    device.sent.clear()
                await jobs.create(job_yaml(rounds=1, devices=3).replace("tiny", "next"), str(tmp_path))
                await until(lambda: service.ledger.jobs.get("next").state == "finished")
            first, second = [await Operations.of(service).jobs.show(name) for name in ("tiny", "next")]
            assert (first.up_bytes, first.down_bytes) == (3000, 300)
            assert (second.up_bytes, second.down_bytes) == (3000, 300)
            assert first.reason == second.reason == ""

    run(scenario())


def test_what_the_broker_had_in_store_is_no_sign_of_life(tmp_path: Path) -> None:
    async def scenario() -> None:
        broker = MemoryBroker()
        async with coordinator(broker, tmp_path) as service:
            async with devices(broker, "a", "b"):
                await until(lambda: len(service.fleet.ready()) == 2)
            service.ledger.devices.flush()
            seen = {row.id: row.last_seen_s for row in service.ledger.devices.all()}
        await asyncio.sleep(0.05)
        async with devices(broker, "b"), coordinator(broker, tmp_path) as service:
            await until(lambda: len(service.fleet.ready()) == 2)  # as the broker has them
            assert service.fleet.devices["a"].last_seen_s == seen["a"]

    run(scenario())


def test_a_job_that_is_created_before_the_others_go_on_runs_once(tmp_path: Path) -> None:
    async def scenario() -> None:
        broker = MemoryBroker()
        async with devices(broker, "a", "b", "c"), coordinator(broker, tmp_path) as service:
            await Operations.of(service).jobs.create(job_yaml(rounds=1), str(tmp_path))
            runner = service.runners["tiny"]
            service.jobs.resume()
            assert service.runners["tiny"] is runner
            await until(lambda: finished(service))

    run(scenario())
