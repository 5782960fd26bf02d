"""Writes the exact versions that the packages hold: `python deploy/packages/lock.py`, then see what changed.

Each file of `locks` has what its layer adds to the one below. Versions only, no addresses: any index will do.
"""

import json
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

HERE = Path(__file__).parent
PYTHON = "3.11"
"""Debian 12."""
ARM_TORCH = "torch==2.9.1"
"""The last one for aarch64 on PyPI that comes without CUDA."""
Versions = dict[str, str]


def resolved(wanted: list[str]) -> Versions:
    """Return name -> version of everything that these requirements need."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        platforms = [f"--platform=manylinux_{glibc}_x86_64" for glibc in ("2_17", "2_27", "2_28")]
        pip = [sys.executable, "-m", "pip", "install", "-q", "--dry-run", "--ignore-installed"]
        place = ["--only-binary=:all:", f"--target={folder}", f"--python-version={PYTHON}", *platforms]
        subprocess.run([*pip, *place, f"--report={report}", *wanted], check=True)
        found = json.loads(report.read_text(encoding="utf-8"))["install"]
    return {
        one["metadata"]["name"].lower().replace("_", "-"): one["metadata"]["version"].split("+")[0]
        for one in found
    }


def main() -> None:
    """Resolve the layers one upon the other and write them."""
    project = tomllib.loads((HERE.parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    layers = {"base": project["dependencies"], "train": extras["train"], "coordinator": extras["coordinator"]}
    (HERE / "locks").mkdir(exist_ok=True)
    known: Versions = {}
    for layer, wanted in layers.items():
        found = resolved([*(f"{name}=={version}" for name, version in known.items()), *wanted])
        lines = sorted(f"{name}=={version}" for name, version in found.items() if name not in known)
        (HERE / "locks" / f"{layer}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        known = found
    train = HERE / "locks" / "train.txt"
    lines = train.read_text(encoding="utf-8").splitlines()
    other = [ARM_TORCH if line.startswith("torch==") else line for line in lines]
    train.rename(train.with_name("train-amd64.txt"))
    train.with_name("train-arm64.txt").write_text("\n".join(other) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
