"""The original method: k-means per layer, and retraining of what stayed float. A baseline by name.

Thonglek, Takahashi, Ichikawa, Nakasan, Nakada, Takano, Leelaprute and Iida, "Retraining Quantized Neural
Network Models with Unlabeled Data", IJCNN 2020, doi 10.1109/IJCNN48605.2020.9207190. What the paper fixes:

- the weights of a chosen layer become the nearest of k centroids, k from 8 to 256 (`books`);
- the bias vector of every layer becomes one centroid, that is one number;
- layers and k are chosen from a table made by quantising one layer at a time (`scan`);
- quantised layers are then frozen, float layers learn the original's outputs (`learning.baselines`);
- a lossless coder follows.

What it leaves open, and what stands here: clustering is Lloyd's algorithm from centroids that lie evenly
between the smallest and the largest weight (Han, Mao and Dally, "Deep Compression", ICLR 2016,
arXiv:1510.00149) until nothing moves; the choice by hand is the rule `choose`; the coder is the entropy coder
of this package's own model files, with centroids as float16. Scales, shifts and statistics of normalisation
layers are no biases of the paper's kind: they stay float.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from liberatai_core.compressor import artifact
from liberatai_core.compressor.artifact import Coding
from liberatai_core.errors import StructureError
from liberatai_core.structure import Structure, require_length
from liberatai_core.weights import Vector, require_finite

KS = (8, 16, 32, 64, 128, 256)
"""The paper's numbers of centroids for VGG-16; for ResNet-50 it leaves out 8."""
MAX_K = 256
"""What one byte tells apart, and what the paper tried at most."""
SWEEPS = 100
"""Most sweeps of Lloyd's algorithm; from some thirty on centroids move by less than they are stored with."""
TABLE_BYTES = 2
"""Of a centroid in the file (float16)."""

Reals = NDArray[np.float64]
Config = Mapping[str, int]
"""Name of a layer's weights -> number of centroids; layers without an entry stay float."""
Books = Mapping[tuple[str, int], Coding]
"""(name of a layer's weights, number of centroids) -> its quantised form."""
OnProgress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What quantising one layer alone does: one line of the sensitivity table.

    Attributes:
        layer: name of its weights.
        k: centroids.
        saved_bytes: float32 bytes less the entropy of the indices and the centroids.
        lost: quality before less quality after, in the units of the caller's measure.
    """

    layer: str
    k: int
    saved_bytes: int
    lost: float


def layers(structure: Structure) -> tuple[str, ...]:
    """Return the names of all weights that can be quantised: those of convolutions and dense layers."""
    return tuple(tensor.name for tensor in structure.tensors if len(tensor.shape) >= 2)


def biases(structure: Structure) -> tuple[str, ...]:
    """Return the names of the bias vectors of convolutions and dense layers, not those of normalisation."""
    owners = set(layers(structure))
    return tuple(
        tensor.name
        for tensor in structure.tensors
        if tensor.name.endswith("bias") and f"{tensor.name.removesuffix('bias')}weight" in owners
    )


def kmeans(ordered: Reals, k: int, sweeps: int = SWEEPS) -> Reals:
    """Return the centroids of one-dimensional k-means that are not empty, ascending, shape (k or fewer,).

    Lloyd's algorithm from even places between the smallest and the largest value. On sorted values with
    running sums a sweep costs k binary searches, however many values there are.

    Args:
        ordered: values, ascending, at least one.
        k: centroids, 1 … 256.
        sweeps: most sweeps; fewer if no value changes its centroid.
    """
    if not 1 <= k <= MAX_K:
        raise ValueError(f"{k} centroids: wanted 1 to {MAX_K}")
    sums = np.concatenate([[0.0], np.cumsum(ordered)])
    centroids = np.linspace(ordered[0], ordered[-1], k) if k > 1 else ordered.mean(keepdims=True)
    places = _places(ordered, centroids)
    for _ in range(sweeps):
        counts = np.diff(places)
        # An empty cell keeps its centroid: neighbours that move may fill it again.
        centroids = np.where(counts > 0, np.diff(sums[places]) / np.maximum(counts, 1), centroids)
        before, places = places, _places(ordered, centroids)
        if np.array_equal(before, places):
            break
    return centroids[np.diff(places) > 0]


def books(
    structure: Structure,
    weights: Vector,
    ks: Iterable[int] = KS,
    *,
    sweeps: int = SWEEPS,
    on_progress: OnProgress | None = None,
) -> dict[tuple[str, int], Coding]:
    """Return every layer quantised with every k: what tables, choices and files are made from.

    Args:
        structure: the named tensors.
        weights: float32, shape (parameters,).
        ks: numbers of centroids, 1 … 256 each.
        sweeps: see `kmeans`.
        on_progress: called with (done, planned) after every layer.

    Raises:
        StructureError: the weights do not belong to the structure.
        NonFiniteError: a weight is NaN or infinite.
    """
    require_length(weights, structure)
    require_finite(weights, "weights")
    wanted, asked = set(layers(structure)), tuple(ks)
    found: dict[tuple[str, int], Coding] = {}
    done = 0
    for tensor, place in structure.slices():
        if tensor.name not in wanted:
            continue
        ordered = np.sort(weights[place]).astype(np.float64)
        for k in asked:
            found[tensor.name, k] = book(weights[place], kmeans(ordered, k, sweeps))
        done += 1
        if on_progress is not None:
            on_progress(done, len(wanted))
    return found


def book(weights: Vector, centroids: Reals) -> Coding:
    """Return the coding that replaces every weight by the nearest of these ascending centroids."""
    scale = np.float32(np.abs(centroids).max())
    if centroids.size == 1 or scale == 0:
        return Coding(artifact.CONSTANT, np.float32(centroids[0]))
    entries = (centroids / float(scale)).astype(np.float16)
    indices = np.searchsorted(_middles(centroids), weights.astype(np.float64), side="right").astype(np.uint8)
    return Coding(artifact.CODEBOOK, scale, entries=entries, indices=indices)


def quantise(structure: Structure, weights: Vector, ready: Books, config: Config) -> list[Coding]:
    """Return the codings of a configuration: chosen layers, one centroid per bias vector, the rest float32.

    Args:
        structure: the named tensors.
        weights: the original ones, shape (parameters,).
        ready: from `books`, of the same weights.
        config: what is quantised.

    Raises:
        StructureError: the weights are not of the structure, or a chosen layer is not one of its layers.
        KeyError: `ready` does not have that number of centroids.
    """
    require_length(weights, structure)
    if unknown := set(config) - set(layers(structure)):
        raise StructureError(f"{structure.id}: {min(unknown)} is no convolution or dense layer")
    single = set(biases(structure))
    codings = []
    for tensor, place in structure.slices():
        if tensor.name in config:
            codings.append(ready[tensor.name, config[tensor.name]])
        elif tensor.name in single:
            mean = np.float32(weights[place].mean(dtype=np.float64))
            codings.append(Coding(artifact.CONSTANT, mean))
        else:
            codings.append(Coding(artifact.FULL, values=weights[place].copy()))
    return codings


def decoded(structure: Structure, codings: Sequence[Coding]) -> Vector:
    """Return the weights that these codings, one per tensor, decode to, shape (parameters,)."""
    sizes = [tensor.size for tensor in structure.tensors]
    return np.concatenate([coding.weights(size) for coding, size in zip(codings, sizes, strict=True)])


def free(structure: Structure, codings: Sequence[Coding]) -> Vector:
    """Return 1 for every weight that is still float, 0 for the frozen ones: float32, shape (parameters,)."""
    gain = np.zeros(structure.parameters, np.float32)
    for coding, (_, place) in zip(codings, structure.slices(), strict=True):
        gain[place] = coding.kind == artifact.FULL
    return gain


def refreshed(structure: Structure, codings: Sequence[Coding], weights: Vector) -> list[Coding]:
    """Return the codings with the retrained values of float tensors; quantised ones are as they were."""
    require_length(weights, structure)
    return [
        replace(coding, values=weights[place].copy()) if coding.kind == artifact.FULL else coding
        for coding, (_, place) in zip(codings, structure.slices(), strict=True)
    ]


def packed_bytes(structure: Structure, codings: Sequence[Coding]) -> int:
    """Return the size without entropy coding: indices of equal width, float32 values, a byte per tensor.

    Centroids count as float32, as the paper would store them; a grid has one step.
    """
    total = 0
    for coding, tensor in zip(codings, structure.tensors, strict=True):
        symbols, table = 1, 1
        if coding.kind == artifact.FULL:
            table = tensor.size
        elif coding.entries is not None:
            symbols = table = coding.entries.size
        elif coding.kind == artifact.GRID:
            symbols = coding.levels
        total += 1 + 4 * table + math.ceil(tensor.size * math.ceil(math.log2(symbols)) / 8)
    return total


def saved_bytes(coding: Coding, size: int) -> int:
    """Return float32 bytes of a tensor less its centroids and the entropy of its indices."""
    if coding.entries is None:
        return 4 * size - 4
    counts = np.bincount(coding.indices, minlength=1)
    share = counts[counts > 0] / size
    bits = -size * float(share @ np.log2(share))
    return 4 * size - TABLE_BYTES * coding.entries.size - math.ceil(bits / 8)


def scan(
    structure: Structure,
    weights: Vector,
    ready: Books,
    evaluate: Callable[[Vector], float],
    *,
    on_progress: OnProgress | None = None,
) -> list[Trial]:
    """Return the sensitivity table: each layer quantised alone, with each k, all others as they were.

    Args:
        structure: the named tensors.
        weights: the original ones, shape (parameters,).
        ready: from `books`, of the same weights.
        evaluate: flat weights -> quality, larger is better: the share of samples on which they agree with
            the original (no labels), or the accuracy (as in the paper).
        on_progress: called with (done, planned).
    """
    require_length(weights, structure)
    whole = evaluate(weights)
    places = {tensor.name: place for tensor, place in structure.slices()}
    table = []
    for (layer, k), coding in ready.items():
        trial = weights.copy()
        place = places[layer]
        size = place.stop - place.start
        trial[place] = coding.weights(size)
        lost = whole - evaluate(trial)
        table.append(Trial(layer=layer, k=k, saved_bytes=saved_bytes(coding, size), lost=lost))
        if on_progress is not None:
            on_progress(len(table), len(ready))
    return table


def choose(table: Sequence[Trial], tolerance: float) -> dict[str, int]:
    """Return the layers that may be quantised, each with the k that saves most.

    The paper chose by hand; this is the rule that its text describes: a layer is quantised if some k loses
    at most `tolerance` when it alone is quantised, with the k of these that saves most.
    """
    best: dict[str, Trial] = {}
    for trial in table:
        if trial.lost <= tolerance and trial.saved_bytes > 0:
            held = best.get(trial.layer)
            if held is None or trial.saved_bytes > held.saved_bytes:
                best[trial.layer] = trial
    return {layer: trial.k for layer, trial in best.items()}


def _middles(centroids: Reals) -> Reals:
    return np.asarray((centroids[1:] + centroids[:-1]) / 2, np.float64)


def _places(ordered: Reals, centroids: Reals) -> NDArray[np.int64]:
    """Return where the cells begin and end among the sorted values, shape (k + 1,)."""
    places = np.empty(centroids.size + 1, np.int64)
    places[0], places[-1] = 0, ordered.size
    places[1:-1] = ordered.searchsorted(_middles(centroids))
    return places
