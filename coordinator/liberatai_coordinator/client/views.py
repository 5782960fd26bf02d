"""What the API shows: plain records, the same for the command line, the demo and any other client."""

from collections.abc import Sequence
from typing import Literal

import msgspec

from liberatai_core.structure import DataContract, Parameter, Structure

RoundState = Literal["open", "closed", "aggregated", "published", "abandoned"]
JobState = Literal["waiting", "running", "paused", "finished", "aborted", "failed"]


class View(msgspec.Struct, frozen=True, kw_only=True):
    """Base of all views."""


class ContributionView(View, frozen=True, kw_only=True):
    """What one update of a device gave, see `aggregator.rules.Contribution`.

    Attributes:
        norm: length of its difference.
        cosine: of the angle between it and what the round made of all.
        verdict: accepted, clipped (shortened), refused (nothing of it counts) or frozen (nobody's counts:
            too few updates for the rule).
    """

    job: str
    round: int
    verdict: str
    norm: float
    cosine: float


class ConditionView(View, frozen=True, kw_only=True):
    """One thing that holds, or does not, of a device.

    Attributes:
        since_s: Unix seconds of the last change; 0: not known.
    """

    name: str
    holds: bool
    reason: str = ""
    since_s: float = 0.0


class DeviceView(View, frozen=True, kw_only=True):
    """One device as the coordinator knows it. Times are Unix seconds of the coordinator.

    Attributes:
        phase: what it said last that it does; "invited": an open round waits for its update, and it has said
            nothing of that round (it reports a phase of an ordinary round only when it lasts).
        form: file that suits its tier and runtimes, to pull or export for it; "" while they are unknown.
        up_bits_s, down_bits_s: link; `link_measured`: from real transfers, not from the profile.
        day_quota_bytes: that the link may move in a day; 0: no quota.
        sent_bytes, received_bytes: of its socket, over all its starts.
        updates: stored updates, in all jobs: the rounds it took part in.
        round_sent_bytes, round_received_bytes: the totals per update; everything that the socket carried
            is in them, telemetry and pings too.
        key: fingerprint of its key, to compare with what the device shows.
        labels: that operators gave it.
        drained: it gets no new task.
        contributions: of its newest updates that were merged, the newest first; only where one device is
            asked for.
        conditions: what holds of it, since when and why; only where one device is asked for.
        certificate_end_s: of its newest certificate from this coordinator; 0: it has none from here.
        knocks: fingerprint of another key that asks for its name; "": none does.
    """

    id: str
    status: Literal["pending", "approved", "quarantined"]
    state: str = "unknown"
    phase: str = ""
    reason: str = ""
    profile: str = ""
    tier: str = ""
    form: str = ""
    arch: str = ""
    cores: int = 0
    cpu_share: float = 0.0
    memory_bytes: int = 0
    storage_bytes: int = 0
    gflops: float | None = None
    up_bits_s: float | None = None
    down_bits_s: float | None = None
    link_measured: bool = False
    metered: bool = False
    day_quota_bytes: int = 0
    quota_spent: bool = False
    samples: int = 0
    job: str = ""
    structure: str = ""
    round: int = 0
    last_seen_s: float = 0.0
    agent_version: str = ""
    sent_bytes: int = 0
    received_bytes: int = 0
    updates: int = 0
    round_sent_bytes: int = 0
    round_received_bytes: int = 0
    refusals: dict[str, int] = {}
    key: str = ""
    labels: dict[str, str] = {}
    drained: bool = False
    contributions: tuple[ContributionView, ...] = ()
    conditions: tuple[ConditionView, ...] = ()
    knocks: str = ""
    certificate_end_s: float = 0.0


class InvitationView(View, frozen=True, kw_only=True):
    """An invitation to join, for one device.

    Attributes:
        claim: name of its claim credential.
        state: "open", "used" by `device`, or "expired".
        approval: "auto": who holds the token is let in; "hand": an operator compares keys.
        token, line: the token, and what to run on the device; only when it is made.
    """

    claim: str
    state: str
    device: str
    profile: str
    group: str
    approval: str
    created_s: float
    expires_s: float
    used_s: float = 0.0
    token: str = ""
    line: str = ""


class AssignmentView(View, frozen=True, kw_only=True):
    """Which variant a device gets, and why. structure "" means: none.

    Attributes:
        density: share of the parameters that an update carries, by the link as it is now.
        link: how the density came about, in words.
    """

    device: str
    profile: str
    tier: str
    structure: str
    variant_bytes: int
    budget_bytes: int
    density: float
    why: str
    link: str = ""


class StructureView(View, frozen=True, kw_only=True):
    """One structure of a plan or job."""

    id: str
    family: str
    parameters: int
    smallest_bytes: int = 0
    keyframe_bytes: int = 0
    devices: int = 0


class PlanView(View, frozen=True, kw_only=True):
    """A plan that explains itself."""

    job: str
    assignments: tuple[AssignmentView, ...]
    structures: tuple[StructureView, ...]
    dry_run: bool = False


class ScoreView(View, frozen=True, kw_only=True):
    """How a group of devices does on what they hold out of their own data.

    Attributes:
        accuracy: right answers per question; a device counts for at most the lower median of its group's
            questions (`evaluation.score`). None: nobody held anything out.
        correct, total: the sums as devices told them, not capped.
        devices: that held something out.
    """

    accuracy: float | None = None
    correct: int = 0
    total: int = 0
    devices: int = 0


class WorstView(View, frozen=True, kw_only=True):
    """The devices that a model serves worst.

    Attributes:
        accuracy: mean of the worst tenth, every device alike; at least one device.
        devices: number of devices in that tenth.
        of: devices that held out enough to be compared (`evaluation.MIN_TOTAL`).
    """

    accuracy: float
    devices: int
    of: int


class LocalView(View, frozen=True, kw_only=True):
    """What the devices of one round scored on their own hold-outs, as sums.

    Attributes:
        version: that they scored: the one that the round began with.
        late: devices that scored an older one (buffered jobs). They count all the same: without them the
            slow devices would be in no figure.
        structures: by structure id.
        profiles: by the profile that the device names, else by the form of file that suits it.
        worst: None if no device held out enough.
    """

    version: int
    all: ScoreView = ScoreView()
    structures: dict[str, ScoreView] = {}
    profiles: dict[str, ScoreView] = {}
    worst: WorstView | None = None
    late: int = 0


class CentralView(View, frozen=True, kw_only=True):
    """What one version reaches on labelled data of the coordinator.

    Attributes:
        version: that was scored: the one that the round made.
        samples: labels that it was scored on.
        structures: accuracy by structure id.
        ensemble: of what the version answers, as the guard decided.
    """

    version: int
    samples: int
    structures: dict[str, float] = {}
    ensemble: float = 0.0


class RoundView(View, frozen=True, kw_only=True):
    """One round.

    Attributes:
        train_seconds_max: longest time that a device spent on its task, trainer start included.
        up_bytes, down_bytes: what the sockets of the devices that answered carried since their last answer.
        merged: by which rule, whose updates counted, and which structures were frozen.
        ensemble: method that found the weights of the version.
        use: "ensemble", or the structure that the guard fell back to; "" while there is no version.
        local: of the version before, on what devices hold out of their own data.
        central: of the new version on those labels of `aggregate.validation` that found no weights. The
            guard has decided by them.
        test: of the new version on `evaluate.test`, by which nothing was decided.
    """

    round: int
    state: RoundState
    invited: int
    updates: int
    seconds: float = 0.0
    train_seconds_max: float = 0.0
    teach_seconds: float = 0.0
    up_bytes: int = 0
    down_bytes: int = 0
    reason: str = ""
    guard: str = ""
    merged: str = ""
    ensemble: str = ""
    use: str = ""
    local: LocalView | None = None
    central: CentralView | None = None
    test: CentralView | None = None


def newest(rounds: Sequence[RoundView]) -> tuple[LocalView | None, CentralView | None, CentralView | None]:
    """Return the newest figures there are: of the devices, on validation labels, on the test file."""
    back = rounds[::-1]
    return (
        next((one.local for one in back if one.local), None),
        next((one.central for one in back if one.central), None),
        next((one.test for one in back if one.test), None),
    )


class JobSummary(View, frozen=True, kw_only=True):
    """One job in a list.

    Attributes:
        reason: why it ended, or what it waits for; "" if neither.
        version: newest of its model.
        share: of the devices that other jobs want, too, relative to the shares of those jobs.
    """

    name: str
    state: JobState
    rounds_done: int
    rounds_total: int
    created_s: float
    reason: str = ""
    version: int = 0
    share: float = 1.0


class JobView(JobSummary, frozen=True, kw_only=True):
    """One job with its rounds.

    Attributes:
        updates, up_bytes, down_bytes: of all rounds together.
        lacks: what the job goes without for want of the coordinator's own data, and what that costs.
    """

    structures: tuple[StructureView, ...] = ()
    rounds: tuple[RoundView, ...] = ()
    updates: int = 0
    up_bytes: int = 0
    down_bytes: int = 0
    lacks: tuple[str, ...] = ()


class VersionView(View, frozen=True, kw_only=True):
    """One immutable model state. `digests` name the decoded weights per structure (hex)."""

    model: str
    version: int
    id: str
    parent: str | None
    created_s: float
    round: int
    updates: int
    digests: dict[str, str]
    bytes: dict[str, int]
    ensemble: str
    guard: str
    tags: tuple[str, ...] = ()


class EnsembleView(View, frozen=True, kw_only=True):
    """How a version's structures are combined (`aggregator.ensemble.Pool`, and what the guard decided).

    Attributes:
        members: structure ids, in the order of the rows of `weights` and `log_priors`.
        use: "ensemble", or the structure that the guard fell back to.
    """

    method: str
    members: tuple[str, ...] = ()
    weights: tuple[tuple[float, ...], ...] = ()
    log_priors: tuple[tuple[float, ...], ...] = ()
    bias: tuple[float, ...] = ()
    kind: str = "log"
    use: str = "ensemble"
    guard: str = ""


class TensorView(View, frozen=True, kw_only=True):
    """What one tensor takes in a model file, see `compressor.contents.TensorSize`.

    Attributes:
        name: of the tensor; "header" for the file's own header.
        kind: how it is written.
        bytes: its record, with its share of what tensors write together.
        distinct: number of different values that its coding allows.
    """

    name: str
    shape: tuple[int, ...]
    weights: int
    kind: str
    bytes: int
    distinct: int


class SizesView(View, frozen=True, kw_only=True):
    """Where the bytes of one structure's files go.

    Attributes:
        keyframe_bytes: the whole model, compressed.
        delta_bytes: what leads from there to the version.
        tensors: of the keyframe: its header, then the tensors in the order of the structure.
    """

    structure: str
    parameters: int
    keyframe_bytes: int
    delta_bytes: int
    tensors: tuple[TensorView, ...]


class VariantView(View, frozen=True, kw_only=True):
    """One variant of a version: a file that fits a budget, and what was lost for it.

    Attributes:
        version, parent: number and id of the version that it was made from.
        parent_structure: structure of that version that it stands for.
        structure, family, params, parameters: its own one.
        bytes: length of the file.
        file: SHA-256 (hex) of the file.
        digest: SHA-256 (hex) of the weights that it decodes to.
        divergence: mean KL divergence (nats) of its outputs from the parent's; None: not measured.
        agreement: share of samples with the parent's top class; None: not measured.
        accuracy: on labelled test data; None: not measured.
    """

    model: str
    version: int
    parent: str
    id: str
    parent_structure: str
    structure: str
    family: str
    params: dict[str, Parameter]
    parameters: int
    bytes: int
    budget_bytes: int
    file: str
    digest: str
    method: str
    why: str
    divergence: float | None
    agreement: float | None
    accuracy: float | None
    seed: int
    created_s: float


class VariantDetail(View, frozen=True, kw_only=True):
    """A variant with all that is needed to decode its file, and where its bytes go."""

    variant: VariantView
    structure: Structure
    data: DataContract
    tensors: tuple[TensorView, ...]
