"""What a client may ask about invitations: tokens by which devices join."""

import asyncio
from dataclasses import dataclass
from typing import Final

from liberatai_coordinator import clock
from liberatai_coordinator.authority.invitations import Invitation
from liberatai_coordinator.client.views import InvitationView
from liberatai_coordinator.client.wire import InvitationRequest
from liberatai_coordinator.intake.enrolment import Enrolment
from liberatai_coordinator.service import Service
from liberatai_core.contract.topics import require_id, require_name
from liberatai_core.errors import ConfigError, StateError
from liberatai_core.link.mqtt.settings import broker_address
from liberatai_core.token import Token, write_token

LINE: Final = "sudo liberatai-agent enrol {token}"


@dataclass(frozen=True, slots=True)
class InvitationOperations:
    """Invitations of a coordinator."""

    service: Service

    async def list(self) -> tuple[InvitationView, ...]:
        """Return all invitations, without their tokens: these are shown once."""
        found = await asyncio.to_thread(self._enrolment().invitations.all)
        return tuple(_view(one) for one in found)

    async def create(self, wanted: InvitationRequest) -> tuple[InvitationView, ...]:
        """Make invitations, each for one device, and return their tokens."""
        enrolment = self._enrolment()
        broker, claim_broker = self._doors()
        if wanted.device:
            require_id(wanted.device, "--device")
        if wanted.device and wanted.count > 1:
            raise ConfigError("--count", ["a name belongs to one device: leave --device or --count out"])
        if wanted.group:
            require_name(wanted.group, "--group")
        invited = await asyncio.to_thread(
            enrolment.invitations.invite,
            wanted.ttl_s,
            device=wanted.device,
            profile=wanted.profile,
            group=wanted.group,
            approval=wanted.approval,
            count=wanted.count,
        )
        made = []
        for invitation, key in invited:
            token = Token(
                fleet=self.service.config.fleet,
                coordinator=self.service.config.coordinator,
                coordinator_key=self.service.signer.public_key,
                broker=broker,
                claim_broker=claim_broker,
                authority=enrolment.authority.certificates["ca"],
                certificate=invitation.certificate,
                key=key,
                expires_s=invitation.expires_s,
                device=wanted.device,
            )
            made.append(_view(invitation, write_token(token)))
        return tuple(made)

    def _enrolment(self) -> Enrolment:
        if self.service.enrolment is None:
            raise StateError(
                "this coordinator signs no certificates: run `liberatai broker init`, or set ca_dir: in its"
                " settings"
            )
        return self.service.enrolment

    def _doors(self) -> tuple[str, str]:
        config = self.service.config
        url = config.joining.broker or config.broker
        address = broker_address(url)
        if not address.secure:
            fault = f"{url}: devices join over TLS only: write mqtts://host:port, as they reach the broker"
            raise ConfigError("joining.broker", [fault])
        host = f"[{address.host}]" if ":" in address.host else address.host
        return f"mqtts://{host}:{address.port}", f"mqtts://{host}:{config.joining.claim_port}"


def _view(invitation: Invitation, token: str = "") -> InvitationView:
    return InvitationView(
        claim=invitation.claim,
        state=invitation.state(clock.wall()),
        device=invitation.device,
        profile=invitation.profile,
        group=invitation.group,
        approval=invitation.approval,
        created_s=invitation.created_s,
        expires_s=invitation.expires_s,
        used_s=invitation.used_s,
        token=token,
        line=LINE.format(token=token) if token else "",
    )
