"""What the Debian packages pin is what the project asks for, and complete."""

import importlib.util
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PACKAGES = ROOT / "deploy" / "packages"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]


def locked(*layers: str) -> dict[str, str]:
    """Return name -> version of these layers; each name is in one of them only."""
    found: dict[str, str] = {}
    for layer in layers:
        for line in (PACKAGES / "locks" / f"{layer}.txt").read_text(encoding="utf-8").split():
            name, version = line.split("==")
            assert canonicalize_name(name) == name
            assert name not in found, f"{name} is in two layers: two packages would own its files"
            found[name] = version
    return found


@pytest.mark.parametrize(
    ("wanted", "layers"),
    [
        (PROJECT["dependencies"], ["base"]),
        (EXTRAS["train"], ["base", "train-amd64"]),
        (EXTRAS["train"], ["base", "train-arm64"]),
        (EXTRAS["coordinator"], ["base", "train-amd64", "coordinator"]),
        (EXTRAS["coordinator"], ["base", "train-arm64", "coordinator"]),
    ],
)
def test_packages_hold_what_the_project_asks_for(wanted: list[str], layers: list[str]) -> None:
    """Else: `python deploy/packages/lock.py`."""
    found = locked(*layers)
    for requirement in map(Requirement, wanted):
        version = found.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement.name} is in no lock"
        assert requirement.specifier.contains(version), f"{requirement}, locked {version}"


def test_a_torch_that_needs_cuda_is_refused_with_the_way_out(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("layer", PACKAGES / "layer.py")
    assert spec is not None
    assert spec.loader is not None
    layer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(layer)
    (tmp_path / "torch" / "lib").mkdir(parents=True)
    layer.require_no_cuda(tmp_path)
    (tmp_path / "torch" / "lib" / "libtorch_cuda.so").touch()
    with pytest.raises(SystemExit, match="PIP_EXTRA_INDEX_URL"):
        layer.require_no_cuda(tmp_path)


def test_every_unit_is_in_a_package() -> None:
    recipes = "".join(path.read_text(encoding="utf-8") for path in PACKAGES.glob("*.yaml"))
    units = {path.name for path in (ROOT / "deploy" / "systemd").glob("liberatai*")}
    assert units == set(re.findall(r"deploy/systemd/(liberatai[^\"/, ]+)", recipes))
