"""Whoever misspells a name is told which one was meant."""

import pytest

from liberatai_core.errors import ConfigError
from liberatai_core.learning.families import known_families
from liberatai_core.learning.families.parts import only
from liberatai_core.profile import load_profile
from liberatai_core.settings import parse
from liberatai_core.spelling import MANY, meant

KNOWN = ["gateway-01", "camera-07", "PI"]


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("gatway-01", "; did you mean gateway-01?"),
        ("CAMERA-07", "; did you mean camera-07?"),
        ("pi", "; did you mean PI?"),
        ("x", ""),
        ("", ""),
        ("g" * 10_000, ""),
    ],
)
def test_the_likest_name_is_offered_if_one_is_like_it(name: str, hint: str) -> None:
    assert meant(name, KNOWN) == hint


def test_no_more_names_than_take_a_moment_are_looked_through() -> None:
    assert meant("zebra-1", (f"device-{n}" for n in range(MANY))) == ""
    endless = iter(lambda: "device", None)
    assert meant("devise", endless) == "; did you mean device?"


def test_words_of_settings_parameters_of_families_and_profiles_are_offered() -> None:
    from liberatai_coordinator.config import parse_job

    job = (
        "name: a\ndata: {input_shape: [2], classes: 2}\n"
        "structures: [{family: mlp, params: {hidden: 4}}]\naggregate: {rule: screned_mean}\n"
    )
    with pytest.raises(ConfigError, match=r"aggregate\.rule: .*screened_mean.*did you mean screened_mean\?"):
        parse_job(job, "job.yaml")
    with pytest.raises(Exception, match=r"unknown parameter 'hiden'; did you mean hidden\?"):
        only({"hiden": 4}, "mlp", {"hidden"})
    with pytest.raises(ConfigError, match=r"no profile 'p4' .*did you mean pi4\?"):
        load_profile("p4", "profile")
    assert meant("mobilnet", known_families()) == "; did you mean mobilenet?"


def test_keys_are_offered_too() -> None:
    from liberatai_agent.config import AgentConfig

    with pytest.raises(ConfigError, match=r"state_dri: unknown key; did you mean state_dir\?"):
        parse("state_dri: x\n", AgentConfig, "agent.yaml")
