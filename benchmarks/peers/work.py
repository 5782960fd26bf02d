"""The work that every system does: the same numpy network, samples, split and training. Needs numpy only.

Each system imports this file in its own environment. The network is 784-128-10 with ReLU, 101 770 values;
a device trains it by SGD with momentum 0.9 on its own samples, as many epochs as asked.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
INPUTS, HIDDEN, CLASSES = 784, 128, 10
SHAPES = ((HIDDEN, INPUTS), (HIDDEN,), (CLASSES, HIDDEN), (CLASSES,))
MOMENTUM = 0.9


def first(seed: int) -> list[Floats]:
    """Return the weights that all systems start from."""
    random = np.random.default_rng(seed)
    return [
        (random.normal(0, (2 / shape[1]) ** 0.5, shape) if len(shape) == 2 else np.zeros(shape)).astype("f4")
        for shape in SHAPES
    ]


def logits(weights: Sequence[Floats], x: Floats) -> Floats:
    """Return what the network says, shape (n, classes)."""
    hidden = np.maximum(x @ weights[0].T + weights[1], 0)
    found: Floats = hidden @ weights[2].T + weights[3]
    return found


def accuracy(weights: Sequence[Floats], x: Floats, y: NDArray[np.int64]) -> float:
    """Return the share of samples that the network gets right."""
    return float((logits(weights, x).argmax(axis=1) == y).mean())


def train(
    weights: Sequence[Floats], x: Floats, y: NDArray[np.int64], given: dict[str, Any], seed: int
) -> list[Floats]:
    """Return the weights after training; `given` has epochs, batch_size and learning_rate."""
    now = [one.copy() for one in weights]
    speed = [np.zeros_like(one) for one in now]
    random, truth = np.random.default_rng(seed), np.eye(CLASSES, dtype=np.float32)[y]
    for _ in range(given["epochs"]):
        order = random.permutation(len(y))
        for begin in range(0, len(y), given["batch_size"]):
            rows = order[begin : begin + given["batch_size"]]
            batch = x[rows]
            hidden = np.maximum(batch @ now[0].T + now[1], 0)
            said = hidden @ now[2].T + now[3]
            said = np.exp(said - said.max(axis=1, keepdims=True))
            wrong = (said / said.sum(axis=1, keepdims=True) - truth[rows]) / len(rows)
            back = (wrong @ now[2]) * (hidden > 0)
            steps = (back.T @ batch, back.sum(axis=0), wrong.T @ hidden, wrong.sum(axis=0))
            for place, step in enumerate(steps):
                speed[place] = MOMENTUM * speed[place] + step
                now[place] -= given["learning_rate"] * speed[place]
    return now


class Work:
    """The folder that the benchmark wrote: settings, one file per device, test samples, what was reached."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.given: dict[str, Any] = json.loads((self.folder / "work.json").read_text())

    def samples(self, device: int | None) -> tuple[Floats, NDArray[np.int64]]:
        """Return a device's samples, or the test samples."""
        name = "test" if device is None else f"device-{device}"
        with np.load(self.folder / f"{name}.npz", allow_pickle=False) as file:
            return np.asarray(file["x"], np.float32).reshape(len(file["y"]), -1), file["y"]

    def trained(self, weights: Sequence[Floats], device: int, number: int) -> tuple[list[Floats], int, float]:
        """Train for a round; return weights, samples, and seconds, which are noted as well."""
        x, y = self.samples(device)
        began = time.time()
        self.note("begin", round=number, device=device, began=began)
        found = train(weights, x, y, self.given, self.given["seed"] * 1000 + number * 50 + device)
        time.sleep(self.given.get("slow_s", 0.0))
        self.note("train", round=number, device=device, began=began, ended=time.time())
        return found, len(y), time.time() - began

    def tested(self, weights: Sequence[Floats], number: int) -> float:
        """Note how good the weights of a round are."""
        found = accuracy(weights, *self.samples(None))
        self.note("round", round=number, ended=time.time(), accuracy=found)
        return found

    def note(self, what: str, **values: Any) -> None:
        """Append a line to the notes; short lines of several processes do not mix."""
        with (self.folder / "notes.jsonl").open("a") as file:
            file.write(json.dumps({"what": what, **values}) + "\n")
