"""Each misdeed of a device is refused with its code and counted, and nobody else notices."""

import contextlib
import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.integration.kit import ScriptedDevice, coordinator, devices, job_yaml, until
from tests.integration.misdeeds import LAST, MISDEEDS, Scene, event
from tests.link.test_misdeeds_at_broker import AT_BROKER

from liberatai_coordinator.api.operations import Operations
from liberatai_core.contract.frame import seal
from liberatai_core.contract.messages import Update
from liberatai_core.link.memory import MemoryBroker

pytestmark = pytest.mark.anyio
SECURITY = Path(__file__).parents[2] / "SECURITY.md"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@contextlib.asynccontextmanager
async def a_scene(folder: Path) -> AsyncIterator[Scene]:
    broker = MemoryBroker()
    async with coordinator(broker, folder) as service, devices(broker, "evil", "honest") as (evil, honest):
        evil.answers = honest.answers = False
        await until(lambda: service.fleet.ready_names == {"evil", "honest"})
        await Operations.of(service).jobs.create(job_yaml(rounds=1, devices=2, quorum=0.5), str(folder))
        yield Scene(service, evil, honest, await update_of(evil))


async def update_of(device: ScriptedDevice) -> Update:
    """Return the update that an open round waits for, before it is sent."""
    await until(lambda: bool(device.tasks))
    task = device.tasks[-1]
    await until(
        lambda: task.spec.blob in device.blobs and all(step.blob.blob in device.blobs for step in task.steps)
    )
    return device.train(task)


def counted(scene: Scene, code: str) -> int:
    return sum(codes[code] for codes in scene.service.fleet.refusals.values())


async def refused(scene: Scene, name: str, number: int) -> None:
    """Do it: it is counted under its code, and the honest device is heard as before."""
    code, act = MISDEEDS[name]
    before = counted(scene, code)
    await act(scene)
    try:
        await until(lambda: counted(scene, code) > before)
    except TimeoutError:
        raise AssertionError(f"{name}: not refused with {code}; {scene.service.fleet.refusals}") from None
    word = seal(event("honest", number=number), scene.honest.signer)
    await scene.honest.link.publish(scene.honest.topics.up("honest", "ev"), word)
    known = scene.service.fleet.devices

    def heard() -> bool:
        last = known["honest"].last_event
        return last is not None and last.number == number

    await until(heard)


async def undisturbed(scene: Scene) -> None:
    """The honest device is who it was, its update counts, and nothing of the other one does."""
    scene.honest.answers = True
    await scene.honest._answer(scene.honest.tasks[-1])
    await until(lambda: any(receipt.accepted for receipt in scene.honest.receipts))
    assert not any(receipt.accepted for receipt in scene.evil.receipts)
    honest = scene.service.fleet.devices["honest"]
    assert (honest.public_key, honest.status) == (scene.honest.signer.public_key, "approved")
    assert honest.online
    assert "weak" not in scene.service.fleet.devices


async def test_misdeeds_are_refused_with_a_code_and_counted_and_others_are_not_disturbed(
    tmp_path: Path,
) -> None:
    async with a_scene(tmp_path) as scene:
        for number, name in enumerate((one for one in MISDEEDS if one not in LAST), 1):
            await refused(scene, name, number)
        await undisturbed(scene)


@pytest.mark.parametrize("name", LAST)
async def test_a_misdeed_after_which_little_can_be_said_is_refused_and_counted(
    name: str, tmp_path: Path
) -> None:
    async with a_scene(tmp_path) as scene:
        await refused(scene, name, 1)
        await undisturbed(scene)


def test_every_misdeed_stands_in_the_table_with_its_code() -> None:
    rows = re.findall(
        r"^\| ([^|]+) \| (broker|coordinator) \| `?([^|`]+)`? \|$", SECURITY.read_text(), re.MULTILINE
    )
    expected = [(name, "coordinator", code) for name, (code, _) in MISDEEDS.items()]
    expected += [(name, "broker", words) for name, words in AT_BROKER.items()]
    assert sorted(rows) == sorted(expected)
    assert len(rows) >= 40
