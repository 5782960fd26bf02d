"""Rollouts: something new reaches a growing share of a group, and goes back if it is not good. Pure.

    waiting ─▶ running ─▶ soaking ─▶ running (the next stage) … ─▶ finished
                  │           └────▶ paused (after a stage, or by an operator)
                  └─ too many failures, worse accuracy, or an operator ─▶ rolling back ─▶ rolled back

`step(plan, rollout, event) -> (rollout, actions)`: time, members and what devices say are events; what shall
be wished of devices are actions. A stage is over when everyone that it was offered to has answered or is
late, and at least one has done it; so no rollout finishes that reached nobody. Which devices come first is
drawn from the names of rollout and device: the same after every restart.
"""

import hashlib
import math
from collections.abc import Iterable
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

State = Literal[
    "waiting", "running", "soaking", "paused", "finished", "rolling back", "rolled back", "cancelled"
]
ENDED: frozenset[State] = frozenset({"finished", "rolled back", "cancelled"})
OfDevice = Literal["offered", "done", "failed", "late", "going back", "back"]
Share = Annotated[float, Meta(gt=0, le=1)]


class Value(msgspec.Struct, frozen=True, kw_only=True):
    """Base of plans, states, events and actions."""


class Plan(Value, frozen=True, kw_only=True):
    """How a rollout goes on, and when it goes back.

    Attributes:
        stages: shares of the group, each larger than the one before.
        soak_s: how long a stage is watched after it was done.
        failed_share, failed_min: it goes back when so many of those that answered failed, and at least
            so many answered (or all of the group, if it is smaller).
        accuracy_drop: it goes back when the devices' accuracy on what they hold out is lower by more than
            this than with what they had before; None: accuracy does not matter.
        accuracy_least: the same, when it is lower than this.
        accuracy_answers: so many answers at least before accuracy is judged.
        pause_after: stages, from 1, after which somebody has to say that it goes on.
        deadline_s: who has not answered after so long is late: the stage does not wait for it.
    """

    stages: tuple[Share, ...] = (0.01, 0.1, 0.5, 1.0)
    soak_s: Annotated[float, Meta(ge=0, le=2_592_000)] = 600.0
    failed_share: Share = 0.05
    failed_min: Annotated[int, Meta(ge=1, le=1_000_000)] = 10
    accuracy_drop: Annotated[float, Meta(ge=0, le=1)] | None = 0.02
    accuracy_least: Annotated[float, Meta(ge=0, le=1)] | None = None
    accuracy_answers: Annotated[int, Meta(ge=1, le=1_000_000)] = 30
    pause_after: tuple[Annotated[int, Meta(ge=1)], ...] = ()
    deadline_s: Annotated[float, Meta(gt=0, le=2_592_000)] = 3600.0

    def __post_init__(self) -> None:
        """Refuse stages that do not grow."""
        if not self.stages or any(b <= a for a, b in zip(self.stages, self.stages[1:], strict=False)):
            raise ValueError("stages: each must be larger than the one before")


Sums = tuple[int, int]


class Part(Value, frozen=True, kw_only=True):
    """One device of a rollout.

    Attributes:
        stage: from 0, in which it was offered.
        since_s: when its state began.
        evaluation, before: (correct, total) of the new and the old model on its hold-out.
    """

    state: OfDevice
    stage: int
    since_s: float
    reason: str = ""
    evaluation: Sums | None = None
    before: Sums | None = None


class Rollout(Value, frozen=True, kw_only=True):
    """Where a rollout stands.

    Attributes:
        name: of it; draws the order of devices.
        stage: from 0.
        since_s: when its state began.
        reason: why it waits, is paused or goes back.
        parts: devices that it was offered to.
        members: of the group, when it was looked at last.
    """

    name: str
    state: State = "waiting"
    stage: int = 0
    since_s: float = 0.0
    reason: str = ""
    parts: dict[str, Part] = {}
    members: int = 0


class Tick(Value, frozen=True, kw_only=True):
    """The time, and who belongs to the group now."""

    now_s: float
    members: tuple[str, ...]


class Told(Value, frozen=True, kw_only=True):
    """What a device says of what was offered to it, or taken back."""

    device: str
    now_s: float
    outcome: Literal["done", "failed"]
    reason: str = ""
    evaluation: Sums | None = None
    before: Sums | None = None


class Gone(Value, frozen=True, kw_only=True):
    """A device was decommissioned."""

    device: str


class Pause(Value, frozen=True, kw_only=True):
    """An operator stops it where it is."""

    now_s: float


class Resume(Value, frozen=True, kw_only=True):
    """An operator lets it go on."""

    now_s: float


class Cancel(Value, frozen=True, kw_only=True):
    """An operator ends it: who has the new keeps it."""

    now_s: float


class GoBack(Value, frozen=True, kw_only=True):
    """An operator wants everybody to have what was before."""

    now_s: float
    reason: str = "by an operator"


class Offer(Value, frozen=True, kw_only=True):
    """Wish the new of these devices."""

    devices: tuple[str, ...]


class TakeBack(Value, frozen=True, kw_only=True):
    """Wish of these devices what they had before."""

    devices: tuple[str, ...]


Event = Tick | Told | Gone | Pause | Resume | Cancel | GoBack
Action = Offer | TakeBack
Stepped = tuple[Rollout, tuple[Action, ...]]


def step(plan: Plan, rollout: Rollout, event: Event) -> Stepped:
    """Return the next state and what shall be done."""
    match event:
        case Tick():
            return _ticked(plan, rollout, event)
        case Told():
            return _told(plan, rollout, event)
        case Gone(device=device):
            return _with(rollout, parts={n: p for n, p in rollout.parts.items() if n != device}), ()
        case Pause(now_s=now_s):
            if rollout.state in ENDED or rollout.state == "rolling back":
                return rollout, ()
            return _to(rollout, "paused", now_s, "by an operator"), ()
        case Resume(now_s=now_s):
            return _resumed(plan, rollout, now_s), ()
        case Cancel(now_s=now_s):
            return (rollout if rollout.state in ENDED else _to(rollout, "cancelled", now_s, "")), ()
        case GoBack(now_s=now_s, reason=reason):
            return _back(rollout, now_s, reason)


def order(name: str, devices: Iterable[str]) -> list[str]:
    """Return devices in the order in which a rollout reaches them."""
    return sorted(devices, key=lambda device: hashlib.sha256(f"{name}|{device}".encode()).digest())


def accuracy(parts: Iterable[Part]) -> tuple[float | None, float | None, int]:
    """Return accuracy after and before over all devices that told both, and the number of answers.

    A device counts for at most the lower median of their answers, so that one cannot stop a rollout alone.
    """
    told = [(p.evaluation, p.before) for p in parts if p.evaluation is not None and p.evaluation[1] > 0]
    if not told:
        return None, None, 0
    cap = sorted(new[1] for new, _ in told if new is not None)[(len(told) - 1) // 2]
    after = sum(min(cap, new[1]) * new[0] / new[1] for new, _ in told if new is not None)
    answers = sum(min(cap, new[1]) for new, _ in told if new is not None)
    both = [(new, old) for new, old in told if new is not None and old is not None and old[1] > 0]
    if not both:
        return after / answers, None, answers
    # The two are compared over the same devices.
    weights = [min(cap, new[1]) for new, _ in both]
    mean_new = sum(w * new[0] / new[1] for w, (new, _) in zip(weights, both, strict=True)) / sum(weights)
    mean_old = sum(w * old[0] / old[1] for w, (_, old) in zip(weights, both, strict=True)) / sum(weights)
    return mean_new, mean_old, sum(weights)


# --- within ---------------------------------------------------------------------------------------


def _with(rollout: Rollout, **changes: object) -> Rollout:
    return msgspec.structs.replace(rollout, **changes)


def _to(rollout: Rollout, state: State, now_s: float, reason: str = "", **changes: object) -> Rollout:
    return _with(rollout, state=state, since_s=now_s, reason=reason, **changes)


def _ticked(plan: Plan, rollout: Rollout, event: Tick) -> Stepped:
    now_s = event.now_s
    if rollout.state in ENDED:
        return rollout, ()
    rollout = _with(rollout, members=len(event.members))
    rollout = _late(plan, rollout, now_s)
    match rollout.state:
        case "rolling back":
            return _gone_back(rollout, now_s), ()
        case "paused":
            return rollout, ()
        case "soaking":
            if now_s - rollout.since_s < plan.soak_s:
                return rollout, ()
            return _stage_over(plan, rollout, now_s), ()
    return _offered(plan, rollout, event)


def _offered(plan: Plan, rollout: Rollout, event: Tick) -> Stepped:
    now_s = event.now_s
    if not event.members and not rollout.parts:
        return _with(rollout, state="waiting", reason="no device belongs to the group"), ()
    wanted = math.ceil(plan.stages[rollout.stage] * len(event.members))
    targets = order(rollout.name, event.members)[:wanted]
    new = tuple(device for device in targets if device not in rollout.parts)
    if new:
        fresh = Part(state="offered", stage=rollout.stage, since_s=now_s)
        parts = {**rollout.parts, **dict.fromkeys(new, fresh)}
        since_s = now_s if rollout.state == "waiting" else rollout.since_s
        return _with(rollout, state="running", reason="", parts=parts, since_s=since_s), (Offer(devices=new),)
    return _settled(rollout, now_s)


def _settled(rollout: Rollout, now_s: float) -> Stepped:
    states = [part.state for part in rollout.parts.values()]
    if "offered" in states:
        return _with(rollout, state="running", reason=f"waits for {states.count('offered')} devices"), ()
    if "done" in states:
        return _to(rollout, "soaking", now_s), ()
    if "late" in states:
        return _with(rollout, state="running", reason="no device has done it yet"), ()
    return _back(rollout, now_s, f"all that it was offered to failed: {_codes(rollout)}")


def _stage_over(plan: Plan, rollout: Rollout, now_s: float) -> Rollout:
    if rollout.stage + 1 == len(plan.stages):
        return _to(rollout, "finished", now_s)
    after = rollout.stage + 1
    if after in plan.pause_after:
        reason = f"after stage {after} of {len(plan.stages)}: `liberatai rollout resume {rollout.name}`"
        return _to(rollout, "paused", now_s, reason, stage=after)
    return _to(rollout, "running", now_s, stage=after)


def _resumed(plan: Plan, rollout: Rollout, now_s: float) -> Rollout:
    if rollout.state != "paused":
        return rollout
    return _to(rollout, "running", now_s, stage=min(rollout.stage, len(plan.stages) - 1))


def _told(plan: Plan, rollout: Rollout, event: Told) -> Stepped:
    part = rollout.parts.get(event.device)
    if part is None or rollout.state == "cancelled":
        return rollout, ()
    if rollout.state in ("rolling back", "rolled back"):
        state: OfDevice = "back" if event.outcome == "done" else "going back"
        rollout = _part(rollout, event.device, state, event.now_s, event.reason)
        return _gone_back(rollout, event.now_s), ()
    rollout = _part(
        rollout,
        event.device,
        "done" if event.outcome == "done" else "failed",
        event.now_s,
        event.reason,
        evaluation=event.evaluation,
        before=event.before,
    )
    if rollout.state in ENDED:
        return rollout, ()
    against = _against(plan, rollout)
    return _back(rollout, event.now_s, against) if against else (rollout, ())


def _part(
    rollout: Rollout, device: str, state: OfDevice, now_s: float, reason: str, **changes: object
) -> Rollout:
    part = rollout.parts[device]
    since_s = part.since_s if part.state == state else now_s
    changed = msgspec.structs.replace(part, state=state, since_s=since_s, reason=reason, **changes)
    return _with(rollout, parts={**rollout.parts, device: changed})


def _against(plan: Plan, rollout: Rollout) -> str:
    """Return why a rollout must go back; "" if nothing speaks against it."""
    parts = list(rollout.parts.values())
    done, failed = (sum(part.state == state for part in parts) for state in ("done", "failed"))
    answered, least = done + failed, min(plan.failed_min, max(1, rollout.members))
    if failed and answered >= least and failed / answered >= plan.failed_share:
        share = f"{failed} of {answered} failed ({failed / answered:.0%}; at most {plan.failed_share:.0%})"
        return f"{share}: {_codes(rollout)}"
    after, before, answers = accuracy(part for part in parts if part.state == "done")
    if after is None or answers < plan.accuracy_answers:
        return ""
    if plan.accuracy_least is not None and after < plan.accuracy_least:
        return f"accuracy on the devices is {after:.1%}, at least {plan.accuracy_least:.1%} is asked"
    if plan.accuracy_drop is not None and before is not None and before - after > plan.accuracy_drop:
        fell = f"accuracy on the devices fell from {before:.1%} to {after:.1%}"
        return f"{fell} over {answers} answers (at most {plan.accuracy_drop:.1%} less)"
    return ""


def _codes(rollout: Rollout) -> str:
    found = {part.reason.partition(":")[0] for part in rollout.parts.values() if part.state == "failed"}
    return ", ".join(sorted(filter(None, found))) or "no reason was given"


def _back(rollout: Rollout, now_s: float, reason: str) -> Stepped:
    """Wish what was before, of everybody who was offered the new."""
    if rollout.state in ("rolled back", "rolling back"):
        return rollout, ()
    devices = tuple(rollout.parts)
    parts = {
        device: msgspec.structs.replace(part, state="going back", since_s=now_s)
        for device, part in rollout.parts.items()
    }
    rollout = _to(rollout, "rolling back", now_s, reason, parts=parts)
    if not devices:
        return _to(rollout, "rolled back", now_s, reason), ()
    return rollout, (TakeBack(devices=devices),)


def _gone_back(rollout: Rollout, now_s: float) -> Rollout:
    """Who is away goes back when it is there again: what is wished of it stands at the broker."""
    waiting = any(part.state == "going back" for part in rollout.parts.values())
    return (
        rollout
        if waiting or rollout.state == "rolled back"
        else _to(rollout, "rolled back", now_s, rollout.reason)
    )


def _late(plan: Plan, rollout: Rollout, now_s: float) -> Rollout:
    """Note who has not answered for too long; of those that go back nobody is waited for any more."""
    late = {
        device: part
        for device, part in rollout.parts.items()
        if part.state in ("offered", "going back") and now_s - part.since_s >= plan.deadline_s
    }
    if not late:
        return rollout
    changed = {
        device: msgspec.structs.replace(
            part, state="late", since_s=now_s, reason="it has not answered in time"
        )
        for device, part in late.items()
    }
    return _with(rollout, parts={**rollout.parts, **changed})
