"""What a client may ask of a coordinator, by noun. Every method raises LiberataiErrors only.

Unknown names raise NotFoundError; settings with faults raise ConfigError.
"""

from dataclasses import dataclass
from typing import Any, Self

from liberatai_coordinator import clock
from liberatai_coordinator.api.devices import DeviceOperations
from liberatai_coordinator.api.groups import GroupOperations
from liberatai_coordinator.api.invitations import InvitationOperations
from liberatai_coordinator.api.jobs import JobOperations
from liberatai_coordinator.api.journal import AuditOperations, EventOperations
from liberatai_coordinator.api.models import ModelOperations
from liberatai_coordinator.api.plans import PlanOperations
from liberatai_coordinator.api.rollouts import RolloutOperations
from liberatai_coordinator.api.shadows import ShadowOperations
from liberatai_coordinator.api.tokens import TokenOperations
from liberatai_coordinator.api.variants import VariantOperations
from liberatai_coordinator.service import Service


@dataclass(frozen=True, slots=True, kw_only=True)
class Operations:
    """All that can be asked."""

    service: Service
    devices: DeviceOperations
    jobs: JobOperations
    plans: PlanOperations
    models: ModelOperations
    variants: VariantOperations
    groups: GroupOperations
    invitations: InvitationOperations
    shadows: ShadowOperations
    rollouts: RolloutOperations
    tokens: TokenOperations
    events: EventOperations
    audit: AuditOperations

    @classmethod
    def of(cls, service: Service) -> Self:
        """Return the operations of a coordinator."""
        return cls(
            service=service,
            devices=DeviceOperations(service),
            jobs=JobOperations(service),
            plans=PlanOperations(service),
            models=ModelOperations(service),
            variants=VariantOperations(service),
            groups=GroupOperations(service),
            invitations=InvitationOperations(service),
            shadows=ShadowOperations(service),
            rollouts=RolloutOperations(service),
            tokens=TokenOperations(service),
            events=EventOperations(service),
            audit=AuditOperations(service),
        )

    async def health(self) -> dict[str, Any]:
        """Return what the coordinator says about itself: fleet, epoch, link, counts."""
        service = self.service
        faults = self.faults()
        ending = service.enrolment.fault if service.enrolment is not None else ""
        return {
            "ok": not faults,
            "faults": [*faults, ending] if ending else list(faults),
            "fleet": service.config.fleet,
            "coordinator": service.config.coordinator,
            "epoch": service.ledger.epoch,
            "public_key": service.signer.public_key.hex(),
            "broker": service.config.broker,
            "protocol": service.connected,
            "broker_refuses": list(service.broker_refuses.lines.values()),
            "devices_online": len(service.fleet.ready_names),
            "uptime_s": clock.wall() - service.started_s,
        }

    def faults(self) -> tuple[str, ...]:
        """Return why devices cannot be served now, in words; () if they can."""
        service = self.service
        found = () if service.fleet.connected else ("no broker: nothing is heard of any device",)
        return (*found, service.fencing.fault) if service.fencing.fault else found
