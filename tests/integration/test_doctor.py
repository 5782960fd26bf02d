"""`doctor` names what is wrong and what to do, for typical mistakes in settings, certificates and data."""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from benchmarks.doctor import DEVICE, MISTAKES, Asked, Mistake, World, a_world, ask, faults, written

from liberatai_agent.cli import main
from liberatai_coordinator.brokers.start import find_mosquitto

pytestmark = pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed")


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with tempfile.TemporaryDirectory(prefix="liberatai-doctor-") as folder, a_world(Path(folder)) as made:
        yield made


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda one: one.name)
def test_a_mistake_is_named_with_what_to_do(world: World, mistake: Mistake) -> None:
    code, said, _ = ask(world, mistake.make)
    assert faults(mistake, code, said) == [], said
    assert "Traceback" not in said


def test_a_healthy_device_is_told_so_and_its_test_word_came_back(world: World) -> None:
    code, said, _ = ask(world, lambda one: Asked(settings=one.settings(data=str(one.data()))))
    assert code == 0, said
    assert "FAIL" not in said
    assert "rights: a test word was said and heard" in said
    assert "coordinator: co1 of fleet home has the key that is obeyed" in said
    assert "days left" in said


def test_the_doctor_changes_nothing(world: World) -> None:
    ask(world, lambda one: Asked(settings=one.settings()))
    assert {path.name for path in world.folder.iterdir()} == {"settings.yaml"}


def test_programs_read_the_findings_as_json(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    world.folder = Path(tempfile.mkdtemp(dir=world.root))
    path = world.folder / "settings.yaml"
    path.write_text(written(world.settings(device="dev-b")))
    assert main(["doctor", "--config", str(path), "-o", "json"]) == 1
    found = json.loads(capsys.readouterr().out)
    (failed,) = [one for one in found if one["state"] == "fail"]
    assert failed["check"] == "certificate"
    assert DEVICE in failed["text"]
    assert failed["remedy"]
    assert main(["doctor", "--config", str(path), "-o", "name"]) == 1
    assert capsys.readouterr().out == "certificate\n"
