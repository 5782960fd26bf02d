"""The benchmark of gathered hostile devices: they are in one structure, and the others still learn."""

import json
from pathlib import Path

import pytest
from benchmarks.aggregator import world
from benchmarks.robustness_tier import ATTACKS, Row, main, parsed, places_of, run_arm, summary

SMALL = (
    "--quick --alpha 0.5 --devices 8 --structures 2 --rounds 2 --public 60 --validation 60 --teach-steps 10"
)


def test_hostile_devices_are_of_the_largest_structure_and_never_all_of_it() -> None:
    options = parsed([*SMALL.split(), "--hostile", "0.45"])
    given = world(options)
    places = places_of(options, given)
    assert {given.owners[place] for place in places} == {1}
    assert len(places) == given.owners.count(1) - 1


@pytest.mark.parametrize("attack", ["absent", *ATTACKS])
def test_every_arm_runs_to_its_end(attack: str) -> None:
    options = parsed(SMALL.split())
    row = run_arm((options, world(options), attack))
    assert row.attack == attack
    assert set(row.students) == set(world(options).ids)
    assert all(0 <= value <= 1 for value in [row.ensemble, *row.students.values()])


def test_losses_are_told_against_the_fleet_without_them() -> None:
    def row(attack: str, small: float, large: float, ensemble: float) -> Row:
        return Row(
            attack=attack, students={"s": small, "l": large}, ensemble=ensemble, guard="g", seconds=0.0
        )

    found = summary(["s", "l"], [row("absent", 0.9, 0.8, 0.95), row("noise", 0.85, 0.5, 0.94)])
    assert found["attacks"]["noise"] == {
        "ensemble_loss": 1.0,
        "worst_other_loss": 5.0,
        "poisoned_loss": 30.0,
        "guard": "g",
    }


def test_the_last_line_is_json(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(
        "sys.argv", ["robustness_tier", *SMALL.split(), "--attacks", "noise", "--workers", "1"]
    )
    monkeypatch.chdir(tmp_path)
    assert main() == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["hostile_devices"] == 2
    assert set(found["attacks"]) == {"noise"}
