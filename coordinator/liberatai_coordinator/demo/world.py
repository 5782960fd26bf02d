"""What the demo makes up: data, the job and its devices."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from liberatai_coordinator.config import JobSpec, parse_job
from liberatai_coordinator.demo import digits
from liberatai_coordinator.local import LocalDevice
from liberatai_core.errors import ConfigError, MissingExtraError

PROFILES: Final = ("demo-nuc", "demo-jetson-nano", "demo-pi4", "demo-pi-zero-2w")
"""Dealt out in turn, the most capable first."""
SMALLEST: Final = "demo-small-board"
SMALLEST_FROM: Final = 8
"""Devices from which the last one is the smallest: it trains a head."""
TEMPLATES: Final = Path(__file__).parent / "templates"
PROFILES_DIR: Final = TEMPLATES / "profiles"
MAX_ROUNDS: Final = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the user asked for; see `run`."""

    devices: int
    rounds: int
    seed: int
    broker: str
    report: Path


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class World:
    """What the demo made up: data, job and devices.

    Attributes:
        text: the job's YAML.
    """

    samples: digits.Samples
    parts: digits.Split
    devices: tuple[LocalDevice, ...]
    job: JobSpec
    text: str

    @property
    def test(self) -> digits.Samples:
        """The digits that only the report sees."""
        return self.samples.pick(self.parts.test)

    @property
    def pooled(self) -> digits.Samples:
        """All private digits in one place: what the devices avoid, and the baseline."""
        return self.samples.pick(np.concatenate(self.parts.devices))


def prepare(options: Options, folder: Path) -> World:
    """Split the digits, write every file and the job's YAML into a folder.

    Raises:
        ConfigError: options that the demo cannot serve.
    """
    faults = []
    if not 1 <= options.rounds <= MAX_ROUNDS:
        faults.append(f"--rounds: must be from 1 to {MAX_ROUNDS} (got {options.rounds})")
    if not 0 <= options.seed < 2**31:
        faults.append(f"--seed: must be from 0 to {2**31 - 1} (got {options.seed})")
    if faults:
        raise ConfigError("demo", faults)
    samples = digits.load()
    parts = digits.split(samples.y, options.devices, options.seed)
    profiles = [PROFILES[place % len(PROFILES)] for place in range(options.devices)]
    if options.devices >= SMALLEST_FROM:
        profiles[-1] = SMALLEST
    names = [f"{profile.removeprefix('demo-')}-{place + 1}" for place, profile in enumerate(profiles)]
    files = digits.write(samples, parts, folder / "data", names)
    text = _job_text(options, folder / "data")
    (folder / "job.yaml").write_text(text, encoding="utf-8")
    return World(
        samples=samples,
        parts=parts,
        devices=tuple(
            LocalDevice(id=name, data=files[name], profile=PROFILES_DIR / f"{profile}.yaml")
            for name, profile in zip(names, profiles, strict=True)
        ),
        job=parse_job(text, "job.yaml"),
        text=text,
    )


def _job_text(options: Options, data: Path) -> str:
    try:
        import jinja2  # noqa: PLC0415 - only the demo needs it
    except ImportError as error:
        raise MissingExtraError("the demo needs jinja2: pip install 'liberatai[demo]'") from error
    environment = jinja2.Environment(  # noqa: S701 - YAML, not HTML; every value is a number or our own path
        loader=jinja2.FileSystemLoader(TEMPLATES), undefined=jinja2.StrictUndefined
    )
    return environment.get_template("demo_job.yaml.j2").render(
        devices=options.devices,
        rounds=options.rounds,
        seed=options.seed,
        unlabeled=data / "unlabeled.npz",
        validation=data / "validation.npz",
    )
