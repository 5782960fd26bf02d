"""An agent in a container instead of a child process: the same words, other means."""

import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from liberatai_coordinator.local.process import Process
from liberatai_coordinator.sim.container.engine import HOST, USER, Engine, Limits
from liberatai_core.errors import LinkError
from liberatai_core.profile import Profile

STOP_S: Final = 20.0
"""An agent says goodbye, and the engine takes the container away."""
LEAST_CPUS: Final = 0.01


class Container(Process):
    """One container that runs an agent in the foreground of its engine's command."""

    def __init__(self, engine: Engine, container: str, name: str, command: list[str], log: Path) -> None:
        """Set up, without starting anything."""
        super().__init__(name, command, log, also=engine.environment())
        self.engine, self.container = engine, container

    def start(self) -> None:
        """Start it, unless it runs; what is left of one that was killed is taken away before."""
        if self.pid is None:
            self.engine.remove(self.container)
        super().start()

    def signal(self, how: signal.Signals) -> None:
        """Send a signal to what runs in it."""
        if self.pid is not None:
            self.engine.kill(self.container, how.name.removeprefix("SIG"))

    def kill(self) -> None:
        """End it as a crash does."""
        self.engine.remove(self.container)
        self.wait()
        self._child = None

    def wait(self, timeout_s: float = STOP_S) -> None:
        """Wait for its end; after the time, take it away."""
        super().wait(timeout_s)
        if self._child is not None:
            self.engine.remove(self.container)

    def require_limits(self, wanted: Limits) -> None:
        """Raise unless the limits are there, as a process inside it sees them.

        Raises:
            LinkError: they are not: an engine may be set up so that it ignores them.
        """
        seen = self.engine.seen(self.container)
        near = abs(seen.cpus - wanted.cpus) <= 0.02 * wanted.cpus
        if not near or abs(seen.memory_bytes - wanted.memory_bytes) > 1 << 20 or seen.pids != wanted.pids:
            raise LinkError(
                f"{self.name}: the container has {seen.memory_bytes} bytes, {seen.cpus:g} processors and "
                f"{seen.pids} processes, not {wanted.memory_bytes}, {wanted.cpus:g} and {wanted.pids}: "
                f"{Path(self.engine.program).name} ignores limits on this machine"
            )


def limits_of(profile: Profile) -> Limits:
    """Return what a device of a class gets: what its profile lets training use."""
    cpus = min(profile.cpu_share, float(os.cpu_count() or 1))
    return Limits(memory_bytes=profile.memory_bytes & ~4095, cpus=max(LEAST_CPUS, cpus))


def contained(
    engine: Engine, label: str, profiles: Mapping[str, Profile], files: Callable[[str], list[Path]]
) -> Callable[[Process], Container]:
    """Return what turns an agent's process into a container.

    Args:
        engine: podman or docker.
        label: begins the containers' names: two simulations on one machine do not meet.
        profiles: class of hardware by device.
        files: what a device may read beside its own folder.
    """

    def of(process: Process) -> Container:
        folder, device = process.log.parent, process.name
        user = 0 if engine.image == HOST else USER
        _give(folder, user)
        mounts = {folder: "rw"} | dict.fromkeys(files(device), "ro")
        command = process.command
        if engine.image != HOST:
            command = command[command.index("liberatai_agent") + 1 :]  # the image knows its program
        name = f"{label}-{device}"
        words = engine.run_command(name, limits_of(profiles[device]), mounts, command, user)
        return Container(engine, name, device, words, process.log)

    return of


def _give(folder: Path, user: int) -> None:
    """Let the container's user own a device's files, where we may say so."""
    if os.geteuid() != 0:
        return
    for path in [folder, *folder.rglob("*")]:
        os.chown(path, user, 0, follow_symlinks=False)
