"""The report of any job: the guard's verdict is the headline, and whatever is unknown is said to be."""

import json
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.unit.coordinator.api_kit import JOB, MemoryOperations, served

from liberatai_coordinator.cli.app import main
from liberatai_coordinator.client.views import (
    AssignmentView,
    CentralView,
    DeviceView,
    EnsembleView,
    JobView,
    LocalView,
    PlanView,
    RoundView,
    ScoreView,
    StructureView,
)
from liberatai_coordinator.pictures.job_report import html, report_of, verdict

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")


def a_round(number: int, **changes: Any) -> RoundView:
    scores = {"cnn": 0.8, "mlp": 0.6}
    whole = RoundView(
        round=number,
        state="published",
        invited=4,
        updates=4,
        seconds=2.5,
        up_bytes=1000,
        down_bytes=3000,
        use="cnn",
        guard="cnn 80.0 % is better than the ensemble 71.0 %",
        merged="mean: 4 accepted",
        central=CentralView(version=number, samples=1200, structures=scores, ensemble=0.8),
    )
    return msgspec.structs.replace(whole, **changes)


def a_job(*rounds: RoundView, **changes: Any) -> JobView:
    structures = (
        StructureView(id="cnn", family="cnn", parameters=1000, devices=1),
        StructureView(id="mlp", family="mlp", parameters=100, devices=1),
    )
    whole = JobView(
        name="digits",
        state="finished",
        rounds_done=len(rounds),
        rounds_total=3,
        created_s=1.7e9,
        structures=structures,
        rounds=rounds,
        updates=8,
        up_bytes=2000,
        down_bytes=6000,
    )
    return msgspec.structs.replace(whole, **changes)


PLAN = PlanView(job="digits", assignments=(), structures=())
ENSEMBLE = EnsembleView(
    method="stacking", members=("cnn", "mlp"), weights=((1.0, 0.5), (0.1, 0.2)), use="cnn"
)


def test_the_headline_is_the_guards_verdict_not_an_ensemble_that_is_not_used() -> None:
    told = report_of(a_job(a_round(1), a_round(2)), PLAN, (), (), ENSEMBLE)
    assert told.verdict == "cnn alone answers: the guard does not use the ensemble"
    assert (told.accuracy, told.measured) == (0.8, "the guard's 1,200 labels")
    page = html(told)
    headline = re.search("<h1>(.*?)</h1>", page)
    assert headline is not None
    assert headline[1] == f"digits: {told.verdict}"
    assert "cnn 80.0 % is better than the ensemble" in page
    assert page.count("data:image/png;base64,") == 2
    assert "<script" not in page
    assert "http" not in page


def test_who_answers_is_said_for_every_outcome() -> None:
    assert verdict(None) == "no version yet: nobody answers"
    assert verdict(a_round(1, use="ensemble")) == "all structures together answer"
    assert verdict(a_round(1, use="")) == "all structures together answer"


def test_a_job_without_labels_says_so_and_shows_what_devices_measured() -> None:
    local = LocalView(version=0, all=ScoreView(accuracy=0.5, correct=5, total=10, devices=2))
    told = report_of(a_job(a_round(1, central=None, local=local)), PLAN, (), (), None)
    assert (told.accuracy, told.measured) == (0.5, "what devices hold out of their own data")
    none = report_of(a_job(a_round(1, central=None), lacks=("teach.unlabeled: nothing",)), PLAN, (), (), None)
    assert none.accuracy is None
    page = html(none)
    assert "nobody measured it" in page
    assert "teach.unlabeled: nothing" in page


def test_a_job_that_has_just_begun_has_a_page_too() -> None:
    told = report_of(a_job(structures=(), updates=0, up_bytes=0, down_bytes=0), PLAN, (), (), None)
    assert told.ratio == 0.0
    assert "nobody answers" in html(told)


def test_names_from_outside_are_no_markup() -> None:
    memory = MemoryOperations()
    device: DeviceView = next(iter(memory.fleet.values()))
    plan = msgspec.structs.replace(
        PLAN,
        assignments=(
            AssignmentView(
                device=device.id,
                profile="<script>x</script>",
                tier="full",
                structure="cnn",
                variant_bytes=10,
                budget_bytes=100,
                density=0.1,
                why="it fits; <b>",
            ),
        ),
    )
    told = report_of(a_job(a_round(1)), plan, [device], (), None)
    assert told.dense_bytes == 2 * 4 * 8 * 1000
    page = html(told)
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


def test_the_command_writes_page_and_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    memory, socket = MemoryOperations(), tmp_path / "api.sock"
    monkeypatch.setenv("LIBERATAI_SOCKET", str(socket))
    (tmp_path / "job.yaml").write_text(JOB)
    with served(memory, socket):
        assert main(["jobs", "create", "-f", str(tmp_path / "job.yaml")]) == 0
        memory.look = lambda job: msgspec.structs.replace(job, rounds=(a_round(1),), version=2)
        capsys.readouterr()
        assert main(["jobs", "report", "digits", "--out", str(tmp_path / "out")]) == 0
        out = capsys.readouterr().out
        assert main(["jobs", "report", "digits", "-o", "json"]) == 0
        printed = json.loads(capsys.readouterr().out)
        assert main(["jobs", "report", "digts"]) == 4
    assert "cnn alone answers: the guard does not use the ensemble, 80.0% right on" in " ".join(out.split())
    record = json.loads((tmp_path / "out" / "report.json").read_text())
    assert record == printed
    assert record["devices"][0]["why"].startswith("the largest that fits; link of 64 kbit/s")
    assert (tmp_path / "out" / "report.html").read_text().startswith("<!doctype html>")
