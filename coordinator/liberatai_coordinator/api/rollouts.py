"""What a client may ask about rollouts, and do with them."""

from collections import Counter
from dataclasses import dataclass

import msgspec

from liberatai_coordinator import clock
from liberatai_coordinator.api.groups import query_of
from liberatai_coordinator.api.shadows import changed
from liberatai_coordinator.client.fleet_views import RolloutPartView, RolloutView
from liberatai_coordinator.client.wire import RolloutRequest
from liberatai_coordinator.control.cargo import Cargo
from liberatai_coordinator.control.rollouts import Running, Spec
from liberatai_coordinator.fleet import query
from liberatai_coordinator.fleet import rollout as deciding
from liberatai_coordinator.service import Service
from liberatai_core.contract.messages import Wishes
from liberatai_core.errors import ConfigError, StateError


@dataclass(frozen=True, slots=True)
class RolloutOperations:
    """Rollouts of a coordinator."""

    service: Service

    async def create(self, wanted: RolloutRequest) -> RolloutView:
        """Begin a rollout.

        Raises:
            ConfigError: something that was asked for has a fault. NotFoundError: no such version or group.
            StateError: there is a rollout of this name.
        """
        asked = await query_of(self.service, wanted.selector, wanted.query, wanted.group)
        everybody = query.Is("status", "==", ("approved",))
        who = query.text_of(everybody if asked is None else query.Both((everybody, asked)))
        cargo = await self._cargo(wanted)
        spec = Spec(
            cargo=cargo, query=who, who=wanted.group or wanted.selector or wanted.query, plan=plan_of(wanted)
        )
        return view(await self.service.rollouts.create(wanted.name, spec), parts=False)

    async def list(self) -> tuple[RolloutView, ...]:
        """Return all rollouts, the oldest first."""
        return tuple(view(one, parts=False) for one in self.service.rollouts.by_name.values())

    async def show(self, name: str) -> RolloutView:
        """Return one rollout with its devices."""
        return view(self.service.rollouts.get(name), parts=True)

    async def pause(self, name: str) -> RolloutView:
        """Stop a rollout where it is."""
        return await self._tell(name, deciding.Pause(now_s=clock.wall()), "paused")

    async def resume(self, name: str) -> RolloutView:
        """Let a paused rollout go on."""
        if self.service.rollouts.get(name).rollout.state != "paused":
            raise StateError(f"rollout {name} is not paused")
        return await self._tell(name, deciding.Resume(now_s=clock.wall()), "")

    async def cancel(self, name: str) -> RolloutView:
        """End a rollout; who has the new keeps it."""
        return await self._tell(name, deciding.Cancel(now_s=clock.wall()), "cancelled")

    async def rollback(self, name: str, reason: str) -> RolloutView:
        """Let everybody have what was before."""
        return await self._tell(
            name, deciding.GoBack(now_s=clock.wall(), reason=reason or "by an operator"), ""
        )

    async def _tell(self, name: str, event: deciding.Event, done: str) -> RolloutView:
        before = self.service.rollouts.get(name).rollout.state
        after = await self.service.rollouts.tell(name, event)
        if after.rollout.state == before and before != done:
            raise StateError(f"rollout {name} is {before}")
        return view(after, parts=False)

    async def _cargo(self, wanted: RolloutRequest) -> Cargo:
        given = [bool(wanted.model), bool(wanted.agent), bool(wanted.settings)]
        if sum(given) != 1:
            raise ConfigError("rollout", ["give one of --model, --agent and --set"])
        if wanted.settings:
            changed(Wishes(), wanted.settings)
            return Cargo(settings=dict(wanted.settings))
        if wanted.agent:
            if not wanted.bundle:
                raise ConfigError("rollout", ["--agent needs --bundle: the file with the signed release"])
            return Cargo(agent=wanted.agent, bundle=wanted.bundle)
        model, _, ref = wanted.model.partition(":")
        row = self.service.ledger.versions.get(model, int(ref) if ref.isdecimal() else ref or "latest")
        return Cargo(model=model, version=row.number)


def plan_of(wanted: RolloutRequest) -> deciding.Plan:
    """Return how a rollout goes on.

    Raises:
        ConfigError: with the fault.
    """
    try:
        return msgspec.convert(msgspec.to_builtins(wanted.plan), deciding.Plan)
    except (msgspec.ValidationError, ValueError) as error:
        raise ConfigError("rollout", [str(error)]) from None


def view(running: Running, *, parts: bool) -> RolloutView:
    """Return a rollout; with `parts`, its devices too."""
    rollout, plan = running.rollout, running.spec.plan
    counts = Counter(part.state for part in rollout.parts.values())
    done = [part for part in rollout.parts.values() if part.state in ("done", "going back", "back")]
    after, before, answers = deciding.accuracy(done)
    return RolloutView(
        name=rollout.name,
        state=rollout.state,
        what=running.spec.cargo.words,
        who=running.spec.who or "all",
        stage=rollout.stage + 1,
        stages=plan.stages,
        reason=running.fault or rollout.reason,
        since_s=rollout.since_s,
        created_s=running.created_s,
        members=rollout.members,
        counts={str(state): count for state, count in counts.items()},
        accuracy=after,
        accuracy_before=before,
        answers=answers,
        parts=tuple(
            RolloutPartView(
                device=device,
                state=part.state,
                stage=part.stage + 1,
                since_s=part.since_s,
                reason=part.reason,
                evaluation=part.evaluation,
                before=part.before,
            )
            for device, part in sorted(rollout.parts.items())
        )
        if parts
        else (),
    )
