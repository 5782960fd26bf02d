"""Which device gets which variant, and why. Pure: values in, a plan that explains itself out.

The job lists its structures from the most to the least wanted; a device gets the first one that fits its
storage, its memory, its link and the round's deadline. The share of the parameters that its updates carry
follows its link: what a slow link leaves out stays in the device's residual and is sent later. All devices
of a structure share one keyframe and delta chain (DESIGN §5), so the tightest storage among them sizes the
keyframe.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from liberatai_coordinator.config import JobSpec
from liberatai_core.contract.messages import Capability, Training
from liberatai_core.profile import Trainer, head_bytes, training_bytes
from liberatai_core.sparsifier.methods import METHODS
from liberatai_core.sparsifier.schedule import density_at
from liberatai_core.structure import fitting
from liberatai_core.units import duration_text, rate_text, size_text

MIN_KEYFRAME_BITS = 2.0
"""Below two bits per weight a keyframe without retraining loses too much (compressor benchmark)."""
CHAIN_ROUNDS = 12
"""Rounds whose deltas must fit beside the keyframe, before a new keyframe must be published."""
PREFERRED_SHARE = 0.5
"""Of the deadline: who is done by then is not held back by `rounds.select: utility`."""
LINK_SHARE = 0.1
"""A tenth of the deadline for the update's way up: the link serves other purposes too."""
DEADLINE_MARGIN = 0.8
"""Download, training and upload together: a fifth is left for retries and for what was estimated wrongly."""
UPDATE_BITS = 10.0
"""Bits per carried coordinate, position and value (sparsifier at 1-10 %: 7-10): room for chains."""
VALUE_BITS = 2.0
"""Bits per carried value, sign included: ternary takes one, a few levels one more."""
OVERHEAD_BYTES = 1024
"""Task, reports, headers and receipt of one participation, per direction."""
MIN_DENSITY = 0.0005
"""With less, a parameter waits thousands of rounds for its turn and what is sent is out of date; it is also
the lowest density that the codec is measured at. A job that wants less gets less."""
DAY_S = 86_400.0
VALUE_BYTES = {
    "dense": 4.0,
    "client_sampling": 4.0,
    "quantile": 8.0,
    "quantile_over_senders": 8.0,
    "random_k": 4.0,
    "random_k_feedback": 4.0,
}
"""Bytes per carried value, position included, of methods that do not code by entropy."""
WHOLE = ("dense", "client_sampling")
"""Methods whose updates carry every value, whatever the density."""
LONGEST = 0.8
"""The density of the longest update, with VALUE_BITS: beyond it positions cost less than they save."""
BISECTIONS = 40
"""Halvings of the interval: far finer than any density that matters."""
EFFICIENCY = 0.15
"""Share of the measured matrix product that small networks reach in training."""


Try = tuple[str, str]
"""A structure, and the tier that a device trained it in."""
TIERS: Final[dict[Trainer, str]] = {"torch": "full", "numpy": "numpy"}
"""What a device does that trains with a runtime, the wanted one first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """What the plan must know of a structure.

    Attributes:
        parameters: values of the flat vector.
        smallest_bytes: smallest keyframe that the compressor can make.
        macs: multiply-adds per sample, forward.
        activation_bytes: memory of one sample's activations in training.
        density: share of the parameters that an update carries.
        down_density: the same of what is published; None: as `density`.
        trained: how many of them are trained and travel, None: all. Densities count in these.
        head: only the last layer is trained, on features that are computed once.
    """

    id: str
    family: str
    density: float
    parameters: int
    smallest_bytes: int
    macs: int
    activation_bytes: int
    down_density: float | None = None
    trained: int | None = None
    head: bool = False

    @property
    def travelling(self) -> int:
        """Values that updates and deltas are about."""
        return self.parameters if self.trained is None else self.trained

    def keyframe_bytes(self, bits: float) -> int:
        """Return about how long a keyframe is at so many bits per weight."""
        return max(self.smallest_bytes, int(self.parameters * bits / 8) + 512)


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """One device's part. `structure` "" means: it does not take part, and `why` says so.

    Attributes:
        density: share of the parameters that its updates carried when the plan was made.
        why: what speaks for the structure, and against the more wanted ones.
        link: how the density came about, in words.
        tier: what it does with it: "full" trains with torch, "numpy" with numpy alone, "head" the last layer
            on a frozen backbone; "" without structure.
    """

    device: str
    structure: str
    budget_bytes: int
    density: float
    why: str
    link: str = ""
    tier: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Assignments by device, and the keyframe budget of every structure that somebody got."""

    assignments: Mapping[str, Assignment]
    keyframe_bytes: Mapping[str, int]


def make_plan(job: JobSpec, candidates: Sequence[Candidate], devices: Sequence[Capability]) -> Plan:
    """Assign structures.

    Args:
        job: settings.
        candidates: the job's structures, most wanted first.
        devices: what is known of every device, in any order.
    """
    assignments = {
        device.device: assign(job, candidates, device) for device in sorted(devices, key=lambda d: d.device)
    }
    return Plan(
        assignments=assignments, keyframe_bytes=keyframe_budgets(job, candidates, assignments.values())
    )


def keyframe_budgets(
    job: JobSpec, candidates: Sequence[Candidate], assignments: Iterable[Assignment]
) -> dict[str, int]:
    """Return how long the keyframe of every structure may be that somebody got."""
    storages: dict[str, list[int]] = {}
    for assigned in assignments:
        storages.setdefault(assigned.structure, []).append(assigned.budget_bytes)
    return {
        candidate.id: keyframe_budget(job, candidate, min(storages[candidate.id]))
        for candidate in candidates
        if candidate.id in storages
    }


def keyframe_budget(job: JobSpec, candidate: Candidate, storage_bytes: int) -> int:
    """Return how long the keyframe may be where `storage_bytes` is the tightest storage."""
    wished = candidate.keyframe_bytes(job.compress.bits)
    return min(wished, storage_bytes - chain_bytes(job, candidate)) if storage_bytes else wished


def chain_bytes(job: JobSpec, candidate: Candidate) -> int:
    """Return about how much room the deltas take before a new keyframe is due; 0 if every file is one."""
    if METHODS[job.sparsify.method].whole_downlink:
        return 0
    # Merged, a chain speaks about each value once, however many rounds it covers.
    carried = min(1.0, CHAIN_ROUNDS * candidate.density)
    return int(carried * candidate.travelling * UPDATE_BITS / 8)


def _largest_keyframe(job: JobSpec, candidate: Candidate) -> int:
    """Return how much room a keyframe needs at least: the smallest one, or a whole model as float32."""
    if METHODS[job.sparsify.method].whole_downlink:
        return candidate.keyframe_bytes(32)
    return candidate.keyframe_bytes(min(MIN_KEYFRAME_BITS, job.compress.bits))


def down_bytes(job: JobSpec, candidate: Candidate) -> int:
    """Return about how much a device downloads per round where it missed none."""
    if METHODS[job.sparsify.method].whole_downlink:
        return candidate.keyframe_bytes(32) + OVERHEAD_BYTES
    return update_bytes(candidate.travelling, candidate.down_density or candidate.density) + OVERHEAD_BYTES


def assign(
    job: JobSpec,
    candidates: Sequence[Candidate],
    device: Capability,
    *,
    too_heavy: Collection[Try] = (),
) -> Assignment:
    """Return what one device gets: the first structure that nothing speaks against.

    A structure is tried with torch, if the device has it, then with numpy. Where a measured link is all that
    speaks against one, the device gets it with density 0: it cannot take part now, but links recover, and are
    measured anew only where something travels.

    Args:
        job: settings.
        candidates: the job's structures, most wanted first.
        device: what it says of itself.
        too_heavy: what it ran out of memory with.
    """
    refusal = unfit(job, device)
    if refusal:
        return Assignment(
            device=device.device, structure="", budget_bytes=device.storage_bytes, density=0.0, why=refusal
        )
    against: list[str] = []
    slow: tuple[Candidate, str] | None = None
    for candidate in candidates:
        tier, reason = _tier(job, candidate, device, too_heavy)
        share, link = density(job, candidate, device, round_s=spacing_s(job, job.rounds.count))
        if tier and share:
            against += [reason] if reason else []
            return _given(job, candidate, device, tier, against, share, link)
        if tier:
            slow = candidate, tier
        against.append(f"{candidate.id}: {reason or link}")
    if slow is not None and may_recover(device):
        link = density(job, slow[0], device, round_s=spacing_s(job, job.rounds.count))[1]
        return _given(job, slow[0], device, slow[1], against, 0.0, link)
    return Assignment(
        device=device.device,
        structure="",
        budget_bytes=device.storage_bytes,
        density=0.0,
        why="nothing fits: " + "; ".join(against),
    )


def _given(
    job: JobSpec,
    candidate: Candidate,
    device: Capability,
    tier: str,
    against: Sequence[str],
    share: float,
    link: str,
) -> Assignment:
    size = keyframe_budget(job, candidate, device.storage_bytes)
    limit = f"{size_text(device.storage_bytes)} storage" if device.storage_bytes else "unlimited storage"
    with_what = "" if tier == "full" else f" with {tier}"
    fits = f"{candidate.id} fits{with_what}: a keyframe of at most {size_text(size)} in {limit}"
    return Assignment(
        device=device.device,
        structure=candidate.id,
        budget_bytes=device.storage_bytes,
        density=share,
        why="; ".join([*against, fits]),
        link=link,
        tier=tier,
    )


def unfit(job: JobSpec, device: Capability) -> str:
    """Return why a device cannot train in this job, whatever the structure; "": nothing speaks against it."""
    if device.tier == "observe":
        return f"tier {device.tier}: cannot train (it has no data, or too little memory)"
    if device.samples == 0 or device.data is None:
        return "no usable local data"
    if fitting(device.data.input_shape, job.data.input_shape) is None:
        return f"its data has shape {device.data.input_shape}, the job wants {job.data.input_shape}"
    if device.data.classes > job.data.classes:
        return f"its data has {device.data.classes} classes, the job {job.data.classes}"
    return ""


def _tier(
    job: JobSpec, candidate: Candidate, device: Capability, too_heavy: Collection[Try]
) -> tuple[str, str]:
    """Return how a device trains a structure, "" for not at all, and what speaks against other ways."""
    reason = _too_much(job, candidate, device)
    if reason is not None:
        return "", reason
    if candidate.head:
        heavy = _too_heavy_for_head(candidate, device)
        if heavy is None and (candidate.id, "head") in too_heavy:
            heavy = "with its head it ran out of memory"
        return ("", heavy) if heavy else ("head", "")
    if device.tier != "full":
        return "", f"tier {device.tier}: it trains heads only"
    against: list[str] = []
    for trainer, tier in TIERS.items():
        heavy = _too_heavy(job, candidate, device, trainer)
        if heavy is None and (candidate.id, tier) in too_heavy:
            heavy = f"with {trainer} it ran out of memory"
        if heavy is None:
            return tier, f"{candidate.id}: {'; '.join(against)}" if against else ""
        against.append(heavy)
    return "", "; ".join(against)


def _too_heavy(job: JobSpec, candidate: Candidate, device: Capability, trainer: Trainer) -> str | None:
    """Return what speaks against training a structure with a runtime on a device, or None."""
    if trainer not in (device.runtimes or ("torch",)):
        return f"{trainer} is not installed"
    batch = min(job.training.batch_size, max(device.samples, 1))
    memory = training_bytes(trainer, candidate.parameters, batch, candidate.activation_bytes)
    if device.memory_bytes and memory > device.memory_bytes:
        have = size_text(device.memory_bytes)
        return f"training with {trainer} takes {size_text(memory)} of {have} memory"
    return None


def _too_heavy_for_head(candidate: Candidate, device: Capability) -> str | None:
    """Return what speaks against training the head of a structure on a device, or None."""
    if "numpy" not in device.runtimes:
        return "its release trains no heads"
    travelling = candidate.trained or candidate.parameters
    memory = head_bytes(candidate.parameters, travelling, device.samples, candidate.activation_bytes)
    if device.memory_bytes and memory > device.memory_bytes:
        return f"training a head takes {size_text(memory)} of {size_text(device.memory_bytes)} memory"
    return None


def _too_much(job: JobSpec, candidate: Candidate, device: Capability) -> str | None:
    """Return what beside its link and memory speaks against a structure on a device, or None."""
    if device.families and candidate.family not in device.families:
        return f"the device does not have the family {candidate.family}: install the package that brings it"
    keyframe = _largest_keyframe(job, candidate)
    chain = chain_bytes(job, candidate)
    if device.storage_bytes and keyframe + chain > device.storage_bytes:
        needs = f"{size_text(keyframe)} keyframe and {size_text(chain)} of deltas"
        return f"{needs} are more than {size_text(device.storage_bytes)} storage"
    seconds, deadline_s = (
        training_s(job.training, candidate.macs, device, head=candidate.head),
        job.rounds.deadline_s,
    )
    if seconds > deadline_s * DEADLINE_MARGIN:
        return (
            f"training takes about {_seconds(seconds)}, more than {DEADLINE_MARGIN:.0%} of the "
            f"{_seconds(deadline_s)} deadline: a longer rounds.deadline_s or fewer training.epochs would do"
        )
    if device.day_quota_bytes and keyframe > device.day_quota_bytes:
        quota = size_text(device.day_quota_bytes)
        return f"{size_text(keyframe)} keyframe is more than a day's quota of {quota}"
    return None


def may_recover(device: Capability) -> bool:
    """Whether what a device says of its link was measured, perhaps in a bad hour; profiles do not change."""
    return device.link_measured and device.up_bits_s is not None


def training_s(training: Training, macs: int, device: Capability, *, head: bool = False) -> float:
    """Return about how long a training takes, in seconds; 0 where nobody measured.

    Args:
        training: how the job trains.
        macs: multiply-adds of its structure per sample, forward.
        device: what it says of itself.
        head: only the last layer is trained.
    """
    if not device.gflops:
        return 0.0
    # Of a frozen backbone the features are computed once.
    passes = device.samples * (1 if head else 3 * training.epochs)
    speed = device.gflops * 1e9 * min(1.0, device.cpu_share) * EFFICIENCY
    return passes * 2 * macs / speed


# --- links ---------------------------------------------------------------------------------------


def density(
    job: JobSpec,
    candidate: Candidate,
    device: Capability,
    *,
    download_bytes: int | None = None,
    round_s: float | None = None,
) -> tuple[float, str]:
    """Return the share of the parameters that an update of this device may carry, and why in words.

    It is the structure's own density, or less where the link is slow or its quota small: download, training
    and upload must end before the deadline, the upload takes at most LINK_SHARE of it, and the bytes of a
    day's rounds stay within the quota. Call it at every invitation: what a device says of its link changes.

    Args:
        job: settings.
        candidate: the structure that the device trains.
        device: what it says of itself.
        download_bytes: that it must fetch for this round; None: what the job's method sends per round.
        round_s: time between two participations, for the quota; None: the deadline.

    Returns:
        (density, words). Density 0.0: it cannot take part now, and the words say why.
    """
    if download_bytes is None:
        download_bytes = down_bytes(job, candidate)
    possible, limit = _possible(job, candidate, device, download_bytes, round_s)
    words = _limit_words(device, limit)
    least = least_density(candidate)
    if possible < least:
        return 0.0, _too_slow(job, candidate, device, f"{words}: ", possible, least, download_bytes)
    return possible, _explained(candidate, device, words, possible, job.sparsify.method)


def share(job: JobSpec, candidate: Candidate, device: Capability, *, round_s: float | None = None) -> float:
    """Return the density of `density` alone, for a round that misses no download: quick, without words."""
    possible, _ = _possible(job, candidate, device, down_bytes(job, candidate), round_s)
    return possible if possible >= least_density(candidate) else 0.0


def _possible(
    job: JobSpec, candidate: Candidate, device: Capability, download_bytes: int, round_s: float | None
) -> tuple[float, str]:
    """Return the largest share up to the structure's density, and what limits it: "", "link" or "quota"."""
    method, wanted = job.sparsify.method, candidate.density
    possible, limit = wanted, ""
    if device.up_bits_s is not None:
        limit = "link"
        seconds = _upload_s(job, candidate, device, download_bytes)
        room = device.up_bits_s * max(0.0, seconds) / 8 - OVERHEAD_BYTES
        possible = min(wanted, _carried(candidate.travelling, room, method, wanted))
    if device.day_quota_bytes:
        # Who takes part less often than daily has a day's quota all the same.
        rounds = max(1.0, DAY_S / (round_s or job.rounds.deadline_s))
        room = device.day_quota_bytes / rounds - download_bytes - OVERHEAD_BYTES
        affordable = _carried(candidate.travelling, room, method, wanted)
        if affordable < possible:
            possible, limit = affordable, "quota"
    return possible, limit


def _limit_words(device: Capability, limit: str) -> str:
    if limit == "quota":
        return f"quota of {size_text(device.day_quota_bytes)} per day"
    if limit == "link":
        source = "measured" if device.link_measured else "by its profile"
        return f"link of {rate_text(device.up_bits_s or 0.0)} {source}"
    return "link not measured"


def least_density(candidate: Candidate) -> float:
    """Return the lowest density that is of any use: what a device gets whose link is tried again."""
    return max(min(MIN_DENSITY, candidate.density), 1.0 / candidate.travelling)


def spacing_s(job: JobSpec, left: int, gap_s: float | None = None) -> float:
    """Return what to take for the time between two participations where a quota is spread over a day.

    Args:
        job: settings.
        left: rounds that the job still has: no more will come today.
        gap_s: mean time between the device's participations so far; None: not known, then the deadline.
    """
    return max(job.rounds.deadline_s if gap_s is None else gap_s, DAY_S / max(1, left))


def warmed(job: JobSpec, candidate: Candidate, number: int) -> Candidate:
    """Return a candidate with the densities of round `number`, 1 …: higher in the job's first rounds."""
    rules, rounds = job.sparsify, job.rounds.count

    def at(density: float) -> float:
        return density_at(min(number, rounds), rounds, density, rules.warmup_rounds, rules.warmup_factor)

    down = None if candidate.down_density is None else at(candidate.down_density)
    return replace(candidate, density=at(candidate.density), down_density=down)


def by_link(
    job: JobSpec,
    candidates: Sequence[Candidate],
    given: Assignment,
    device: Capability | None,
    *,
    round_s: float | None = None,
) -> Assignment:
    """Return an assignment with the density that its device's link allows now.

    Args:
        job: settings.
        candidates: the job's structures.
        given: the assignment.
        device: what is known of the device; None: nothing, and the assignment stays.
        round_s: see `density`.
    """
    candidate = next((c for c in candidates if c.id == given.structure), None)
    if candidate is None or device is None:
        return given
    share, words = density(job, candidate, device, round_s=round_s)
    return replace(given, density=share, link=words)


def update_bytes(parameters: int, density: float, method: str = "topk") -> int:
    """Return about how long an update is: by default the entropy of its positions, and its values."""
    if method in VALUE_BYTES:
        return math.ceil(parameters * VALUE_BYTES[method] * (1.0 if method in WHOLE else density))
    return math.ceil(parameters * _bits(density) / 8)


def _bits(density: float) -> float:
    """Return the bits per parameter of an update that carries this share of them."""
    rest = 1.0 - density
    entropy = -density * math.log2(density) if density else 0.0
    return entropy - (rest * math.log2(rest) if rest else 0.0) + VALUE_BITS * density


def _carried(parameters: int, size_bytes: float, method: str, enough: float = 1.0) -> float:
    """Return the largest density whose update fits into so many bytes; 0.0 if none does.

    Whether it is more than `enough` need not be found out exactly.
    """
    if method in VALUE_BYTES:
        share = min(1.0, max(0.0, size_bytes) / (VALUE_BYTES[method] * parameters))
        return share if method not in WHOLE else float(share == 1.0)
    room = 8.0 * size_bytes / parameters
    if room <= 0.0:
        return 0.0
    if enough <= LONGEST and _bits(enough) <= room:
        return enough
    low, high = 0.0, LONGEST
    if _bits(high) <= room:
        return 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2.0
        low, high = (middle, high) if _bits(middle) <= room else (low, middle)
    return low


def _upload_s(job: JobSpec, candidate: Candidate, device: Capability, download_bytes: int) -> float:
    """Return how long the upload may take; not positive: nothing is left of the deadline."""
    deadline_s = job.rounds.deadline_s
    left = deadline_s * DEADLINE_MARGIN - training_s(
        job.training, candidate.macs, device, head=candidate.head
    )
    return min(deadline_s * LINK_SHARE, left - _download_s(device, download_bytes))


def _download_s(device: Capability, download_bytes: int) -> float:
    if device.down_bits_s is None:
        return 0.0
    return 8.0 * download_bytes / device.down_bits_s if device.down_bits_s else math.inf


def _too_slow(
    job: JobSpec,
    candidate: Candidate,
    device: Capability,
    words: str,
    possible: float,
    least: float,
    download_bytes: int,
) -> str:
    """Say why a device cannot take part."""
    deadline_s = job.rounds.deadline_s
    if device.up_bits_s is not None and _upload_s(job, candidate, device, download_bytes) <= 0:
        down = _download_s(device, download_bytes)
        training = training_s(job.training, candidate.macs, device, head=candidate.head)
        return (
            f"{words}{size_text(download_bytes)} to download take about {_seconds(down)} and training "
            f"{_seconds(training)}: nothing is left for an update of the {_seconds(deadline_s)} deadline"
        )
    smallest = update_bytes(candidate.travelling, least, job.sparsify.method)
    return (
        f"{words}room for {_percent(possible)} of the parameters per round, at least {_percent(least)} "
        f"({size_text(smallest)}) is needed: a longer rounds.deadline_s or a smaller structure would do"
    )


def _explained(candidate: Candidate, device: Capability, words: str, share: float, method: str) -> str:
    """Say what the device sends per round, and how long it takes."""
    size = update_bytes(candidate.travelling, share, method)
    if method in WHOLE:
        told = (
            f"about {_seconds(8.0 * (size + OVERHEAD_BYTES) / device.up_bits_s)}" if device.up_bits_s else ""
        )
        return f"{words}: all parameters per round, {told or f'about {size_text(size)}'} per update"
    told = f"{words}: {_percent(share)} of the parameters per round"
    if share < candidate.density:
        told = (
            f"{words}: {_percent(share)} instead of {_percent(candidate.density)} of the parameters per round"
        )
    if device.up_bits_s:
        told += f", about {_seconds(8.0 * (size + OVERHEAD_BYTES) / device.up_bits_s)} per update"
    else:
        told += f", about {size_text(size)} per update"
    return f"{told}; the rest follows in later rounds" if share < candidate.density else told


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %" if share >= 0.0001 or not share else f"{100 * share:.1g} %"


def _seconds(seconds: float) -> str:
    """Return an estimated time: no tenths of what nobody knows so exactly."""
    if math.isinf(seconds):
        return "for ever"
    return duration_text(round(seconds) if seconds >= 9.5 else seconds)
