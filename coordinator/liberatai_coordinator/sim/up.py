"""`liberatai sim up`: from files to a running simulation, and to its record."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from msgspec.structs import replace

from liberatai_coordinator.config import JobSpec, parse_job
from liberatai_coordinator.sim import scenario as scenarios
from liberatai_coordinator.sim import split as splitting
from liberatai_coordinator.sim.control import Control
from liberatai_coordinator.sim.fleet_file import Backend, FleetFile, check, load_fleet
from liberatai_coordinator.sim.record import Record
from liberatai_core.errors import ConfigError

DATA: Final = "data"


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What the command line says; None: as the fleet's file does.

    Attributes:
        data: one file for all devices, which is split; None: training is drawn.
        how: way to split, see `split`.
        test: samples that no device has; None: a tenth of the data is held out.
        image, engine: of containers: what devices run, and podman or docker; None: the one that is there.
    """

    fleet: Path
    job: Path
    data: Path | None
    how: str
    test: Path | None
    folder: Path
    backend: Backend | None = None
    scenario: str | None = None
    seed: int | None = None
    broker: str = "auto"
    image: str = "liberatai-agent"
    engine: str | None = None


def read(wanted: Wanted) -> tuple[FleetFile, scenarios.Scenario, JobSpec, str]:
    """Return what is simulated, checked.

    Raises:
        ConfigError: a file has faults, or something is missing.
    """
    fleet = load_fleet(wanted.fleet)
    changes: dict[str, Any] = {"backend": wanted.backend, "scenario": wanted.scenario, "seed": wanted.seed}
    fleet = replace(fleet, **{name: value for name, value in changes.items() if value is not None})
    check(fleet, str(wanted.fleet))
    splitting.check(wanted.how)
    try:
        text = wanted.job.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(str(wanted.job), [f"cannot be read: {error}"]) from None
    if fleet.training == "real" and wanted.data is None:
        raise ConfigError("--data", ["missing: give a .npz, or `training: drawn` in the fleet's file"])
    return fleet, scenarios.load_scenario(fleet.scenario), parse_job(text, str(wanted.job)), text


def run(
    wanted: Wanted,
    told: Callable[[str], None] = lambda _: None,
    on_round: Callable[[int, int], None] = lambda _, __: None,
) -> Record:
    """Simulate one job.

    Args:
        wanted: what.
        told: gets a line for people now and then.
        on_round: gets the rounds that have ended, and how many there are.

    Raises:
        LiberataiError: it cannot start, or the job did not end.
    """
    fleet, scenario, job, text = read(wanted)
    wanted.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    files: dict[str, Path] = {}
    test: tuple[Any, Any] | None = None
    if fleet.training == "real" and wanted.data is not None:
        profiles = fleet.profiles()
        parts = {name: profiles[profile].parts for name, profile in fleet.names().items()}
        files, test = splitting.split(wanted.data, parts, wanted.how, fleet.seed, wanted.folder / DATA)
        if wanted.test is not None:
            test = _test(wanted.test)
    devices = sum(fleet.devices.values())
    told(f"{devices:,} devices, {fleet.backend} backend, scenario {scenario.name}: {scenario.description}")
    base = str(wanted.job.absolute().parent)

    def virtual() -> Record:
        from liberatai_coordinator.sim.virtual import world  # noqa: PLC0415 - another backend needs none

        with world.quick_folder() as folder:
            return world.simulate(
                world.Given(
                    fleet=fleet,
                    scenario=scenario,
                    job=job,
                    base_dir=base,
                    data={name: str(path.absolute()) for name, path in files.items()},
                    samples={name: _samples(path) for name, path in files.items()},
                    test=test,
                    on_round=lambda number: on_round(number, job.rounds.count),
                ),
                folder,
            )

    def real() -> Record:
        from liberatai_coordinator.sim.process import backend  # noqa: PLC0415 - see above

        given = backend.Given(
            fleet=fleet,
            scenario=scenario,
            job=job,
            text=text,
            base_dir=base,
            data=files,
            test=test,
            broker=wanted.broker,
            on_round=lambda view: on_round(sum(one.state != "open" for one in view.rounds), job.rounds.count),
        )
        state = wanted.folder / "state"
        simulated = backend.ProcessFleet(given, state)
        if fleet.backend == "container":
            from liberatai_coordinator.sim.container import backend as containers  # noqa: PLC0415 - see above
            from liberatai_coordinator.sim.container.engine import find_engine  # noqa: PLC0415

            simulated = containers.ContainerFleet(given, state, find_engine(wanted.image, wanted.engine))
        handlers = {
            "status": lambda _: simulated.status(),
            "scale": lambda asked: simulated.scale(str(asked["profile"]), int(asked["count"])),
            "fault": lambda asked: simulated.fault(
                asked["what"], str(asked["device"]), float(asked["for_s"])
            ),
            "down": lambda _: simulated.stop(),
        }
        with Control(wanted.folder, handlers):
            return simulated.run()

    return virtual() if fleet.backend == "virtual" else real()


def _test(path: Path) -> tuple[Any, Any]:
    x, y, _ = splitting.arrays(path)
    return x.astype(np.float32), y.astype(np.int64)


def _samples(path: Path) -> int:
    with np.load(path, allow_pickle=False) as file:
        return len(file["y"])
