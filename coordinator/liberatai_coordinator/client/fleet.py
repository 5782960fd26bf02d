"""Ask a coordinator about its fleet: groups, events, changes by operators."""

from typing import TYPE_CHECKING
from urllib.parse import quote, urlencode

from liberatai_coordinator.client.fleet_views import (
    AuditView,
    EventView,
    GroupView,
    Role,
    RolloutView,
    ShadowView,
    TokenView,
)
from liberatai_coordinator.client.wire import GroupRequest, Reason, RolloutRequest, Settings, TokenRequest

if TYPE_CHECKING:
    from liberatai_coordinator.client.client import Client


class GroupsClient:
    """Groups of devices."""

    def __init__(self, client: "Client") -> None:
        self._client = client

    def create(self, name: str, query: str) -> GroupView:
        """Give a question a name."""
        return self._client.ask("POST", "/groups", GroupView, GroupRequest(name=name, query=query))

    def list(self) -> tuple[GroupView, ...]:
        """Return all groups with the number of their devices."""
        return self._client.ask("GET", "/groups", tuple[GroupView, ...])

    def show(self, name: str) -> GroupView:
        """Return one group with the names of its devices."""
        return self._client.ask("GET", f"/groups/{quote(name, safe='')}", GroupView)

    def delete(self, name: str) -> None:
        """Forget a group; its devices stay."""
        self._client.send("DELETE", f"/groups/{quote(name, safe='')}")


class ShadowsClient:
    """What devices shall be like."""

    def __init__(self, client: "Client") -> None:
        self._client = client

    def show(self, device: str) -> ShadowView:
        """Return what a device shall be like, and what it is like."""
        return self._client.ask("GET", f"/devices/{quote(device, safe='')}/shadow", ShadowView)

    def change(self, device: str, settings: dict[str, bool | float | None]) -> ShadowView:
        """Wish settings of a device; None: as the device has it."""
        path = f"/devices/{quote(device, safe='')}/shadow"
        return self._client.ask("POST", path, ShadowView, Settings(settings=settings))


class RolloutsClient:
    """Rollouts."""

    def __init__(self, client: "Client") -> None:
        self._client = client

    def create(self, wanted: RolloutRequest) -> RolloutView:
        """Begin a rollout."""
        return self._client.ask("POST", "/rollouts", RolloutView, wanted)

    def list(self) -> tuple[RolloutView, ...]:
        """Return all rollouts, the oldest first."""
        return self._client.ask("GET", "/rollouts", tuple[RolloutView, ...])

    def show(self, name: str) -> RolloutView:
        """Return one rollout with its devices."""
        return self._client.ask("GET", f"/rollouts/{quote(name, safe='')}", RolloutView)

    def pause(self, name: str) -> RolloutView:
        """Stop a rollout where it is."""
        return self._client.ask("POST", f"/rollouts/{quote(name, safe='')}/pause", RolloutView)

    def resume(self, name: str) -> RolloutView:
        """Let a paused rollout go on."""
        return self._client.ask("POST", f"/rollouts/{quote(name, safe='')}/resume", RolloutView)

    def cancel(self, name: str) -> RolloutView:
        """End a rollout; who has the new keeps it."""
        return self._client.ask("POST", f"/rollouts/{quote(name, safe='')}/cancel", RolloutView)

    def rollback(self, name: str, reason: str) -> RolloutView:
        """Let everybody have what was before."""
        path = f"/rollouts/{quote(name, safe='')}/rollback"
        return self._client.ask("POST", path, RolloutView, Reason(reason=reason))


class TokensClient:
    """Tokens for the API from another machine."""

    def __init__(self, client: "Client") -> None:
        self._client = client

    def create(self, name: str, role: Role, ttl_s: float) -> TokenView:
        """Make a token; it is shown this once."""
        wanted = TokenRequest(name=name, role=role, ttl_s=ttl_s)
        return self._client.ask("POST", "/tokens", TokenView, wanted)

    def list(self) -> tuple[TokenView, ...]:
        """Return all tokens, without what they are."""
        return self._client.ask("GET", "/tokens", tuple[TokenView, ...])

    def revoke(self, name: str) -> None:
        """Let a token be worth nothing from now on."""
        self._client.send("DELETE", f"/tokens/{quote(name, safe='')}")


class EventsClient:
    """What happened in the fleet."""

    def __init__(self, client: "Client") -> None:
        self._client = client

    def after(self, number: int, device: str = "") -> tuple[EventView, ...]:
        """Return the events above a number, the oldest first; at most 1000."""
        query = urlencode({"after": number, "device": device})
        return self._client.ask("GET", f"/events?{query}", tuple[EventView, ...])

    def last(self, count: int, device: str = "") -> tuple[EventView, ...]:
        """Return the newest events, the oldest of them first."""
        query = urlencode({"last": count, "device": device})
        return self._client.ask("GET", f"/events?{query}", tuple[EventView, ...])


class AuditClient:
    """What was changed, and by whom."""

    def __init__(self, client: "Client") -> None:
        self._client = client

    def after(self, number: int) -> tuple[AuditView, ...]:
        """Return the changes above a number, the oldest first; at most 1000."""
        return self._client.ask("GET", f"/audit?{urlencode({'after': number})}", tuple[AuditView, ...])

    def last(self, count: int) -> tuple[AuditView, ...]:
        """Return the newest changes, the oldest of them first."""
        return self._client.ask("GET", f"/audit?{urlencode({'last': count})}", tuple[AuditView, ...])
