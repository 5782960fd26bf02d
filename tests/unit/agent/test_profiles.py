"""The profiles that are shipped, and how settings find them."""

from pathlib import Path
from typing import Any

import pytest

from liberatai_agent.config import AgentConfig, load_profile
from liberatai_core.errors import ConfigError
from liberatai_core.profile import numbers, parse_profile, source_of, trainers

FOLDER = Path(__file__).parents[3] / "device_profiles"
FILES = sorted(FOLDER.glob("*.yaml"))


def a_config(**changes: Any) -> AgentConfig:
    return AgentConfig(fleet="f", device="d", coordinator_key="0" * 64, **changes)


def test_the_promised_classes_are_there() -> None:
    names = "pi-zero-2w pi4 pi5 jetson-nano jetson-orin-nano nuc-n100 android-mid gateway-mcu"
    assert set(names.split()) <= {path.stem for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_profile_is_valid_named_as_its_file_and_says_where_its_numbers_come_from(path: Path) -> None:
    profile = parse_profile(path.read_text(), str(path))
    assert profile.id == path.stem
    assert profile.cpu_share <= profile.cores
    assert [key for key, _ in numbers(profile) if not source_of(profile, key)] == []
    assert trainers(("numpy",), profile.memory_bytes), "no board of this list is too small to train"
    row = next(line for line in (FOLDER / "README.md").read_text().splitlines() if f"`{path.stem}` |" in line)
    assert f"{profile.memory_mb:g} MiB" in row
    assert f"{profile.storage.model_kb / 1024:g} MiB" in row
    assert f"{profile.net.up_mbit:g} / {profile.net.down_mbit:g} Mbit/s" in row


def test_settings_name_a_profile_or_its_file() -> None:
    assert load_profile(a_config()) is None
    for named in ("pi4", "pi4-4g", str(FOLDER / "pi4.yaml")):
        found = load_profile(a_config(profile=named))
        assert found is not None
        assert found.id == "pi4"


def test_an_unknown_profile_is_refused_with_those_that_exist() -> None:
    with pytest.raises(ConfigError, match=r"known: .*pi-zero-2w"):
        load_profile(a_config(profile="pi3"))
    with pytest.raises(ConfigError, match="cannot be read"):
        load_profile(a_config(profile="/nowhere/pi3.yaml"))
