"""Which device gets which variant, and why. Pure: values in, a plan that explains itself out.

The job lists its structures from the most to the least wanted; a device gets the first one that fits its
storage, its memory and the round's deadline. All devices of a structure share one keyframe and delta chain
(DESIGN §5), so the tightest storage among them sizes the keyframe.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from liberatai_coordinator.config import JobSpec
from liberatai_core.contract.messages import Capability

MIN_KEYFRAME_BITS = 2.0
"""Below two bits per weight a keyframe without retraining loses too much (compressor benchmark)."""
CHAIN_ROUNDS = 12
"""Rounds whose deltas must fit beside the keyframe, before a new keyframe must be published."""
TORCH_BYTES = 340 * 2**20
"""Resident memory of the training process before the first batch (measured 330 MiB for a LeNet)."""
DEADLINE_SHARE = 0.5
"""Half of the deadline for training; the rest for transfers, other load and retries."""
LINK_SHARE = 0.1
"""A tenth of the deadline for the update's way up: the link serves other purposes too."""
UPDATE_BITS = 10.0
"""Bits per carried coordinate, position and value (sparsifier at 1-10 %: 7-10)."""
EFFICIENCY = 0.15
"""Share of the measured matrix product that small networks reach in training."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """What the plan must know of a structure.

    Attributes:
        parameters: values of the flat vector.
        smallest_bytes: smallest keyframe that the compressor can make.
        macs: multiply-adds per sample, forward.
        activation_bytes: memory of one sample's activations in training.
        density: share of the parameters that an update carries.
    """

    id: str
    family: str
    density: float
    parameters: int
    smallest_bytes: int
    macs: int
    activation_bytes: int

    def keyframe_bytes(self, bits: float) -> int:
        """Return about how long a keyframe is at so many bits per weight."""
        return max(self.smallest_bytes, int(self.parameters * bits / 8) + 512)


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """One device's part. `structure` "" means: it does not take part, and `why` says so."""

    device: str
    structure: str
    budget_bytes: int
    density: float
    why: str


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
    budgets: dict[str, int] = {}
    for candidate in candidates:
        storages = [a.budget_bytes for a in assignments.values() if a.structure == candidate.id]
        if storages:
            budgets[candidate.id] = keyframe_budget(job, candidate, min(storages))
    return Plan(assignments=assignments, keyframe_bytes=budgets)


def keyframe_budget(job: JobSpec, candidate: Candidate, storage_bytes: int) -> int:
    """Return how long the keyframe may be where `storage_bytes` is the tightest storage."""
    wished = candidate.keyframe_bytes(job.compress.bits)
    return min(wished, storage_bytes - chain_bytes(candidate)) if storage_bytes else wished


def chain_bytes(candidate: Candidate) -> int:
    """Return about how much room the deltas take before a new keyframe is due."""
    return int(CHAIN_ROUNDS * candidate.parameters * candidate.density * UPDATE_BITS / 8)


def assign(job: JobSpec, candidates: Sequence[Candidate], device: Capability) -> Assignment:
    """Return what one device gets: the first structure that nothing speaks against."""
    refusal = _unfit(job, device)
    if refusal:
        return Assignment(
            device=device.device, structure="", budget_bytes=device.storage_bytes, density=0.0, why=refusal
        )
    against: list[str] = []
    for candidate in candidates:
        reason = _too_much(job, candidate, device)
        if reason is None:
            size = keyframe_budget(job, candidate, device.storage_bytes)
            density, link = _density(job, candidate, device)
            limit = f"{_kib(device.storage_bytes)} storage" if device.storage_bytes else "unlimited storage"
            fits = f"{candidate.id} fits: {_kib(size)} keyframe in {limit}"
            return Assignment(
                device=device.device,
                structure=candidate.id,
                budget_bytes=device.storage_bytes,
                density=density,
                why="; ".join([*against, fits, *link]),
            )
        against.append(f"{candidate.id}: {reason}")
    return Assignment(
        device=device.device,
        structure="",
        budget_bytes=device.storage_bytes,
        density=0.0,
        why="nothing fits: " + "; ".join(against),
    )


def _unfit(job: JobSpec, device: Capability) -> str:
    if device.tier != "full":
        return f"tier {device.tier}: cannot train (torch is not installed or memory is too small)"
    if device.samples == 0:
        return "no usable local data"
    if device.data is not None and device.data.input_shape != job.data.input_shape:
        return f"its data has shape {device.data.input_shape}, the job wants {job.data.input_shape}"
    if device.data is not None and device.data.classes > job.data.classes:
        return f"its data has {device.data.classes} classes, the job {job.data.classes}"
    return ""


def _too_much(job: JobSpec, candidate: Candidate, device: Capability) -> str | None:
    """Return what speaks against a structure on a device, or None."""
    if device.families and candidate.family not in device.families:
        return f"the device does not have the family {candidate.family}: install the package that brings it"
    keyframe = candidate.keyframe_bytes(min(MIN_KEYFRAME_BITS, job.compress.bits))
    chain = chain_bytes(candidate)
    if device.storage_bytes and keyframe + chain > device.storage_bytes:
        needs = f"{_kib(keyframe)} keyframe and {_kib(chain)} of deltas"
        return f"{needs} are more than {_kib(device.storage_bytes)} storage"
    # Weights, gradient, two optimiser moments, the base and the difference: six float32 vectors.
    memory = (
        TORCH_BYTES + 24 * candidate.parameters + job.training.batch_size * 2 * candidate.activation_bytes
    )
    if device.memory_bytes and memory > device.memory_bytes:
        return f"training takes {_mib(memory)} of {_mib(device.memory_bytes)} memory"
    if device.gflops:
        passes = 3 * job.training.epochs * device.samples
        speed = device.gflops * 1e9 * min(1.0, device.cpu_share) * EFFICIENCY
        seconds = passes * 2 * candidate.macs / speed
        if seconds > job.rounds.deadline_s * DEADLINE_SHARE:
            return f"training takes about {seconds:.0f} s of the {job.rounds.deadline_s:.0f} s deadline"
    return None


def _density(job: JobSpec, candidate: Candidate, device: Capability) -> tuple[float, list[str]]:
    """Return the share of parameters that the link can carry in time, and a remark if it is less."""
    wanted = candidate.density
    if not device.up_bits_s:
        return wanted, []
    bits = device.up_bits_s * job.rounds.deadline_s * LINK_SHARE
    possible = bits / (candidate.parameters * UPDATE_BITS)
    if possible >= wanted:
        return wanted, []
    density = max(possible, 1.0 / candidate.parameters)
    link = f"link of {device.up_bits_s / 1e3:.0f} kbit/s"
    remark = f"{link}: {density:.2%} of the parameters per round, not {wanted:.2%}"
    return density, [remark]


def _kib(size_bytes: int) -> str:
    return f"{size_bytes / 1024:.1f} KiB"


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:.0f} MiB"
