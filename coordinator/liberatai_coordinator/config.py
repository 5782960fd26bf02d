"""Settings of a coordinator and of a job: YAML in, checked Structs out. No I/O here."""

import math
from collections.abc import Mapping
from pathlib import PurePath
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from liberatai_core.contract.limits import MAX_ROUND, MAX_SAMPLES, MAX_SECONDS
from liberatai_core.contract.messages import SparseMethod, Training
from liberatai_core.contract.topics import FLEET_OR_DEVICE, NAME
from liberatai_core.errors import ConfigError
from liberatai_core.settings import faults, parse_mapping
from liberatai_core.structure import HEAD, TRAIN, DataContract, Parameter

LOOPBACK = r"^127\.0\.0\.1:[1-9]\d{0,4}\Z"
"""Of this machine alone: there is no password."""
Share = Annotated[float, Meta(gt=0, le=1)]
Rule = Literal[
    "mean",
    "norm_clip",
    "trimmed_mean",
    "median",
    "centred_clipping",
    "nnm_trimmed_mean",
    "neighbour_vote",
    "screened_mean",
]
"""Names of `aggregator.rules.RULES`; a test holds the two together."""
EnsembleMethod = Literal[
    "auto",
    "uniform",
    "majority_vote",
    "by_samples",
    "label_free",
    "stacking",
    "grid",
    "random",
    "pso",
    "gp",
    "tpe",
    "smac",
]
"""Names of `aggregator.methods.ENSEMBLES`, and "auto"; a test holds the two together."""
Select = Literal["random", "fair", "utility"]
"""How `selection.choose` picks devices."""
NEED_LABELS = frozenset({"stacking", "grid", "random", "pso", "gp", "tpe", "smac"})
"""`aggregator.methods.LABELLED`, known without numpy; a test holds the two together."""


DOWN_TO_ALL, DOWN_TO_SOME = 0.15, 0.1
"""Measured (`docs/sparsifier.md`): who fetches every delta lags behind by what it leaves out; who misses
rounds fetches several deltas in one, which is as long as they were dense."""


HEAD_DENSITY = 0.25
BACKBONE = NAME.removesuffix("\\Z") + "(@[0-9]{1,9})?\\Z"
"""A model, or a model and the number of a version."""


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all settings: closed and frozen."""


class StructureChoice(Settings, frozen=True, kw_only=True):
    """One structure that devices may get, e.g. {family: cnn, params: {width: 16}}.

    Attributes:
        family, params: what the family's builder is given.
        density: share of its parameters that travels per round in either direction; None: the job's.
            Small structures need more, large ones less.
        trained_share: share of its large tensors that is trained at all; None: the job's.
    """

    family: Annotated[str, Meta(pattern="^[a-z0-9_]{1,32}\\Z")]
    params: dict[str, Parameter] = {}
    density: Share | None = None
    trained_share: Share | None = None

    def density_or(self, usual: float) -> float:
        """Return the share of what is trained that travels: `usual`, of a head at least a quarter.

        A head is small, and left-overs of one backbone mean little on the next.
        """
        if self.density is not None:
            return self.density
        return max(usual, HEAD_DENSITY) if self.params.get(TRAIN) == HEAD else usual


class Rounds(Settings, frozen=True, kw_only=True):
    """When a round opens and closes.

    Attributes:
        count: rounds of the job.
        mode: "synchronous": a round waits for its devices; "buffered": every `buffer` updates make a version,
            and late ones count in a later version (FedBuff).
        select: who is invited where fewer are wanted than are ready, see `selection`.
        target: updates that are enough to close a round; None: every device that can take part. In a buffered
            job: devices that have a task at a time.
        buffer: updates per version of a buffered job; None: see `round.buffer_size`.
        max_staleness: of a buffered job: versions that an update may be behind.
        overselect: invited devices per wanted update (Bonawitz 2019: 1.3, because 6-10 % drop out).
        quorum: share of `target` without which a round is abandoned at its deadline.
        deadline_s: seconds from the opening to the close.
        min_devices: devices that must be able to take part before the job starts, and before each round.
    """

    count: Annotated[int, Meta(ge=1, le=MAX_ROUND)] = 10
    mode: Literal["synchronous", "buffered"] = "synchronous"
    select: Select = "random"
    target: Annotated[int, Meta(ge=1, le=1_000_000)] | None = None
    overselect: Annotated[float, Meta(ge=1, le=10)] = 1.3
    buffer: Annotated[int, Meta(ge=1, le=1_000_000)] | None = None
    max_staleness: Annotated[int, Meta(ge=0, le=MAX_ROUND)] = 100
    quorum: Share = 0.75
    deadline_s: Annotated[float, Meta(gt=0, le=MAX_SECONDS)] = 600.0
    min_devices: Annotated[int, Meta(ge=1, le=1_000_000)] = 1


class Sparsify(Settings, frozen=True, kw_only=True):
    """Which share of the parameters travels per round.

    Attributes:
        method: how updates are made, see `sparsifier.methods`.
        up_density: from devices; a slow link may get less (the plan says so).
        down_density: to devices; None: 0.15 where all devices take part in every round, 0.1 where a
            device misses rounds and its deltas are merged.
        final_density: to devices after the last round, when nothing follows that could catch up.
        trained_share: share of every large tensor that is trained, drawn by the job's seed; the densities
            count in what is trained (`sparsifier.subspace`). None: by the structure's size.
        warmup_rounds, warmup_factor: densities start `warmup_factor` times as high and come down to their
            value in so many rounds.
        residual_decay: what is left of a device's residual per round that it missed.
        residual_limit: rounds missed after which nothing of it is left.
    """

    method: SparseMethod = "topk"
    up_density: Share = 0.2
    down_density: Share | None = None
    final_density: Share = 0.3
    trained_share: Share | None = None
    warmup_rounds: Annotated[int, Meta(ge=0, le=MAX_ROUND)] = 0
    warmup_factor: Annotated[float, Meta(ge=1, le=1000)] = 4.0
    residual_decay: Annotated[float, Meta(ge=0, le=1)] = 1.0
    residual_limit: Annotated[int, Meta(ge=0, le=MAX_ROUND)] = MAX_ROUND


class Compress(Settings, frozen=True, kw_only=True):
    """How keyframes are compressed.

    Attributes:
        bits: most bits per weight of the first keyframe, even where storage would allow more.
        renewed_bits: the same of a keyframe that replaces a chain which outgrew its devices. The weights
            are trained by then, and nothing corrects them but the deltas that follow.
    """

    bits: Annotated[float, Meta(gt=0, le=32)] = 4.0
    renewed_bits: Annotated[float, Meta(gt=0, le=32)] = 6.0


class Aggregate(Settings, frozen=True, kw_only=True):
    """How updates become the next version.

    Attributes:
        server_optimizer: what happens to the mean difference of a structure.
        server_rate: step of the server optimiser; None: the rule's own (1, of fedadam 0.01).
        server_momentum: of fedavgm.
        sample_cap: a device weighs at most this many samples (sizes are self-reported).
        rule: how the differences of one structure are merged, see `aggregator.rules`.
        hostile: share of the devices of every structure that may be hostile; robust rules tolerate so
            many, and merge nothing where they could be the majority.
        clip: length to which robust rules shorten a longer difference, in medians of the round.
        nested: which members of a family share what their devices learn, see `aggregator.nested`: those
            of other widths, of other depths, or both; "auto": "width" if nothing teaches them, else "off".
        ensemble: how structures are combined, see `aggregator.methods`; "auto": "stacking" if
            `validation` has enough labels, else "label_free".
        trials: trials of a search.
        validation: labelled .npz, for the guard and for finding weights, each with its own part of the
            labels. The guard's part never trains anything; the other one teaches as `teach.validation` says.
    """

    server_optimizer: Literal["mean", "fedavgm", "fedadam"] = "mean"
    server_rate: Annotated[float, Meta(gt=0, le=100)] | None = None
    server_momentum: Annotated[float, Meta(ge=0, le=0.999)] = 0.9
    sample_cap: Annotated[int, Meta(ge=1, le=MAX_SAMPLES)] = 100_000
    rule: Rule = "mean"
    hostile: Annotated[float, Meta(ge=0, le=0.49)] = 0.2
    clip: Annotated[float, Meta(gt=0, le=1000)] = 2.0
    nested: Literal["auto", "off", "width", "depth", "both"] = "auto"
    ensemble: EnsembleMethod = "auto"
    trials: Annotated[int, Meta(ge=1, le=2000)] = 50
    validation: str | None = None


class Teach(Settings, frozen=True, kw_only=True):
    """Teaching back: the ensemble is distilled into every structure on unlabeled data.

    Attributes:
        unlabeled: .npz with `x`; labels in it are never read. None: no teaching (says what is lost).
        method: "ensemble": the guarded ensemble teaches every structure; "task_vectors": every structure
            teaches apart, and what each changed is added up, see `learning.task_vectors`.
        validation: what of `aggregate.validation` teaches beside it, of that part of the labels which finds
            the ensemble's weights: nothing, the inputs, or the labels as well, which then count as much as
            what the ensemble says. Samples of the devices' own kind keep foreign ones from teaching nonsense.
        teachers: who is asked: the "ensemble" of the structures, or the models of all "devices" of a round,
            each as its update tells it (`models.teachers`); "auto": the devices, where labels of
            `aggregate.validation` do not show that they know less.
        most_teachers: devices that are asked in a round, by lot if there are more.
        every: rounds between two teachings.
        batch_size, learning_rate, optimizer, temperature, clip_norm, augment, mixup, loss: of the
            distillation, see `learning.distillation.DistillSettings`.
        steps, copies: the same; None: as many as suit the number of samples, see `usual_steps` and
            `usual_copies` there.
    """

    unlabeled: str | None = None
    method: Literal["ensemble", "task_vectors"] = "ensemble"
    validation: Literal["none", "inputs", "labels"] = "inputs"
    teachers: Literal["auto", "devices", "ensemble"] = "auto"
    most_teachers: Annotated[int, Meta(ge=3, le=1000)] = 64
    every: Annotated[int, Meta(ge=1, le=10_000)] = 1
    steps: Annotated[int, Meta(ge=1, le=1_000_000)] | None = None
    batch_size: Annotated[int, Meta(ge=1, le=65_536)] = 32
    learning_rate: Annotated[float, Meta(gt=0, le=1)] = 0.02
    optimizer: Literal["adam", "sgd"] = "sgd"
    clip_norm: Annotated[float, Meta(ge=0, le=1e6)] = 0.0
    temperature: Annotated[float, Meta(ge=0.1, le=100)] = 1.0
    copies: Annotated[int, Meta(ge=0, le=100)] | None = None
    augment: Annotated[float, Meta(ge=0, le=4)] = 0.6
    mixup: Annotated[float, Meta(ge=0, le=10)] = 0.5
    loss: Literal["kl", "outputs"] = "kl"


class Evaluate(Settings, frozen=True, kw_only=True):
    """What is measured and decides nothing.

    Attributes:
        test: labelled .npz of the coordinator: every version is scored on its test part, or all of it.
    """

    test: str | None = None


class Head(Settings, frozen=True, kw_only=True):
    """Of structures whose head alone is trained, on a frozen backbone ({…, train: head} in their params).

    Attributes:
        refresh_rounds: every so many rounds, and in each of the first ones, the backbone becomes that of the
            same network which other devices train whole; its devices then fetch a keyframe.
        backbone: MODEL or MODEL@NUMBER in this coordinator's repository: what networks of the same tensors
            start from; None: they start random.
    """

    refresh_rounds: Annotated[int, Meta(ge=1, le=MAX_ROUND)] = 5
    backbone: Annotated[str, Meta(pattern=BACKBONE)] | None = None


class Keep(Settings, frozen=True, kw_only=True):
    """Which versions keep their files; tagged ones, those with variants and the first one always do.

    Attributes:
        newest: so many.
        every: of the older ones those whose number it divides; 0: none.
    """

    newest: Annotated[int, Meta(ge=1, le=100_000)] = 20
    every: Annotated[int, Meta(ge=0, le=100_000)] = 100


class JobSpec(Settings, frozen=True, kw_only=True):
    """A federated training: one YAML file.

    Attributes:
        name: of the job and of the model that it makes.
        data: what every device's data looks like.
        structures: what devices may get; the plan picks the most capable that fits.
        share_class_counts: devices tell how many samples of each class they have (sums; needed by
            "label_free" and "by_samples"). Off: these are the uniform average.
        seed: of initial weights, training and distillation.
        keep: of old versions.
        head: of structures with a frozen backbone.
        share: of the devices that other jobs want, too, relative to the shares of those jobs.
        start: commit of the model repository that the structures begin from; None: from random weights.
    """

    name: Annotated[str, Meta(pattern=NAME)]
    data: DataContract
    structures: Annotated[tuple[StructureChoice, ...], Meta(min_length=1, max_length=64)]
    rounds: Rounds = Rounds()
    training: Training = Training()
    sparsify: Sparsify = Sparsify()
    compress: Compress = Compress()
    aggregate: Aggregate = Aggregate()
    teach: Teach = Teach()
    evaluate: Evaluate = Evaluate()
    share_class_counts: bool = True
    seed: Annotated[int, Meta(ge=0, le=2**31)] = 0
    keep: Keep = Keep()
    head: Head = Head()
    share: Annotated[float, Meta(ge=0.001, le=1000)] = 1.0
    start: Annotated[str, Meta(min_length=1, max_length=256)] | None = None

    @property
    def nested(self) -> Literal["off", "width", "depth", "both"]:
        """By what members of a family may differ that share coordinates."""
        if self.aggregate.nested != "auto":
            return self.aggregate.nested
        # Members that share are less unlike, and teach each other less (docs/decisions/0016).
        return "width" if self.teach.unlabeled is None else "off"

    @property
    def lacks(self) -> tuple[str, ...]:
        """What the job goes without for want of the coordinator's own data, and what that costs."""
        if len(self.structures) == 1:
            return ()
        found = []
        if self.teach.unlabeled is None:
            found.append("teach.unlabeled: no structure learns from the others, small ones gain nothing")
        if self.aggregate.validation is None:
            found.append("aggregate.validation: nobody checks that ensemble and teaching make nothing worse")
        return tuple(found)

    @property
    def down_density(self) -> float:
        """Share of what is trained that a delta to devices carries."""
        if self.sparsify.down_density is not None:
            return self.sparsify.down_density
        every = self.rounds.target is None and self.rounds.mode == "synchronous"
        return DOWN_TO_ALL if every else DOWN_TO_SOME

    def choice(self, family: str, params: Mapping[str, Parameter]) -> StructureChoice | None:
        """Return what the job says about a structure, None if it does not list it."""
        # A family may add its defaults to the parameters; of several that fit, the most exact one is meant.
        fitting = [
            choice
            for choice in self.structures
            if choice.family == family and choice.params.items() <= params.items()
        ]
        return max(fitting, key=lambda choice: len(choice.params), default=None)


class Remote(Settings, frozen=True, kw_only=True):
    """The API for other machines, over https with tokens (`liberatai tokens create`).

    Attributes:
        address: host:port where it answers; None: nowhere. 127.0.0.1 is for a tunnel or a proxy.
        cert_file, key_file: of the server's certificate (PEM); None: made by the coordinator's own authority
            for the host of the address (needs ca_dir).
    """

    address: Annotated[str, Meta(pattern=r"^[A-Za-z0-9.-]{1,253}:[1-9]\d{0,4}\Z")] | None = None
    cert_file: str | None = None
    key_file: str | None = None


class Joining(Settings, frozen=True, kw_only=True):
    """How devices get their certificates.

    Attributes:
        broker: mqtts:// URL by which devices reach the broker; None: the coordinator's own.
        claim_port: of the broker's door for claims, where nothing can be done but to ask for a certificate.
        certificate_days: how long a device's certificate is valid; renewed when two thirds are over.
        rejoin_days: for so long after its end a device that slept gets a new one with its own key.
    """

    broker: str | None = None
    claim_port: Annotated[int, Meta(ge=1, le=65_535)] = 8884
    certificate_days: Annotated[float, Meta(gt=0, le=3650)] = 90.0
    rejoin_days: Annotated[float, Meta(ge=0, le=3650)] = 30.0


FILES = ("password_file", "ca_file", "cert_file", "key_file")
FOLDERS = ("ca_dir", "broker_dir")
"""Settings that name files and folders: they start from the folder of the settings file, and a backup takes
them along."""


class CoordinatorConfig(Settings, frozen=True, kw_only=True):
    """Settings of `liberatai serve`.

    Attributes:
        fleet: name in every topic.
        coordinator: this coordinator's name.
        broker: mqtt:// or mqtts:// URL, without credentials.
        username, password_file: how to log in at the broker.
        ca_file, cert_file, key_file: for mqtts. All paths are relative to the settings file.
        state_dir: ledger, blobs and keys.
        socket: Unix socket of the API; relative to state_dir.
        socket_group: group of this machine whose members may use it too; None: this user alone.
        metrics: address of this machine alone, e.g. 127.0.0.1:9464, where /metrics, /healthz and /readyz
            answer without a password; None: nowhere.
        enrolment: "approve": an operator lets each new device in; "allowlist": only the devices
            below; "open": the first key seen for a name is taken (trusted networks only).
        max_devices: how many devices are taken in; each known one takes about 3 kB of memory.
        devices: device name -> hex Ed25519 public key, for "allowlist" (known at once in every mode).
        ca_dir: the fleet's authority (`liberatai ca init`): devices join by token, certificates are renewed;
            None: neither.
        broker_dir: folder that `liberatai broker init` wrote, kept up to date; None: a broker elsewhere.
        joining: how devices get their certificates.
        remote: the API for other machines.
    """

    fleet: Annotated[str, Meta(pattern=FLEET_OR_DEVICE)]
    coordinator: Annotated[str, Meta(pattern=FLEET_OR_DEVICE)] = "co1"
    broker: str = "mqtt://127.0.0.1:1883"
    username: str | None = None
    password_file: str | None = None
    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None
    state_dir: str = "/var/lib/liberatai"
    socket: str = "api.sock"
    socket_group: Annotated[str, Meta(min_length=1, max_length=64)] | None = None
    metrics: Annotated[str, Meta(pattern=LOOPBACK)] | None = None
    enrolment: Literal["approve", "allowlist", "open"] = "approve"
    max_devices: Annotated[int, Meta(ge=1, le=10_000_000)] = 100_000
    devices: dict[str, Annotated[str, Meta(pattern="^[0-9a-f]{64}\\Z")]] = {}
    ca_dir: str | None = None
    broker_dir: str | None = None
    joining: Joining = Joining()
    remote: Remote = Remote()

    def relative_to(self, folder: PurePath) -> "CoordinatorConfig":
        """Return the settings with their paths taken from `folder`, where the settings file lies."""
        given = {name: getattr(self, name) for name in (*FILES, *FOLDERS, "state_dir")}
        door = {"cert_file": self.remote.cert_file, "key_file": self.remote.key_file}
        remote = msgspec.structs.replace(
            self.remote, **{name: str(folder / path) for name, path in door.items() if path is not None}
        )
        return msgspec.structs.replace(
            self,
            remote=remote,
            **{name: str(folder / path) for name, path in given.items() if path is not None},
        )


def parse_job(text: str, where: str) -> JobSpec:
    """Return the job that a YAML text holds.

    Raises:
        ConfigError: with every fault, one line each, e.g. `rounds.deadline_s: must be > 0 (got "soon")`.
    """
    raw = parse_mapping(text, where)
    found = faults(raw, JobSpec)
    if not found:
        found = _across(msgspec.convert(raw, JobSpec))
    if found:
        raise ConfigError(where, found)
    return msgspec.convert(raw, JobSpec)


def _across(job: JobSpec) -> list[str]:
    """Return faults that no single key shows."""
    found = []
    if job.aggregate.ensemble in NEED_LABELS and job.aggregate.validation is None:
        found.append(
            f"aggregate.validation: missing ({job.aggregate.ensemble} finds its weights on labelled data)"
        )
    if job.aggregate.rule not in ("mean", "norm_clip") and job.sparsify.method == "quantile_over_senders":
        found.append("aggregate.rule: quantile_over_senders goes with mean and norm_clip only")
    if job.teach.validation == "labels" and job.aggregate.validation is None:
        found.append("aggregate.validation: missing (teach.validation: labels teaches its labels)")
    if job.teach.teachers == "devices" and job.teach.method == "task_vectors":
        found.append("teach.teachers: devices go with teach.method: ensemble only")
    if job.rounds.target is not None and job.rounds.min_devices > job.rounds.target * job.rounds.overselect:
        found.append("rounds.min_devices: more than rounds.target ever invites")
    found += _buffer_faults(job)
    kinds = [(choice.family, tuple(sorted(choice.params.items()))) for choice in job.structures]
    if len(set(kinds)) != len(kinds):
        found.append("structures: the same structure stands twice")
    return found


def _buffer_faults(job: JobSpec) -> list[str]:
    buffer = job.rounds.buffer
    if buffer is None:
        return []
    if job.rounds.mode != "buffered":
        return ["rounds.buffer: goes with rounds.mode: buffered only"]
    found = []
    if job.rounds.target is not None and buffer > job.rounds.target:
        found.append("rounds.buffer: more updates than devices have a task (rounds.target)")
    # As `aggregator.rules.feared`, which needs numpy.
    hostile = 0 if job.aggregate.rule == "mean" else math.ceil(job.aggregate.hostile * buffer - 1e-9)
    if buffer < 2 * hostile + 1:
        found.append(
            f"rounds.buffer: {job.aggregate.rule} needs {2 * hostile + 1} updates against {hostile} hostile"
            " ones; give more, or aggregate.hostile: 0"
        )
    return found
