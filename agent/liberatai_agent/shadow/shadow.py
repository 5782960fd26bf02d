"""Follows the newest Want: settings at once, then the model, then the agent's release; tells what came of it.

The Want is kept on the disk, so that a device that starts without a broker is as wished all the same. A wish
that cannot be fulfilled leaves the device as it was.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path

from msgspec.structs import replace

from liberatai_agent.config import AgentConfig
from liberatai_agent.privacy import outward
from liberatai_agent.shadow.models import LATER, ONCE_MORE, Models
from liberatai_agent.shadow.tightening import in_force, tightened
from liberatai_agent.store.files import write_durably
from liberatai_core import __version__
from liberatai_core.contract.frame import Keys, expect
from liberatai_core.contract.limits import MAX_SINGLE_BYTES
from liberatai_core.contract.messages import AgentWish, Have, Want, Wishes
from liberatai_core.errors import DiskError, LiberataiError, ReplayError, StateError

log = logging.getLogger(__name__)

FILE = "want.frame"
RETRY_FIRST_S, RETRY_MAX_S = 5.0, 120.0
TRIES = 2
"""Of what a second look may mend."""

Upgrade = Callable[[AgentWish], Awaitable[None]]
"""Brings another release of the agent to run; returns when that is decided for the next start."""


class Shadow:
    """Follows the wishes of the fleet for one device.

    Args:
        config: the device's own settings.
        folder: of the state.
        keys: the coordinator's key.
        models: keeps the model by wish.
        apply: puts settings in force: the settings, and whether training is paused by wish.
        tell: publishes what the device is like.
        upgrade: None: this agent cannot replace itself.

    Attributes:
        want: the newest one; None: there was none.
        have: what is told of it.
        config: settings in force.
    """

    def __init__(
        self,
        config: AgentConfig,
        folder: Path,
        keys: Keys,
        models: Models,
        apply: Callable[[AgentConfig, bool], None],
        tell: Callable[[Have], None],
        upgrade: Upgrade | None = None,
    ) -> None:
        self._own, self._path, self._keys = config, folder / FILE, keys
        self._models, self._apply, self._tell, self._upgrade = models, apply, tell, upgrade
        self._changed = asyncio.Event()
        self.config = config
        self.want: Want | None = None
        self.have = Have(device=config.device, session=0)

    def recall(self) -> None:
        """Put in force what was wished last; a file that cannot be believed is no wish."""
        try:
            with self._path.open("rb") as file:
                frame = file.read(MAX_SINGLE_BYTES + 1024)
            want = expect(frame, Want, self._own.fleet, self._keys)
        except (OSError, LiberataiError):
            return
        if want.device == self._own.device:
            self._take(want)

    def heard(self, want: Want, frame: bytes, epoch: int) -> None:
        """Take a verified Want of this device.

        Raises:
            ReplayError: of an older coordinator than was seen, or an older one than is followed.
            DiskError: it cannot be kept; it is followed until the next start.
        """
        if want.epoch < epoch:
            raise ReplayError(f"a wish of epoch {want.epoch}, {epoch} was seen")
        now = self.want
        if now is not None and (want.epoch, want.version) < (now.epoch, now.version):
            raise ReplayError(f"wish {want.version} of epoch {want.epoch}: {now.version} is followed")
        if now is not None and replace(want, epoch=now.epoch) == now:
            self.want = want
            self.say()
            return
        self._take(want)
        try:
            write_durably(self._path, frame, mode=0o600)
        except OSError as error:
            raise DiskError(f"{self._path}: {error.strerror}") from error

    def _take(self, want: Want) -> None:
        self.want = want
        self.config, limited = tightened(self._own, want.settings)
        self._apply(self.config, want.settings.pause)
        self.have = Have(
            device=self._own.device,
            session=0,
            version=want.version,
            state="working",
            settings=in_force(self.config, want.settings),
            limited=limited,
        )
        self._changed.set()

    def say(self) -> None:
        """Tell what the device is like, if the fleet has ever wished anything."""
        if self.want is not None:
            self._tell(self.have)

    async def run(self) -> None:
        """Follow, for ever."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            if self.want is not None:
                await self._follow(self.want)

    async def _follow(self, want: Want) -> None:
        tries, pause_s = 0, RETRY_FIRST_S
        while not self._changed.is_set():
            try:
                await self._fulfil(want)
            except LiberataiError as error:
                tries += error.code not in LATER
                later = error.code in LATER or (error.code in ONCE_MORE and tries < TRIES)
                log.warning("wish %d: %s %s", want.version, error.code, error)
                text = outward(error.code, str(error))[:512]
                self._set("working" if later else "failed", error.code, text)
                if not later:
                    return
                await self._pause(pause_s)
                pause_s = min(RETRY_MAX_S, 2 * pause_s)
            else:
                return

    async def _fulfil(self, want: Want) -> None:
        evaluation = before = None
        current = self._models.current
        if want.model is None and current is not None:
            self._models.drop()
        elif want.model is not None and (current is None or current.wish != want.model):
            self._set("working", "", "")
            evaluation, before = await self._models.use(want.model)
        elif current is not None:
            evaluation = current.evaluation
        if want.agent is not None and want.agent.version != __version__:
            if self._upgrade is None:
                raise StateError("this agent was not installed in a way that lets it replace itself")
            self._set("working", "", f"to release {want.agent.version}")
            await self._upgrade(want.agent)
        self.have = replace(self.have, evaluation=evaluation, before=before)
        self._set("done", "", "")

    def _set(self, state: str, code: str, text: str) -> None:
        current = self._models.current
        self.have = replace(
            self.have,
            state=state,
            code=code,
            text=text,
            model=current.wish.model if current else "",
            model_version=current.wish.version if current else 0,
            structure=current.structure if current else "",
            agent_version=__version__,
        )
        self.say()

    async def _pause(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._changed.wait()
        except TimeoutError:
            return

    @property
    def wishes(self) -> Wishes:
        """The settings that are wished."""
        return self.want.settings if self.want else Wishes()
