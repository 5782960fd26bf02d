"""What a client may ask about what devices shall be like, and wish."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from liberatai_coordinator.api.names import not_found
from liberatai_coordinator.client.fleet_views import ShadowView
from liberatai_coordinator.control.shadows import Shadow
from liberatai_coordinator.service import Service
from liberatai_core.contract.messages import Wishes
from liberatai_core.errors import ConfigError, LiberataiError, NotFoundError
from liberatai_core.spelling import meant

SETTINGS: Final = Wishes.__struct_fields__
"""What may be wished of settings: nothing else, whatever a client sends."""


@dataclass(frozen=True, slots=True)
class ShadowOperations:
    """Shadows of a coordinator's devices."""

    service: Service

    async def show(self, device: str) -> ShadowView:
        """Return what a device shall be like, and what it is like by its own word."""
        await self._known(device)
        return shadow_view(device, self.service.shadows.of(device))

    async def change(self, device: str, settings: Mapping[str, bool | float | None]) -> ShadowView:
        """Wish settings of a device; None: as the device has it. Those that are not named stay as wished.

        Raises:
            ConfigError: a setting that may not be wished, or a value that it cannot have.
        """
        await self._known(device)
        before = self.service.shadows.of(device).desired
        wishes = changed(before.settings, settings)
        desired = msgspec.structs.replace(before, settings=wishes)
        return shadow_view(device, await self.service.shadows.wish(device, desired))

    async def _known(self, name: str) -> None:
        try:
            self.service.fleet.require(name)
        except NotFoundError as error:
            raise await not_found(error, name, list(self.service.fleet.devices)) from None


def changed(before: Wishes, settings: Mapping[str, bool | float | None]) -> Wishes:
    """Return wishes with some settings changed.

    Raises:
        ConfigError: with every fault.
    """
    faults, found = [], plain(before)
    for name, value in settings.items():
        if name not in SETTINGS:
            hint = meant(name, SETTINGS) or f"; only {', '.join(SETTINGS)}"
            faults.append(f"{name}: may not be wished{hint}")
        elif value is None:
            found.pop(name, None)
        else:
            found[name] = value
    for name in [name for name in found if name in settings]:
        try:
            msgspec.convert({name: found[name]}, Wishes)
        except (msgspec.ValidationError, LiberataiError) as error:
            faults.append(f"{name}: {str(error).split(' - at')[0]}")
    if faults:
        raise ConfigError("settings", faults)
    return msgspec.convert(found, Wishes)


def plain(wishes: Wishes) -> dict[str, Any]:
    """Return the settings that are wished, by name."""
    return {name: value for name, value in msgspec.to_builtins(wishes).items() if value is not None}


def shadow_view(device: str, shadow: Shadow) -> ShadowView:
    """Return a shadow."""
    have, wished = shadow.have, shadow.desired.model
    heard = have is not None and have.version == shadow.version
    reported = plain(have.settings) if have is not None else {}
    desired = plain(shadow.desired.settings)
    model = f"{wished.model}:{wished.version}" if wished else ""
    used = f"{have.model}:{have.model_version}" if have is not None and have.model else ""
    differs = [name for name, value in desired.items() if reported.get(name) != value]
    differs += ["model"] if model != used and (model or used) else []
    agent = shadow.desired.agent
    if agent is not None and (have is None or have.agent_version != agent.version):
        differs.append("agent")
    return ShadowView(
        device=device,
        version=shadow.version,
        since_s=shadow.updated_s,
        state="" if not shadow.version else have.state if have is not None and heard else "not heard",
        code=have.code if have is not None and heard else "",
        text=have.text if have is not None and heard else "",
        desired=desired,
        reported=reported,
        limited=have.limited if have is not None else (),
        model=model,
        model_reported=used,
        agent=agent.version if agent else "",
        agent_reported=have.agent_version if have is not None else "",
        evaluation=have.evaluation if have is not None else None,
        before=have.before if have is not None else None,
        differs=tuple(differs),
    )
