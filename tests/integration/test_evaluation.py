"""Every round tells how well its versions answer: on the devices, and on labels of the coordinator."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from tests.integration.kit import (
    DATA,
    ScriptedDevice,
    coordinator,
    ended,
    job_yaml,
    replaced,
    runner_of,
    until,
)
from tests.integration.test_rounds import Crash, crash_at

from liberatai_coordinator.api.operations import Operations
from liberatai_coordinator.client.views import RoundView, ScoreView, WorstView
from liberatai_coordinator.jobs.judging import local
from liberatai_coordinator.models.updates import decode_update
from liberatai_coordinator.service import Service
from liberatai_core.aggregator.ensemble import accuracy
from liberatai_core.contract.messages import Capability, Message, Task, Update
from liberatai_core.errors import ConfigError, DataError
from liberatai_core.learning.training import log_probabilities
from liberatai_core.link.memory import MemoryBroker
from liberatai_core.weights import from_bytes


@dataclass
class Examined(ScriptedDevice):
    """A scripted device with a hold-out and a profile."""

    evaluation: tuple[int, int] | None = None
    profile: str = ""

    async def say(self, topic: str, message: Message, *, retain: bool = False) -> None:
        if isinstance(message, Capability):
            message = msgspec.structs.replace(message, profile=self.profile)
        await super().say(topic, message, retain=retain)

    def train(self, task: Task) -> Update:
        return replaced(super().train(task), evaluation=self.evaluation)


FLEET = {
    "a": ("pi", (9, 10)),
    "b": ("pi", (1, 20)),
    "c": ("nuc", (6, 6)),
    "d": ("", None),
}


@contextlib.asynccontextmanager
async def fleet(broker: MemoryBroker) -> AsyncIterator[None]:
    made = [
        Examined(broker, name, profile=profile, evaluation=told) for name, (profile, told) in FLEET.items()
    ]
    running = [asyncio.create_task(device.run()) for device in made]
    try:
        yield
    finally:
        for device, task in zip(made, running, strict=True):
            await device.link.close()
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, 90))


def finished(service: Service) -> bool:
    return service.ledger.jobs.get("tiny").state == "finished"


def samples(seed: int, count: int) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    return {
        "x": random.normal(size=(count, *DATA.input_shape)).astype(np.float32),
        "y": random.integers(0, DATA.classes, count),
    }


def yaml_with_data(folder: Path) -> str:
    """Write the coordinator's files into a folder; half of the test file is marked as test samples."""
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "validation.npz", **samples(1, 60))
    np.savez(folder / "test.npz", **samples(2, 80), test=np.arange(80) % 2)
    return job_yaml(rounds=2, devices=4) + (
        "aggregate: {ensemble: uniform, validation: validation.npz}\nevaluate: {test: test.npz}\n"
    )


async def right(service: Service, version: int, data: dict[str, np.ndarray]) -> float:
    """Return what a version answers right, by its published weights alone."""
    (sid,) = (await Operations.of(service).models.version("tiny", str(version))).digests
    structure, contract, content = await Operations.of(service).models.weights("tiny", str(version), sid)
    return accuracy(log_probabilities(structure, contract, from_bytes(content), data["x"]), data["y"])


def require_figures(rounds: tuple[RoundView, ...]) -> None:
    """Compare with what the devices above tell."""
    for view in rounds:
        local = view.local
        assert local is not None
        assert (local.version, local.late) == (view.round - 1, 0)
        # The lower median of 6, 10 and 20 is 10.
        expected = (6 + 9 + 0.5) / 26
        assert local.all.accuracy == pytest.approx(expected)
        assert (local.all.correct, local.all.total, local.all.devices) == (16, 36, 3)
        assert list(local.structures.values()) == [local.all]
        assert local.profiles["nuc"] == ScoreView(accuracy=1.0, correct=6, total=6, devices=1)
        assert local.profiles["pi"].accuracy == pytest.approx((9 + 0.5) / 20)
        assert set(local.profiles) == {"nuc", "pi"}
        assert local.worst == WorstView(accuracy=1 / 20, devices=1, of=2)


def test_every_round_has_its_figures_and_keeps_them_over_a_restart(tmp_path: Path) -> None:
    async def scenario() -> None:
        broker, text = MemoryBroker(), yaml_with_data(tmp_path)
        test = {name: value[1::2] for name, value in samples(2, 80).items()}
        async with fleet(broker):
            async with coordinator(broker, tmp_path) as service:
                await Operations.of(service).jobs.create(text, str(tmp_path))
                await until(lambda: finished(service))
                rounds = (await Operations.of(service).jobs.show("tiny")).rounds
                require_figures(rounds)
                for number, view in enumerate(rounds, start=1):
                    assert view.central is not None
                    assert view.test is not None
                    assert (view.central.version, view.central.samples) == (number, 60)
                    assert (view.test.version, view.test.samples) == (number, 40)
                    assert view.central.ensemble == await right(service, number, samples(1, 60))
                    assert view.test.ensemble == await right(service, number, test)
                    assert set(view.test.structures.values()) == {view.test.ensemble}
                    assert (view.ensemble, view.use) == ("uniform", "ensemble")
                    assert view.guard.startswith(f"ensemble {view.central.ensemble:.1%}, ")
            async with coordinator(broker, tmp_path) as service:
                assert (await Operations.of(service).jobs.show("tiny")).rounds == rounds

    run(scenario())


def test_a_crash_between_a_version_and_its_note_loses_no_figure(tmp_path: Path) -> None:
    async def scenario() -> None:
        broker, text = MemoryBroker(), yaml_with_data(tmp_path)
        async with fleet(broker):
            async with coordinator(broker, tmp_path) as service:
                crash_at(service.ledger, "rounds.set_aggregated", 2, after=False)
                await Operations.of(service).jobs.create(text, str(tmp_path))
                await until(lambda: ended(service))
                assert isinstance(service.jobs._running["tiny"].exception(), Crash)
            async with coordinator(broker, tmp_path) as service:
                await until(lambda: finished(service))
                rounds = (await Operations.of(service).jobs.show("tiny")).rounds
                require_figures(rounds)
                assert rounds[1].central is not None
                assert rounds[1].central.ensemble == await right(service, 2, samples(1, 60))
                assert rounds[1].test is not None

    run(scenario())


def test_who_scored_an_older_version_counts_and_is_told(tmp_path: Path) -> None:
    async def scenario() -> None:
        broker = MemoryBroker()
        async with fleet(broker), coordinator(broker, tmp_path) as service:
            await Operations.of(service).jobs.create(job_yaml(rounds=2, devices=4), str(tmp_path))
            await until(lambda: finished(service))
            (first, second) = (
                [decode_update(update.frame) for update in service.ledger.updates.of_round("tiny", number)]
                for number in (1, 2)
            )
            late = [one for one in first if one.device == "a"]
            mixed = late + [one for one in second if one.device != "a"]
            found = local((await runner_of(service)).versions, service.fleet, 1, mixed)
            assert found is not None
            assert (found.late, found.all.devices) == (1, 3)

    run(scenario())


def test_a_job_without_labels_and_a_fleet_without_hold_outs_have_no_figures(tmp_path: Path) -> None:
    async def scenario() -> None:
        broker = MemoryBroker()
        device = ScriptedDevice(broker, "a")
        running = asyncio.create_task(device.run())
        async with coordinator(broker, tmp_path) as service:
            await Operations.of(service).jobs.create(job_yaml(rounds=1, devices=1), str(tmp_path))
            await until(lambda: finished(service))
            (view,) = (await Operations.of(service).jobs.show("tiny")).rounds
            assert (view.local, view.central, view.test) == (None, None, None)
            assert view.guard.startswith("not checked")
        await device.link.close()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    run(scenario())


def test_a_test_file_without_labels_is_refused_before_any_device_hears_of_the_job(tmp_path: Path) -> None:
    async def scenario() -> None:
        np.savez(tmp_path / "test.npz", x=samples(2, 10)["x"])
        async with coordinator(MemoryBroker(), tmp_path) as service:
            with pytest.raises(DataError, match="needs labels"):
                await Operations.of(service).jobs.create(
                    job_yaml() + "evaluate: {test: test.npz}\n", str(tmp_path)
                )
            with pytest.raises(DataError, match="none"):
                await Operations.of(service).jobs.create(
                    job_yaml() + "evaluate: {test: none.npz}\n", str(tmp_path)
                )
            np.savez(tmp_path / "test.npz", **samples(2, 10))
            (tmp_path / "link.npz").symlink_to(tmp_path / "test.npz")
            for key in (
                "aggregate: {validation: ./test.npz}",
                "teach: {unlabeled: test.npz}",
                "aggregate: {validation: link.npz}",
            ):
                with pytest.raises(ConfigError, match="evaluate.test: the same file as"):
                    await Operations.of(service).jobs.create(
                        job_yaml() + f"evaluate: {{test: test.npz}}\n{key}\n", str(tmp_path)
                    )
            both = "aggregate: {validation: test.npz}\nteach: {unlabeled: link.npz}\n"
            with pytest.raises(ConfigError, match="aggregate.validation: the same file as teach.unlabeled"):
                await Operations.of(service).jobs.create(job_yaml() + both, str(tmp_path))
            broken = job_yaml().replace("family: mlp", "family: owl")
            with pytest.raises(ConfigError) as caught:
                await Operations.of(service).jobs.create(broken + both.replace("test", "no"), str(tmp_path))
            assert [fault.partition(":")[0] for fault in caught.value.faults] == ["E_STRUCTURE", "E_DATA"]
            assert "aggregate.validation" in caught.value.faults[1]
            assert await Operations.of(service).jobs.list() == ()

    run(scenario())
