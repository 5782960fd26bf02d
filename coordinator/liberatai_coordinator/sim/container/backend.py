"""A simulated fleet in containers: agents as an image has them, limits that the kernel keeps, mutual TLS."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

from liberatai_coordinator.local.fleet import MUTUAL_TLS
from liberatai_coordinator.local.process import Process
from liberatai_coordinator.sim.container.agents import Container, contained, limits_of
from liberatai_coordinator.sim.container.engine import Engine
from liberatai_coordinator.sim.process.backend import Given, ProcessFleet
from liberatai_core.errors import LinkError, TrainingError

START_S: Final = 120.0
"""For a container to run: fifty of them start one after another."""
LOOK_S: Final = 0.2


class ContainerFleet(ProcessFleet):
    """A fleet of which every device is a container; broker and coordinator are child processes.

    Links are shaped by the same proxies as in `ProcessFleet`; processors, memory and the number of processes
    are limited by the kernel, and every container is asked before the job begins whether that is true.
    """

    backend = "container"

    def __init__(self, given: Given, folder: Path, engine: Engine) -> None:
        """Set up, without starting anything.

        Raises:
            ConfigError: the fleet or the scenario needs another backend, or the engine cannot do it.
            NotFoundError: there is no such image.
        """
        engine.require_image()
        self._engine = engine
        self._containers: dict[str, Container] = {}
        self._house: Callable[[Process], Container] | None = None
        super().__init__(given, folder)

    def _broker(self) -> str:
        return MUTUAL_TLS if self._given.broker == "auto" else self._given.broker

    def _limits_of(self, device: str) -> None:
        """The kernel keeps them."""

    def _housed(self, agent: Process) -> Process:
        if self._house is None:
            of = {name: self._profiles[profile] for name, profile in self._all.items()}
            label = f"{self._given.fleet.fleet}-{os.getpid()}"
            self._house = contained(self._engine, label, of, self._files)
        made = self._house(agent)
        self._containers[agent.name] = made
        return made

    def _files(self, device: str) -> list[Path]:
        files = [self._data_of(device).absolute()]
        if self._given.fleet.profiles_dir:
            files.append(Path(self._given.fleet.profiles_dir).absolute())
        profile = Path(self._all[device])
        if "/" in self._all[device]:
            files.append(profile.absolute())
        return files

    def _started(self) -> None:
        for device in sorted(self._active):
            container = self._containers[device]
            self._wait_for(container)
            container.require_limits(limits_of(self._profiles[self._all[device]]))

    def _wait_for(self, container: Container) -> None:
        waited = 0.0
        while not self._engine.is_running(container.container):
            container.require_alive()
            if waited >= START_S:
                raise LinkError(f"{container.name}: its container does not start; log:\n{container.tail()}")
            if self._stop.wait(LOOK_S):
                raise TrainingError("stopped before the job began")
            waited += LOOK_S
