"""Teachers for the compressor's benchmark: nets by their usual names, samples, training with a cache.

A net at width 1 is the one of its paper as far as small images go (`learning.families`). The options that
these functions read are those of `benchmarks.compressor`.
"""

import argparse
import hashlib
import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from liberatai_core.errors import DataError
from liberatai_core.learning.augmentation import augment, shift_images
from liberatai_core.learning.dataset import contract_of, load_npz
from liberatai_core.learning.families import initial_weights, structure_of
from liberatai_core.learning.training import TrainSettings, train
from liberatai_core.structure import DataContract, Parameter, Structure
from liberatai_core.weights import Vector

Floats = NDArray[np.float32]
Labels = NDArray[np.int64]

RECIPE_VERSION = 4
"""Raise it when teachers are trained otherwise: what lies in the cache is then trained anew."""
WARM_UP = 0.15
"""Share of the training in which the rate rises: a VGG diverges at its best rate without."""
PARTS = 4
"""Changes of the rate in an epoch."""
HELD_OUT = 0.2
"""Share of a file without test samples that becomes them."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a teacher is trained: SGD with momentum 0.9, the rate rises, then falls along a cosine.

    `start` multiplies the convolutions before the first step. Behind a normalisation that changes no output,
    only how far a step goes: small ones are learned anew, large ones stay what was drawn at random.
    """

    epochs: int
    quick_epochs: int
    weight_decay: float = 5e-4
    learning_rate: float = 0.05
    batch_size: int = 64
    augment: float = 1.0
    start: float = 1.0


@dataclass(frozen=True, slots=True)
class Net:
    """A net by its usual name: family, parameters at width 1, recipe, which parameter is the width."""

    family: str
    params: dict[str, Parameter]
    recipe: Recipe
    size: str = "width"


NETS = {
    "vgg16": Net(
        "vgg",
        {"depth": 16, "width": 64},
        Recipe(40, 12, learning_rate=0.1, batch_size=128, start=0.25, augment=0.35),
    ),
    "vgg11": Net(
        "vgg",
        {"depth": 11, "width": 64},
        Recipe(40, 12, learning_rate=0.1, batch_size=128, start=0.25, augment=0.35),
    ),
    "resnet20": Net("resnet", {"depth": 20, "width": 16}, Recipe(40, 8)),
    "resnet18": Net("resnet", {"depth": 18, "width": 64}, Recipe(30, 6)),
    "resnet50": Net("resnet", {"depth": 50, "width": 64}, Recipe(30, 6)),
    "ds_cnn": Net("ds_cnn", {"width": 64, "layers": 2}, Recipe(80, 25, 1e-4)),
    "mobilenet": Net("mobilenet", {"width": 100}, Recipe(40, 8, 1e-4)),
    "cnn": Net("cnn", {"width": 32}, Recipe(60, 25, 1e-4, batch_size=32)),
    "cnn1d": Net("cnn1d", {"width": 32}, Recipe(40, 15, 1e-4, batch_size=32)),
    "mlp": Net(
        "mlp", {"hidden": 256, "layers": 2}, Recipe(60, 25, 1e-4, batch_size=32, augment=0.5), "hidden"
    ),
}
QUICK_WIDTH = {"vgg16": 0.25}
"""Widths of --quick where none is given."""
QUICK_SAMPLES, QUICK_TEST = 12_000, 2_500


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class World:
    """What there is: the contract, labelled samples for the teacher, unlabeled inputs, test samples."""

    name: str
    data: DataContract
    train: tuple[Floats, Labels]
    test: tuple[Floats, Labels]
    unlabeled: Floats | None


def world(options: argparse.Namespace) -> World:
    """Return the samples of this run, inputs brought to mean 0 and deviation 1 per channel.

    Raises:
        DataError: a file is missing, has no labels, or does not fit.
    """
    random = np.random.default_rng(options.seed)
    if options.data == "digits":
        x, y, marks = _digits()
    else:
        x, y, marks = _file(Path(options.data))
    if options.test is not None:
        test_x, test_y, _ = _file(Path(options.test))
        if test_x.shape[1:] != x.shape[1:]:
            raise DataError(f"{options.test}: samples {test_x.shape[1:]}, those of --data {x.shape[1:]}")
    else:
        if marks is None:
            marks = np.zeros(len(x), np.bool_)
            marks[random.permutation(len(x))[: int(HELD_OUT * len(x))]] = True
        test_x, test_y, x, y = x[marks], y[marks], x[~marks], y[~marks]
    rows = np.sort(random.permutation(len(x))[: options.samples])
    asked = np.sort(random.permutation(len(test_x))[: options.test_samples])
    x, y, test_x, test_y = x[rows], y[rows], test_x[asked], test_y[asked]
    if len(x) == 0 or len(test_x) == 0:
        raise DataError(f"{options.data}: no samples left to train on or to test with")
    data = DataContract(input_shape=x.shape[1:], classes=int(max(y.max(), test_y.max())) + 1)
    axes = (0, *range(2, x.ndim))
    mean, deviation = x.mean(axes, keepdims=True), np.maximum(x.std(axes, keepdims=True), 1e-6)
    x, test_x = _ready((x - mean) / deviation), _ready((test_x - mean) / deviation)
    name = "digits" if options.data == "digits" else Path(options.data).stem
    return World(
        name=name,
        data=data,
        train=(x, y),
        test=(test_x, test_y),
        unlabeled=_unlabeled(options, x, data, random),
    )


def _digits() -> tuple[Floats, Labels, None]:
    from sklearn.datasets import load_digits  # noqa: PLC0415 - only where it is asked for

    pixels, labels = load_digits(return_X_y=True)
    return (pixels / 16).astype(np.float32).reshape(-1, 1, 8, 8), labels.astype(np.int64), None


def _file(path: Path) -> tuple[Floats, Labels, NDArray[np.bool_] | None]:
    samples = load_npz(path)
    contract_of(samples)
    assert samples.y is not None  # `contract_of` refuses files without labels
    return _channels_first(samples.x), samples.y, samples.test


def _channels_first(x: Floats) -> Floats:
    """Give pictures without colours a channel axis; put the few channels of a signal first."""
    if x.ndim == 3:
        if min(x.shape[1:]) >= 16:
            return x[:, None]
        if x.shape[1] > x.shape[2]:
            return np.ascontiguousarray(x.transpose(0, 2, 1))
    return x


def _unlabeled(
    options: argparse.Namespace, x: Floats, data: DataContract, random: np.random.Generator
) -> Floats | None:
    if options.unlabeled == "none":
        return None
    if options.unlabeled == "same":
        return x
    path = Path(options.unlabeled.removeprefix("other:"))
    other = _channels_first(load_npz(path).x)
    other = other[np.sort(random.permutation(len(other))[: len(x)])]
    return adapted(other, data, str(path))


def adapted(x: Floats, data: DataContract, where: str) -> Floats:
    """Return foreign inputs in the shape of the data, every channel with mean 0 and deviation 1.

    Raises:
        DataError: they have another number of axes than the data.
    """
    shape = data.input_shape
    if x.ndim != len(shape) + 1:
        raise DataError(f"{where}: inputs have {x.ndim - 1} axes, the data has {len(shape)}")
    if x.shape[1] != shape[0] and x.ndim > 2:
        x = np.repeat(x.mean(axis=1, keepdims=True), shape[0], axis=1)
    for axis in range(2 if x.ndim > 2 else 1, x.ndim):
        x = _resized(x, axis, shape[axis - 1])
    axes = (0, *range(2, x.ndim))
    return _ready((x - x.mean(axes, keepdims=True)) / np.maximum(x.std(axes, keepdims=True), 1e-6))


def _resized(x: Floats, axis: int, size: int) -> Floats:
    """Return `x` with this many values along an axis, linear between the centres of the old ones."""
    old = x.shape[axis]
    if old == size:
        return x
    place = np.clip((np.arange(size) + 0.5) * old / size - 0.5, 0, old - 1)
    low = np.floor(place).astype(np.int64)
    share = (place - low).astype(np.float32).reshape([-1 if a == axis else 1 for a in range(x.ndim)])
    return np.asarray(
        x.take(low, axis) * (1 - share) + x.take(np.minimum(low + 1, old - 1), axis) * share, np.float32
    )


def _ready(x: NDArray[Any]) -> Floats:
    return np.ascontiguousarray(x, dtype=np.float32)


# --- the teacher ---------------------------------------------------------------------------------


def structure(options: argparse.Namespace, data: DataContract) -> Structure:
    """Return the structure of a net at a width for this data."""
    net = NETS[options.net]
    params = dict(net.params)
    params[net.size] = max(1, round(int(params[net.size]) * options.width))
    if options.norm != "group":
        params["norm"] = options.norm
    return structure_of(net.family, params, data)


def teacher(options: argparse.Namespace, given: World, made: Structure, say: Callable[[str], None]) -> Vector:
    """Return the original's weights: from the cache if the same training has been done before."""
    recipe = NETS[options.net].recipe
    epochs = options.epochs or (recipe.quick_epochs if options.quick else recipe.epochs)
    flip = len(given.data.input_shape) == 3 and given.data.input_shape[0] == 3
    settings = {"recipe": asdict(recipe), "epochs": epochs, "flip": flip, "version": RECIPE_VERSION}
    settings |= {"structure": made.id, "seed": options.seed, "samples": _digest(*given.train)}
    if options.device != "cpu":
        settings["device"] = options.device
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:20]
    path = options.cache / "teachers" / f"{made.id}-{key}.npz"
    if path.is_file():
        with np.load(path, allow_pickle=False) as archive:
            kept = archive["weights"]
        if kept.shape == (made.parameters,) and kept.dtype == np.float32:
            say(f"teacher {made.id}: from the cache")
            return np.asarray(kept, np.float32)
    first = initial_weights(made, given.data, options.seed)
    random = np.random.default_rng(options.seed)
    x, y = given.train
    weights = np.concatenate(
        [
            first[place] * np.float32(recipe.start if len(tensor.shape) == 4 else 1.0)
            for tensor, place in made.slices()
        ]
    ).astype(np.float32)
    done = 0
    for epoch in range(epochs):
        seen = _moved(_flipped(x, random) if flip else x, recipe.augment, options.seed * 10_000 + epoch)
        losses, seconds = [], 0.0
        for rows in np.array_split(random.permutation(len(x)), PARTS):
            own = TrainSettings(
                epochs=1,
                batch_size=recipe.batch_size,
                learning_rate=recipe.learning_rate * _rate(done / (PARTS * epochs)),
                weight_decay=recipe.weight_decay,
                balance=0.0,
                augment=0.0,
            )
            result = train(made, given.data, weights, seen[rows], y[rows], own, options.seed * 10_000 + done)
            weights, done = result.weights, done + 1
            losses.append(result.loss)
            seconds += result.seconds
        say(f"teacher epoch {epoch + 1}/{epochs}: loss {np.mean(losses):.3f}, {seconds:.0f} s")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    with part.open("wb") as out:
        np.savez(out, weights=weights)
    part.replace(path)
    return weights


def _rate(share: float) -> float:
    """Return the share of the highest rate: a short rise, then a cosine."""
    if share < WARM_UP:
        return (share + 0.02) / (WARM_UP + 0.02)
    return 0.5 * (1 + math.cos(math.pi * (share - WARM_UP) / (1 - WARM_UP)))


def _flipped(x: Floats, random: np.random.Generator) -> Floats:
    """Return the pictures, each mirrored with probability one half."""
    mirrored = random.random(len(x)) < 0.5
    out = x.copy()
    out[mirrored] = out[mirrored][..., ::-1]
    return out


def _moved(x: Floats, strength: float, seed: int) -> Floats:
    """Return the samples changed a little: images moved by whole pixels, others as devices do."""
    generator = torch.Generator().manual_seed(seed)
    change = shift_images if x.ndim == 4 else augment
    return np.asarray(change(torch.from_numpy(x), strength, generator).numpy(), np.float32)


def _digest(x: Floats, y: Labels) -> str:
    return hashlib.sha256(x.tobytes() + y.tobytes()).hexdigest()
