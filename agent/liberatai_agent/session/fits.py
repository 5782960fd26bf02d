"""Does a task fit this device? A pure decision on what the task says, before anything is reserved for it.

The coordinator plans with what the device told about itself, but it may err or be somebody else's. So the
device has ceilings of its own; what is above one is refused with a code, and the text says which.
"""

import math
from collections.abc import Collection
from typing import Final

import msgspec

from liberatai_agent.config import AgentConfig
from liberatai_core.contract.limits import MAX_OBJECT_BYTES, MAX_SAMPLES
from liberatai_core.contract.messages import Capability, TaskSpec
from liberatai_core.errors import MemoryLimitError, TaskLimitError, TooLargeError
from liberatai_core.profile import Trainer, trainers
from liberatai_core.structure import head_tensors, trains_head

MIB = 1 << 20
RUNTIME_BYTES: Final[dict[Trainer, int]] = {"torch": 190 * MIB, "numpy": 36 * MIB}
"""A process after its imports, without anything to train; the least of what was measured."""
BYTES_PER_PARAMETER = 30
"""Weights, gradient, momentum, start, base, difference, residual, and selecting: 31 measured with SGD."""
ADAM_BYTES_PER_PARAMETER = 8
"""A second moment, and one temporary of that size."""
COPIES_OF_BATCH = 3
"""The batch, its augmented copy, and the gradient of the first layer."""
COPIES_OF_DATA = 2
"""The file's samples, and those that are trained on."""
MAX_SEEN = 50 * MAX_SAMPLES
"""Samples that one training may look at, repetitions counted: days, even for small models on large boards."""
SPARE_CPU_S = 60.0
"""Imports, and a clock that differs from the agent's."""
DENSE = ("dense", "client_sampling")
PLAIN = ("quantile", "quantile_over_senders")
"""Sparse methods that send float32 values: all of them, or some with their positions."""
SENT_BYTES = 0.25
"""Of an update, per parameter that any other method sends, at least: a sign, and hardly a position."""


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What a device gives to one training.

    Attributes:
        memory_bytes: for the whole training process.
        runtimes: what is installed.
        residual_bytes: on disk, for what sparsifying leaves over and for the update itself.
        samples: local ones.
        seen: samples that one training may look at, repetitions counted.
        cpu_seconds: processor time of one training.
    """

    memory_bytes: int = 1 << 62
    runtimes: tuple[str, ...] = ("torch",)
    residual_bytes: int = 1 << 62
    samples: int = 0
    seen: int = MAX_SEEN
    cpu_seconds: float = 30 * 86_400.0


def limits_of(config: AgentConfig, caps: Capability, deadline_s: float) -> Limits:
    """Return what this device gives to one training.

    Args:
        config: its settings.
        caps: what it announced.
        deadline_s: of the task: a thread that trains cannot use more processor time than time.
    """
    return Limits(
        memory_bytes=caps.memory_bytes or 1 << 62,
        runtimes=caps.runtimes,
        residual_bytes=int(config.outbox_max_mb * MIB),
        samples=caps.samples,
        cpu_seconds=deadline_s + SPARE_CPU_S,
    )


def trainer_of(spec: TaskSpec, limits: Limits, too_heavy: Collection[Trainer] = ()) -> Trainer:
    """Return what trains a task here: torch if it is installed and there is room for it, else numpy.

    Heads are trained in numpy anyway.

    Args:
        spec: what the task says.
        limits: the device's.
        too_heavy: what this structure ran out of memory with.
    """
    if trains_head(spec.structure):
        return "numpy"
    able = trainers(limits.runtimes, limits.memory_bytes, spec.structure.parameters)
    lightest: Trainer = "numpy" if "numpy" in limits.runtimes else "torch"
    return next((one for one in able if one not in too_heavy), lightest)


def require_fits(spec: TaskSpec, density: float, limits: Limits, trainer: Trainer = "torch") -> None:
    """Refuse a task that is too large for this device.

    Args:
        spec: what the task says.
        density: share of the trained parameters that the update names.
        limits: the device's.
        trainer: what would train it.

    Raises:
        MemoryLimitError: it needs more memory than the device gives.
        TaskLimitError: it asks for more passes over the data than the device makes.
        TooLargeError: its update or what is left over would be larger than what may be sent or kept.
    """
    needed = memory_bytes(spec, limits.samples, trainer)
    if needed > limits.memory_bytes:
        raise MemoryLimitError(
            f"{spec.structure.id}: {spec.structure.parameters} parameters and batches of"
            f" {spec.training.batch_size} need at least {needed // MIB} MiB, this device gives"
            f" {limits.memory_bytes // MIB}"
        )
    looks = seen(spec, limits.samples)
    if looks > limits.seen:
        raise TaskLimitError(f"{looks} samples in {spec.training.epochs} epochs, at most {limits.seen}")
    sent = update_bytes(spec, density)
    if sent > MAX_OBJECT_BYTES:
        raise TooLargeError(
            f"an update of {spec.structure.id} with density {density:g} takes about {sent} bytes,"
            f" at most {MAX_OBJECT_BYTES}"
        )
    kept = sent + trained_parameters(spec) * 4
    if kept > limits.residual_bytes:
        raise TooLargeError(
            f"an update of {spec.structure.id} and what it leaves over take about {kept} bytes,"
            f" {limits.residual_bytes} may wait here"
        )


def memory_bytes(spec: TaskSpec, samples: int, trainer: Trainer = "torch") -> int:
    """Return what training takes at least; the activations between the layers are not known here."""
    values = math.prod(spec.data.input_shape)
    if trains_head(spec.structure):
        head = sum(tensor.size for tensor in head_tensors(spec.structure))
        # Features are computed a few samples at a time, and kept in a byte each.
        return RUNTIME_BYTES["numpy"] + 12 * spec.structure.parameters + 12 * head + 4 * samples * values
    per_parameter = BYTES_PER_PARAMETER + ADAM_BYTES_PER_PARAMETER * (spec.training.optimizer == "adam")
    batch = min(spec.training.batch_size, max(samples, 1))
    numbers = COPIES_OF_BATCH * batch * (values + spec.data.classes) + COPIES_OF_DATA * samples * values
    return RUNTIME_BYTES[trainer] + per_parameter * spec.structure.parameters + 4 * numbers


def seen(spec: TaskSpec, samples: int) -> int:
    """Return how many samples a training looks at, repetitions counted."""
    steps = spec.training.epochs * -(-samples // spec.training.batch_size)
    if spec.training.max_steps:
        steps = min(steps, spec.training.max_steps)
    return steps * min(spec.training.batch_size, max(samples, 1))


def trained_parameters(spec: TaskSpec) -> int:
    """Return about how many parameters the task trains."""
    if trains_head(spec.structure):
        return sum(tensor.size for tensor in head_tensors(spec.structure))
    return math.ceil(spec.structure.parameters * spec.trained_share)


def update_bytes(spec: TaskSpec, density: float) -> int:
    """Return about how many bytes an update has at least."""
    if spec.codec in DENSE:
        return 4 * trained_parameters(spec)
    each = 8.0 if spec.codec in PLAIN else SENT_BYTES
    return int(each * density * trained_parameters(spec))
