"""A job that ended can be deleted; its versions stay, and a new one of its name makes the same weights again."""

import asyncio
from pathlib import Path

import pytest
from tests.integration.kit import coordinator, devices, job_yaml, until

from liberatai_coordinator.api.operations import Operations
from liberatai_core.errors import ConfigError, NotFoundError, StateError
from liberatai_core.link.memory import MemoryBroker


def test_the_name_of_an_ended_job_is_used_again_and_its_versions_stay(tmp_path: Path) -> None:
    async def scenario() -> None:
        broker = MemoryBroker()
        async with devices(broker, "a", "b"), coordinator(broker, tmp_path) as service:
            ask = Operations.of(service)
            await ask.jobs.create(job_yaml(rounds=2, devices=2), str(tmp_path))
            with pytest.raises(StateError):
                await ask.jobs.delete("tiny")
            await until(lambda: service.ledger.jobs.get("tiny").state == "finished")
            with pytest.raises(ConfigError, match="exists already"):
                await ask.jobs.create(job_yaml(rounds=2, devices=2), str(tmp_path))
            await ask.jobs.delete("tiny")
            assert await ask.jobs.list() == ()
            with pytest.raises(NotFoundError):
                await ask.jobs.show("tiny")
            first = await ask.models.log("tiny")
            assert [view.version for view in first] == [2, 1, 0]

            again = await ask.jobs.create(job_yaml(rounds=2, devices=2), str(tmp_path))
            assert (again.rounds_done, again.rounds) == (0, ())
            await until(lambda: service.ledger.jobs.get("tiny").state == "finished")
            job = await ask.jobs.show("tiny")
            assert (job.rounds_done, job.rounds_total, job.version) == (2, 2, 5)
            assert [view.round for view in job.rounds] == [1, 2]
            both = await ask.models.log("tiny")
            assert both[3:] == first
            assert [view.digests for view in both[:3]] == [view.digests for view in first]
            assert both[2].parent is None

    asyncio.run(scenario())
