"""`liberatai profiles`: what the classes of hardware are, and where their numbers come from."""

import json
from pathlib import Path
from typing import Any

from liberatai_coordinator.cli import main
from liberatai_coordinator.cli.profiles import UNITS
from liberatai_core.profile import numbers, profile_names, shipped_profiles


def test_all_shipped_profiles_are_listed_and_what_is_assumed_is_marked(capsys: Any) -> None:
    assert main(["profiles", "list"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert set(profile_names()) <= set(lines)
    assert "7.3*" in lines["android-mid"]
    assert "3.9 " in lines["pi4"]


def test_every_number_of_every_profile_has_a_unit_and_a_source(capsys: Any) -> None:
    for name in profile_names():
        assert main(["profiles", "show", name]) == 0
        shown = capsys.readouterr().out
        assert "not given" not in shown
    assert main(["profiles", "show", "pi4", "-o", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["storage"]["model_kb"] == 16384


def test_a_profile_of_ones_own_is_shown_and_an_unknown_one_refused(tmp_path: Path, capsys: Any) -> None:
    text = (shipped_profiles() / "pi4.yaml").read_text().replace("id: pi4", "id: mine")
    (tmp_path / "mine.yaml").write_text(text)
    assert main(["profiles", "list", "--dir", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[1].startswith("mine")
    assert main(["profiles", "show", "toaster"]) == 2
    assert "known: android-mid" in capsys.readouterr().err


def test_the_units_are_those_of_the_numbers() -> None:
    from liberatai_core.profile import load_profile

    shown = {key for name in profile_names() for key, _ in numbers(load_profile(name, "p"))}
    assert shown <= set(UNITS)
