"""What an update gave is in the ledger, and an operator sees it, also after a restart."""

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from tests.integration.kit import coordinator, devices, job_yaml, until

from liberatai_coordinator.api.operations import Operations
from liberatai_coordinator.jobs.records import Stats
from liberatai_coordinator.service import Service
from liberatai_core.link.memory import MemoryBroker


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, 90))


def finished(service: Service) -> bool:
    return service.ledger.jobs.get("tiny").state == "finished"


def test_a_device_shows_what_its_newest_update_gave(tmp_path: Path) -> None:
    async def scenario() -> None:
        broker = MemoryBroker()
        yaml = (
            job_yaml(rounds=2) + "aggregate: {rule: norm_clip, hostile: 0.3, clip: 1.0, ensemble: uniform}\n"
        )
        async with devices(broker, "a", "b", "c"):
            async with coordinator(broker, tmp_path) as service:
                await until(lambda: "a" in service.fleet.devices)
                assert (await Operations.of(service).devices.show("a")).contributions == ()
                await Operations.of(service).jobs.create(yaml, str(tmp_path))
                await until(lambda: finished(service))
                rounds = (await Operations.of(service).jobs.show("tiny")).rounds
                shown = [(await Operations.of(service).devices.show(name)).contributions for name in "abc"]
            assert [one.merged.partition(":")[0] for one in rounds] == ["norm_clip"] * 2
            for one in shown:
                assert [(given.job, given.round) for given in one] == [("tiny", 2), ("tiny", 1)]
                assert all(given.norm > 0 and 0 < given.cosine <= 1 for given in one)
            # Lengths of three are never all at most their median, unless they are equal.
            assert {given.verdict for given, _ in shown} == {"accepted", "clipped"}
            async with coordinator(broker, tmp_path) as service:
                await until(lambda: "a" in service.fleet.devices)
                assert (await Operations.of(service).devices.show("a")).contributions == shown[0]

    run(scenario())


def test_a_frozen_structure_stays_as_it_is_and_its_round_says_why(tmp_path: Path) -> None:
    async def scenario() -> None:
        broker = MemoryBroker()
        yaml = job_yaml(rounds=1, devices=2) + "aggregate: {rule: neighbour_vote, ensemble: uniform}\n"
        async with devices(broker, "a", "b"), coordinator(broker, tmp_path) as service:
            await Operations.of(service).jobs.create(yaml, str(tmp_path))
            await until(lambda: finished(service))
            (only,) = (await Operations.of(service).jobs.show("tiny")).rounds
            assert only.merged.startswith("neighbour_vote: 2 frozen; mlp")
            assert "frozen: 2 updates" in only.reason
            assert only.merged.endswith("frozen: 2 updates, 3 are needed against 1 hostile ones")
            (view,) = (await Operations.of(service).devices.show("a")).contributions
            assert (view.verdict, view.cosine) == ("frozen", 0.0)
            before, after = [
                await Operations.of(service).models.version("tiny", version) for version in ("0", "1")
            ]
            assert before.digests == after.digests

    run(scenario())


def test_a_round_of_an_older_release_has_no_word_about_merging() -> None:
    assert Stats().merged == ""
