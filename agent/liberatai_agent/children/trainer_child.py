"""The training process: restores the base, trains on local data, answers with a sparse update.

`python -m liberatai_agent.children.trainer_child PARENT_PID SOCKET` reads Work from the socket (a file
descriptor that it inherits) and writes Done or Failed to it, until it is closed. It dies with its parent.
Without arguments it serves the connection that a service manager accepted, and dies with that.
Everything is a function of (task, device, round, data, left-overs), so a training repeated after a crash
gives the same bytes. P9: only sums, counts and the sparse difference leave this process.
"""

import contextlib
import errno
import hashlib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import msgspec

from liberatai_agent.children import residual, start
from liberatai_agent.children.confine import be_small, confine, die_with, limit, step_back
from liberatai_agent.children.messages import (
    HELLO,
    LENGTH,
    Answer,
    Done,
    Failed,
    File,
    Prepare,
    Work,
    decode_request,
    encode,
    require_length,
)
from liberatai_agent.events import Returned, TrainingResult
from liberatai_core.contract.limits import MAX_OBJECT_BYTES
from liberatai_core.contract.messages import part_seed, work_seed
from liberatai_core.errors import (
    CodecError,
    ConfigError,
    DataError,
    DigestError,
    LiberataiError,
    MemoryLimitError,
    NonFiniteError,
    TaskLimitError,
    TooLargeError,
    TrainingError,
)
from liberatai_core.profile import MAPS, PROCESS_BYTES, training_bytes
from liberatai_core.structure import head_places, trains_head

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from liberatai_core.learning.dataset import Samples
    from liberatai_core.learning.head_training import Features
    from liberatai_core.learning.training import TrainResult, TrainSettings
    from liberatai_core.sparsifier.subspace import Subspace
    from liberatai_core.sparsifier.top_k import State
    from liberatai_core.structure import Structure
    from liberatai_core.weights import Vector

FIRST_PASSED = 3
"""Descriptors that a service manager passes begin here (SD_LISTEN_FDS_START)."""

OUT_OF_MEMORY = ("can't allocate memory", "cannot allocate memory", "bad_alloc", "out of memory")
"""What torch and the C++ library say when an allocation fails."""

MIN_SAMPLES_FOR_HOLDOUT = 40
HOLDOUT_SHARE = 0.15
"""Six samples of forty: fewer say nothing, more would be missed in training."""


@dataclass(slots=True)
class Memory:
    """What is kept between two rounds: the last base (for the next delta), the data, bytes per activation.

    Of a frozen backbone also the features of all samples, and what they are features of.
    """

    base: "tuple[bytes, Vector] | None" = None
    samples: "tuple[object, Samples] | None" = None
    cost: tuple[object, int] | None = None
    features: "tuple[object, Features] | None" = None


def work(task: Work, memory: Memory) -> Answer:
    """Return the outcome of one training; never raises for what a task, a file or data may cause."""
    try:
        return Done(result=_train(task, memory))
    except LiberataiError as error:
        return Failed(code=error.code, text=str(error)[:512])
    except Exception as error:  # noqa: BLE001 - a library's fault must not end the process without a word
        if out_of_memory(error):
            text = f"not enough memory for {task.structure.id}: {task.memory_bytes >> 20} MiB are given"
            return Failed(code=MemoryLimitError.code, text=text)
        return Failed(code=TrainingError.code, text=f"{type(error).__name__}: {error}"[:512])


def out_of_memory(error: Exception) -> bool:
    """Whether an exception means that memory ran out; torch says so in words only."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    words = str(error).lower()
    return isinstance(error, RuntimeError) and any(said in words for said in OUT_OF_MEMORY)


def _train(task: Work, memory: Memory) -> TrainingResult:
    import numpy as np  # noqa: PLC0415 - the parent imports this module's neighbours

    from liberatai_core.learning import training  # noqa: PLC0415
    from liberatai_core.sparsifier import methods, top_k  # noqa: PLC0415

    if task.check:
        return _checked(task, memory)
    if task.codec not in methods.METHODS:
        raise CodecError(f"unknown sparse method {task.codec}")
    seed = work_seed(task.seed, task.device, task.job, task.round)
    base = base_weights(task, memory)
    samples = _samples(task, memory)
    if not trains_head(task.structure):
        _require_room(task, memory, len(samples))
    if samples.y is None:
        raise DataError(f"{task.data_path}: no labels: training needs a key y beside x")
    held = holdout(task, len(samples), samples.test)
    y = samples.y[~held]
    chosen = trained_part(task)
    if trains_head(task.structure):
        trained, evaluation = _train_head(task, memory, base, samples, held, seed)
    else:
        evaluation = _evaluate(task, base, samples.x[held], samples.y[held]) if held.any() else None
        trained = training.train(
            task.structure,
            task.data,
            base,
            samples.x[~held],
            y,
            _settings(task),
            seed,
            gain=chosen.gain,
            runtime=task.runtime,
        )
    state, body, dropped = sparsified(
        task, chosen.part, lambda: chosen.gather(trained.weights) - chosen.gather(base)
    )
    counts = np.bincount(y, minlength=task.data.classes).tolist() if task.share_class_counts else None
    return TrainingResult(
        body=body,
        residual=top_k.state_to_bytes(state),
        returned=tuple(one.update_id for one in task.returned),
        dropped=dropped,
        samples=len(y),
        class_counts=None if counts is None else tuple(counts),
        evaluation=evaluation,
        train_seconds=trained.seconds,
        loss=trained.loss,
    )


def _checked(task: Work, memory: Memory) -> TrainingResult:
    """Return how a model does on the hold-out, after its files were found to give what they promise."""
    weights = base_weights(task, memory)
    evaluation = None
    if task.data_path:
        samples = _samples(task, memory)
        held = holdout(task, len(samples), samples.test)
        if samples.y is not None and held.any():
            evaluation = _evaluate(task, weights, samples.x[held], samples.y[held])
    return TrainingResult(body=b"", samples=0, evaluation=evaluation)


def _train_head(
    task: Work,
    memory: Memory,
    base: "Vector",
    samples: "Samples",
    held: "NDArray[np.bool_]",
    seed: int,
) -> "tuple[TrainResult, tuple[int, int] | None]":
    """Train the last layer alone; the features of a frozen backbone are computed once."""
    import numpy as np  # noqa: PLC0415

    from liberatai_core.learning import head_training  # noqa: PLC0415
    from liberatai_core.weights import digest  # noqa: PLC0415

    assert samples.y is not None  # noqa: S101 - the caller looked
    frozen = digest(base[: head_places(task.structure).start])
    assert memory.samples is not None  # noqa: S101 - they were just read
    wanted = (task.structure, frozen, memory.samples[0])
    if memory.features is None or memory.features[0] != wanted:
        memory.features = None
        found = head_training.features(task.structure, task.data, base, samples.x)
        memory.features = (wanted, found)
    every = memory.features[1]
    evaluation = None
    if held.any():
        predicted = head_training.log_probabilities(task.structure, base, every.of(held)).argmax(axis=1)
        evaluation = int((predicted == samples.y[held]).sum()), int(held.sum())
    rest = every.of(~held)
    trained = head_training.train_head(
        task.structure, task.data, base, rest, np.asarray(samples.y[~held]), _settings(task), seed
    )
    return trained, evaluation


def _require_room(task: Work, memory: Memory, samples: int) -> None:
    """Refuse a batch whose activations alone are more than the device gives, before they are computed.

    Those of installed families are not counted: they are tried, which takes seconds and memory itself, and
    the limit of the process holds anyway.

    Raises:
        MemoryLimitError: they are.
    """
    from liberatai_core.learning.families import FAMILIES, cost  # noqa: PLC0415

    if task.structure.family not in FAMILIES:
        return
    if memory.cost is None or memory.cost[0] != (task.structure, task.data):
        memory.cost = (task.structure, task.data), cost(task.structure, task.data).activation_bytes_per_sample
    batch = min(task.training.batch_size, samples)
    maps = (training_bytes(task.runtime, 0, batch, memory.cost[1]) - PROCESS_BYTES[task.runtime]) // MAPS
    if maps > task.memory_bytes:
        raise MemoryLimitError(
            f"a batch of {batch} through {task.structure.id} takes {maps >> 20} MiB,"
            f" this device gives {task.memory_bytes >> 20}"
        )


def trained_part(task: Work) -> "Subspace":
    """Return the coordinates that the task trains; the coordinator draws the same ones."""
    from liberatai_core.sparsifier.subspace import subspace  # noqa: PLC0415

    seed = part_seed(task.seed, task.job, task.structure.id)
    return subspace(task.structure, task.trained_share, seed)


Dropped = tuple[str, str] | None
"""(code, text) of left-overs that could not be used."""


def sparsified(
    task: Work, part: "Structure", difference: "Callable[[], Vector]"
) -> "tuple[State, bytes, Dropped]":
    """Return the next state, the update, and what was wrong with left-overs that do not go in.

    A training must not fail for ever because of what an earlier one left: what cannot be read is let go, and
    if the sum overflows, all of it is.

    Args:
        task: the training.
        part: the named tensors of what is trained.
        difference: gives what was learned now, shape (part.parameters,); a new vector at each call.
    """
    from liberatai_core.sparsifier import methods, schedule, top_k  # noqa: PLC0415

    method = methods.METHODS[task.codec]
    seed = work_seed(task.seed, task.device, task.job, task.round)
    worth = schedule.decay(task.rounds_away, task.residual_decay, task.residual_limit)

    def sparsify(state: "State", wanted: "Vector") -> "tuple[State, bytes]":
        return method.sparsify(state, wanted, part, task.density, seed=seed, decay=worth)

    state, dropped = _state(task, part)
    total = difference()
    if method.feedback:
        total, lost = _with_returned(task, part, total)
        dropped = dropped or lost
    try:
        return *sparsify(state, total), dropped
    except NonFiniteError as error:
        # Without left-overs it is the training itself that went wrong, and the same error comes again.
        fresh = sparsify(top_k.init(part.parameters), difference())
        return *fresh, (error.code, f"with what was left over: {error}")


def _state(task: Work, part: "Structure") -> "tuple[State, Dropped]":
    """Return the sparsifier's state before this round; a new one if the stored one does not fit."""
    from liberatai_core.sparsifier import top_k  # noqa: PLC0415

    fresh = top_k.init(part.parameters)
    if task.residual is None:
        return fresh, None
    try:
        return top_k.state_from_bytes(task.residual, part.parameters), None
    except LiberataiError as error:
        return fresh, (error.code, str(error))


def _with_returned(task: Work, part: "Structure", total: "Vector") -> "tuple[Vector, Dropped]":
    """Return a difference to which was added what refused updates meant; one that is broken is left out."""
    import numpy as np  # noqa: PLC0415

    dropped = None
    for one in task.returned:
        try:
            with np.errstate(over="ignore"):
                total += _meant(task, part, one)
        except LiberataiError as error:
            dropped = error.code, f"refused update of round {one.round}: {error}"
    return total, dropped


def _meant(task: Work, part: "Structure", one: Returned) -> "Vector":
    """Return the difference that a refused update meant; drawn coordinates are those of its own round."""
    from liberatai_core.sparsifier import methods  # noqa: PLC0415

    return methods.densify(one.body, part, work_seed(task.seed, task.device, task.job, one.round))


def base_weights(task: Work, memory: Memory) -> "Vector":
    """Return the weights that the path leads to.

    The base of the last round is the start if the path goes through it. Only where the path ends is checked:
    a file that rotted on the way leads elsewhere.

    Raises:
        DigestError: it leads to other weights than the task names, or a file cannot be read.
    """
    from liberatai_core.learning.held import followed  # noqa: PLC0415

    start: Vector | None = None
    steps = task.path
    names = [step.digest for step in steps]
    if memory.base is not None and memory.base[0] in names:
        known = len(names) - 1 - names[::-1].index(memory.base[0])
        if memory.base[1].shape == (task.structure.parameters,):
            start, steps = memory.base[1], steps[known + 1 :]
    memory.base = None
    files = ((Path(step.path).name, _read(step)) for step in steps)
    weights = followed(files, trained_part(task), names[-1] if names else b"", start)
    memory.base = (names[-1], weights)
    return weights


def _read(step: File) -> bytes:
    path = Path(step.path)
    try:
        if path.stat().st_size > MAX_OBJECT_BYTES:
            raise TooLargeError(f"{path.name}: {path.stat().st_size} bytes, at most {MAX_OBJECT_BYTES}")
        return path.read_bytes()
    except OSError as error:
        raise DigestError(f"{path.name}: {error.strerror}") from error


def _samples(task: Work, memory: Memory) -> "Samples":
    from liberatai_core.learning.dataset import load_npz, require_training_rows  # noqa: PLC0415

    path = Path(task.data_path)
    try:
        found = path.stat()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    wanted = (task.data_path, task.data, found.st_mtime_ns, found.st_size)
    if memory.samples is None or memory.samples[0] != wanted:
        memory.samples = None
        samples = load_npz(path, task.data)
        require_training_rows(samples, task.data_path)
        memory.samples = (wanted, samples)
    return memory.samples[1]


def holdout(task: Work, count: int, test: "NDArray[np.bool_] | None") -> "NDArray[np.bool_]":
    """Return which samples are never trained on: the file's test rows, or a seeded share of the rest.

    The choice depends on device and job only, so no sample changes sides between rounds.
    """
    import numpy as np  # noqa: PLC0415

    if test is not None and test.any():
        return test
    held = np.zeros(count, dtype=np.bool_)
    if count >= MIN_SAMPLES_FOR_HOLDOUT:
        random = np.random.default_rng(_number("holdout", task.device, task.job))
        held[random.permutation(count)[: int(count * HOLDOUT_SHARE)]] = True
    return held


def _evaluate(
    task: Work, base: "Vector", x: "NDArray[np.float32]", y: "NDArray[np.int64]"
) -> tuple[int, int]:
    from liberatai_core.learning.training import log_probabilities  # noqa: PLC0415

    found = log_probabilities(task.structure, task.data, base, x, runtime=task.runtime)
    predicted = found.argmax(axis=1)
    return int((predicted == y).sum()), len(y)


def _settings(task: Work) -> "TrainSettings":
    from liberatai_core.learning.training import TrainSettings  # noqa: PLC0415

    try:
        return TrainSettings(**msgspec.structs.asdict(task.training))
    except ConfigError as error:
        raise DataError(f"the task cannot be trained here: {'; '.join(error.faults)}") from error


def _number(*parts: str) -> int:
    """Return a 63-bit number that depends on all parts: torch takes no more."""
    return int.from_bytes(hashlib.sha256("\0".join(parts).encode()).digest()[:8], "big") >> 1


# --- the process -------------------------------------------------------------------------------


def serve(source: BinaryIO, sink: BinaryIO) -> None:
    """Answer Work until the source ends."""
    memory = Memory()
    while head := source.read(LENGTH.size):
        if len(head) != LENGTH.size:
            return
        size = LENGTH.unpack(head)[0]
        require_length(size)
        body = source.read(size)
        if len(body) != size:
            return
        try:
            task = decode_request(body)
            if isinstance(task, Prepare):
                with contextlib.suppress(ImportError):  # the first task is answered with E_EXTRA
                    import_module(task.runtime)
                continue
            limit(task.memory_bytes, task.cpu_seconds)
            answer = _with_files(task, memory)
        except msgspec.MsgspecError as error:
            answer = Failed(code="E_INTERNAL", text=f"the trainer was sent nonsense: {error}"[:512])
        sink.write(encode(answer))
        sink.flush()


def _with_files(task: Work, memory: Memory) -> Answer:
    answer = work(task := residual.read(task), memory)
    if isinstance(answer, Failed):
        return answer
    try:
        return Done(result=residual.write(task, answer.result))
    except LiberataiError as error:
        return Failed(code=error.code, text=str(error)[:512])


def main(argv: Sequence[str]) -> int:
    """Confine the process, then serve.

    Args:
        argv: process id of the agent that started it, and the socket to it; none if a service manager did,
            for a connection of the agent.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if argv:
        confine(int(argv[0]))
        step_back()
        channel = int(argv[1])
    else:
        channel = _accepted()
    os.set_inheritable(channel, False)
    with os.fdopen(channel, "rb") as source, os.fdopen(os.dup(channel), "wb") as sink:
        serve(source, sink)
    return 0


def _accepted() -> int:
    """Return the connection that systemd accepted for this process, see sd_listen_fds(3).

    The agent is not the parent: it is told the process id, and when it is gone, so is this process.
    """
    if os.environ.get("LISTEN_PID") != str(os.getpid()) or os.environ.get("LISTEN_FDS") != "1":
        sys.stderr.write("E_STATE: the training process is started by the agent or by its socket unit\n")
        sys.exit(2)
    be_small()
    step_back()
    if state := os.environ.get("STATE_DIRECTORY"):
        from liberatai_agent.updates import keeper  # noqa: PLC0415 - it brings SQLite and more

        keeper.follow(Path(state))
        folder = start.fresh_folder(Path(state), "trainer")
        os.environ.update(start.environment(folder))
        os.chdir(folder)
    signal.signal(signal.SIGXCPU, _too_long)
    with os.fdopen(os.dup(FIRST_PASSED), "wb") as sink:
        sink.write(HELLO.pack(os.getpid()))
    die_with(FIRST_PASSED)
    return FIRST_PASSED


def _too_long(_number: int, _frame: object) -> None:
    raise TaskLimitError("the training took more processor time than its deadline allows")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
