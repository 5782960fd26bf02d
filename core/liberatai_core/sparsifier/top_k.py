"""Top-k by magnitude over the whole model, with error feedback and few levels.

Sparse ternary compression (Sattler et al., arXiv 1903.02891) with a dead-zone quantiser that has more
levels at higher density: what is not sent, because it is small or because its level is coarse, stays in
the residual and is sent in a later round. Nothing is lost:

    u = decay * residual + difference        (float32, the only rounding)
    densify(update) + residual' == u         bit for bit, with float32 storage

The second line holds because a sent value is scale x level with at most 16 significant bits, no value
below scale / 2 is sent (Sterbenz: the subtraction is exact), and the scale is at least 2^-15 of the
largest value of its group. With float16 storage residual' is rounded to 11 significant bits, and exactly
that rounded residual is what stays in memory.
"""

import math
import zlib
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from liberatai_core.errors import CodecError, NonFiniteError, StructureError
from liberatai_core.sparsifier import codec
from liberatai_core.structure import MAX_PARAMETERS, Structure, require_length
from liberatai_core.weights import Vector, require_finite

Storage = Literal["float32", "float16"]

_GROUP = 32
"""A tensor with fewer non-zeros may share its neighbour's scale: 4 bytes would be over 1 bit per non-zero."""
_SAMPLE = 1 << 16
"""Magnitudes looked at when a scale is chosen."""
_FLOOR = 2.0**-15
"""Smallest scale in units of the largest magnitude: keeps the subtraction exact (see above)."""
_LARGEST = 3.3e38
"""Just below the largest float32."""
_MAGIC = b"LAR1"
_HEAD = len(_MAGIC) + 1 + 2 + 4
"""Magic, storage (value size), exponent i16, rounds u32."""
_HALF_TOP = 14
"""Largest residual is stored just below 2^14 in float16: it cannot overflow, small ones keep 28 binades."""


@dataclass(frozen=True, eq=False)
class State:
    """What a device keeps between rounds.

    Attributes:
        residual: float32, shape (parameters,): what was not sent yet.
        rounds: number of updates made so far.
        storage: how `state_to_bytes` stores the residual; "float16" rounds it in every round.
    """

    residual: Vector
    rounds: int = 0
    storage: Storage = "float32"


def init(parameters: int, *, storage: Storage = "float32") -> State:
    """Return the state before the first round: nothing left over.

    Raises:
        StructureError: the number of parameters is not in 1 … 2^28.
    """
    if not 0 < parameters <= MAX_PARAMETERS:
        raise StructureError(f"{parameters} parameters, wanted 1 … {MAX_PARAMETERS}")
    return State(np.zeros(parameters, np.float32), storage=storage)


def default_levels(density: float) -> int:
    """Return the number of magnitudes that suits a density: ternary when sparse, 4 bits when dense."""
    if density <= 0.03:
        return 1
    return 3 if density <= 0.2 else 15


def sparsify(
    state: State,
    difference: Vector,
    structure: Structure,
    density: float,
    *,
    levels: int | None = None,
    decay: float = 1.0,
    power_of_two: bool = False,
) -> tuple[State, bytes]:
    """Return the next state and the update of one round.

    At most round(density x parameters), but at least one, of the largest values of `u` are sent; of
    equal ones those with the lowest index. Values that a level cannot represent (below half a scale)
    and zeros are not sent. For density up to 0.1 the extra memory is below 3 x 4 bytes per parameter.

    Args:
        state: result of `init` or of the round before.
        difference: float32, shape (parameters,): trained weights minus base version.
        structure: the named tensors of the flat vector; scales are per tensor.
        density: fraction of the parameters to send, in (0, 1].
        levels: magnitudes per value, 1 (ternary) … 255; default: by density.
        decay: what an old residual is worth, in [0, 1]; below 1 for devices that come back rarely.
        power_of_two: round scales to powers of two, so that sums of many updates are exact (`merge`).

    Raises:
        StructureError: state or difference do not belong to the structure.
        NonFiniteError: a value is NaN or infinite, or the sum overflows.
        ValueError: density, levels or decay out of range.
    """
    require_length(difference, structure)
    require_length(state.residual, structure)
    if not 0 < density <= 1 or not 0 <= decay <= 1:
        raise ValueError(f"density {density} must lie in (0, 1] and decay {decay} in [0, 1]")
    number = default_levels(density) if levels is None else levels
    if not 1 <= number <= codec.MAX_LEVELS:
        raise ValueError(f"levels {number} must lie in 1 … {codec.MAX_LEVELS}")
    require_finite(difference, "difference")
    total = state.residual * np.float32(decay)
    with np.errstate(over="ignore"):
        total += difference
    require_finite(total, "difference + residual")
    chosen = largest(total, max(1, round(density * total.size)))
    sparse = _quantise(total, chosen, structure, number, power_of_two=power_of_two)
    update = codec.encode(sparse, structure.parameters)
    total[sparse.positions] -= sparse.values()
    if state.storage == "float16":
        total = _round_half(total)
    return State(total, state.rounds + 1, state.storage), update


def densify(data: bytes, structure: Structure) -> Vector:
    """Return the difference that an update means: float32, shape (parameters,), zero where not sent.

    Raises:
        LiberataiError: whatever `codec.decode` refuses.
    """
    positions, values = codec.decode(data, structure.parameters)
    dense = np.zeros(structure.parameters, np.float32)
    dense[positions] = values
    return dense


def largest(values: Vector, count: int) -> codec.Integers:
    """Return the sorted positions of the `count` largest magnitudes; ties: lowest index; never zeros."""
    if count >= values.size:
        return np.flatnonzero(values)
    magnitudes = np.abs(values)
    magnitudes.partition(values.size - count)
    threshold = magnitudes[values.size - count]
    del magnitudes
    if threshold == 0:
        return np.flatnonzero(values)
    above = np.abs(values) > threshold
    ties = np.flatnonzero(np.abs(values) == threshold)
    above[ties[: count - int(np.count_nonzero(above))]] = True
    return np.flatnonzero(above)


def state_to_bytes(state: State) -> bytes:
    """Return the state for the disk: header and zlib over the bytes of equal weight side by side."""
    exponent = 0
    if state.storage == "float16":
        exponent = _exponent(state.residual)
        values: NDArray[np.generic] = np.ldexp(state.residual, _HALF_TOP - exponent).astype("<f2")
    else:
        values = state.residual.astype("<f4")
    size = values.dtype.itemsize
    planes = values.view(np.uint8).reshape(-1, size).T.tobytes()
    head = _MAGIC + bytes([size]) + exponent.to_bytes(2, "little", signed=True)
    return head + state.rounds.to_bytes(4, "little") + zlib.compress(planes, 1)


def state_from_bytes(data: bytes, parameters: int) -> State:
    """Return the state that `state_to_bytes` wrote, bit for bit; never inflates beyond the parameters.

    Raises:
        CodecError: no such file, damaged, or of another number of parameters.
        NonFiniteError: a residual is NaN or infinite.
    """
    if data[: len(_MAGIC)] != _MAGIC or len(data) < _HEAD or data[4] not in (2, 4):
        raise CodecError("residual: not a state file of this version")
    size, exponent = data[4], int.from_bytes(data[5:7], "little", signed=True)
    inflater = zlib.decompressobj()
    try:
        planes = inflater.decompress(data[_HEAD:], size * parameters + 1)
    except zlib.error as fault:
        raise CodecError(f"residual: damaged ({fault})") from fault
    if len(planes) != size * parameters or not inflater.eof or inflater.unused_data:
        raise CodecError(f"residual: not {parameters} values")
    values = np.ascontiguousarray(np.frombuffer(planes, np.uint8).reshape(size, parameters).T)
    if size == 4:
        residual = values.view("<f4").ravel().astype(np.float32)
    else:
        with np.errstate(over="ignore"):
            residual = np.ldexp(values.view("<f2").ravel().astype(np.float32), exponent - _HALF_TOP)
    if not np.isfinite(residual).all():
        raise NonFiniteError("residual: a value is not finite")
    return State(residual, int.from_bytes(data[7:11], "little"), "float32" if size == 4 else "float16")


def _exponent(values: Vector) -> int:
    """Return the smallest e with every magnitude below 2^e."""
    return int(np.frexp(np.abs(values).max())[1])


def _round_half(values: Vector) -> Vector:
    """Round to what float16 storage keeps; doing it again changes nothing."""
    while True:
        exponent = _exponent(values)
        halves = np.ldexp(values, _HALF_TOP - exponent).astype(np.float16)
        values = np.ldexp(halves.astype(np.float32), exponent - _HALF_TOP)
        # The largest value may have been rounded up to the next power of two.
        if _exponent(values) == exponent:
            return values


def _quantise(
    total: Vector, positions: codec.Integers, structure: Structure, number: int, *, power_of_two: bool
) -> codec.Sparse:
    """Return the levels of the chosen positions, one scale per tensor or run of sparse tensors."""
    ends = np.array([place.stop for _, place in structure.slices()])
    if positions.size == 0:
        return codec.Sparse(positions, np.empty(0, np.int16), positions, np.empty(0, np.float32))
    values = total[positions]
    magnitudes = np.abs(values)
    borders = _groups(magnitudes, np.searchsorted(positions, ends).tolist())
    levels = np.zeros(positions.size, np.int16)
    counts, scales = [], []
    for start, stop in zip([0, *borders[:-1]], borders, strict=True):
        scale = _scale(magnitudes[start:stop], number)
        if power_of_two:
            scale = _nearest_power(scale)
        if scale == 0:
            continue
        steps = np.minimum(np.rint(magnitudes[start:stop] / scale), np.float32(number)).astype(np.int16)
        levels[start:stop] = np.where(values[start:stop] < 0, -steps, steps)
        sent = int(np.count_nonzero(steps))
        if sent:
            counts.append(sent)
            scales.append(scale)
    kept = levels != 0
    return codec.Sparse(
        positions[kept], levels[kept], np.array(counts, np.int64), np.array(scales, np.float32)
    )


def _groups(magnitudes: Vector, ends: list[int]) -> list[int]:
    """Return group ends: tensors, but small ones join the group before if their magnitudes are alike."""
    borders: list[int] = []
    start, count, mean = 0, 0, 0.0
    for end in ends:
        if end == start:
            continue
        own = float(magnitudes[start:end].mean(dtype=np.float64))
        joined = borders and min(count, end - start) < _GROUP and mean / 2 <= own <= 2 * mean
        if joined:
            borders[-1] = end
            mean = (mean * count + own * (end - start)) / (count + end - start)
            count += end - start
        else:
            borders.append(end)
            count, mean = end - start, own
        start = end
    return borders


def _nearest_power(scale: np.float32) -> np.float32:
    """Return the power of two nearest to a scale, in steps of its logarithm; 0 stays 0."""
    mantissa, exponent = np.frexp(scale)
    return np.float32(np.ldexp(np.sign(mantissa), int(exponent) - (mantissa < math.sqrt(0.5))))


def _scale(magnitudes: Vector, number: int) -> np.float32:
    """Return the scale with the least squared error among a few, refined by least squares."""
    top = float(magnitudes.max())
    sample = magnitudes[:: max(1, magnitudes.size // _SAMPLE)].astype(np.float64)
    guesses = [float(sample.mean())] if number == 1 else []
    guesses += [top / number * 2.0 ** (-step / 2) for step in range(2 if number == 1 else 14)]
    best, least = 0.0, np.inf
    for guess in guesses:
        scale = max(guess, top * _FLOOR)
        for _ in range(2):
            steps = np.clip(np.rint(sample / scale), 0, number)
            power = float(steps @ steps)
            if power == 0:
                break
            scale = max(float(steps @ sample) / power, top * _FLOOR)
        error = sample - scale * np.clip(np.rint(sample / scale), 0, number)
        if (loss := float(error @ error)) < least:
            best, least = scale, loss
    # The largest product must not overflow when the scale is rounded up.
    return codec.round_scale(min(best, _LARGEST / number))
