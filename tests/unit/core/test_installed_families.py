"""Whatever an installed family does, it works or is refused with a StructureError that says where."""

import sys
from importlib.metadata import EntryPoint
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from liberatai_core.errors import StructureError
from liberatai_core.learning import families
from liberatai_core.learning.families import cost, initial_weights, structure_of
from liberatai_core.learning.training import TrainSettings, log_probabilities, train
from liberatai_core.structure import DataContract

DATA = DataContract(input_shape=(6, 4), classes=3)


def point(monkeypatch: pytest.MonkeyPatch, load: Any, name: str = "mine") -> None:
    monkeypatch.setattr(EntryPoint, "load", lambda _: load())
    monkeypatch.setattr(
        "importlib.metadata.entry_points", lambda group: [EntryPoint(name, "their_package:build", group)]
    )


class Recurrent(nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.rnn = kind(4, 5, batch_first=True, bidirectional=True)
        self.head = nn.Linear(10, 3)

    def forward(self, x: Any) -> Any:
        return self.head(self.rnn(x)[0][:, -1])


class Constants(nn.Module):
    """Keeps values in a non-persistent buffer, in a plain attribute, and computes with them when it is built."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("window", torch.hann_window(6), persistent=False)
        self.scale = torch.linspace(0.5, 1.0, 4)
        self.gain = float(torch.ones(3).sum().item())
        self.head = nn.Linear(24, 3)

    def forward(self, x: Any) -> Any:
        return self.head((x * self.get_buffer("window")[:, None] * self.scale * self.gain).flatten(1))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Any) -> Any:
        return self.head(self.attention(x, x, x)[0].mean(1))


AT_IMPORT = torch.linspace(0, 1, 24)


class FromOutside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(24, 3)

    def forward(self, x: Any) -> Any:
        return self.head(x.flatten(1) + AT_IMPORT)


def noisy(params: Any, data: Any) -> nn.Module:
    sys.stdout.write("a banner")
    return nn.Sequential(nn.Flatten(), nn.Linear(24, 3))


@pytest.mark.parametrize(
    "build",
    [
        lambda *_: Recurrent(nn.LSTM),
        lambda *_: Recurrent(nn.GRU),
        lambda *_: Constants(),
        lambda *_: Attention(),
        lambda *_: FromOutside(),
        noisy,
    ],
    ids=["lstm", "gru", "constants", "attention", "outside", "noisy"],
)
def test_it_works(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], build: Any) -> None:
    point(monkeypatch, lambda: build)
    structure = structure_of("mine", {}, DATA)
    price = cost(structure, DATA)
    assert price.macs_per_sample > 0
    assert price.activation_bytes_per_sample > 4 * 24
    x, y = np.random.default_rng(0).normal(size=(30, 6, 4)).astype(np.float32), np.arange(30) % 3
    weights = initial_weights(structure, DATA, 1)
    trained = train(structure, DATA, weights, x, y, TrainSettings(epochs=2), 1).weights
    assert not np.array_equal(trained, weights)
    assert log_probabilities(structure, DATA, trained, x).shape == (30, 3)
    assert capsys.readouterr().out == ""


def test_a_recurrent_layer_counts_its_weights_once_per_step(monkeypatch: pytest.MonkeyPatch) -> None:
    point(monkeypatch, lambda: lambda *_: Recurrent(nn.GRU))
    weights = 2 * 3 * 5 * (4 + 5)
    assert cost(structure_of("mine", {}, DATA), DATA).macs_per_sample == 6 * weights + 30


def raising(error: BaseException) -> Any:
    def do(*_: Any) -> Any:
        raise error

    return do


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(24, 3), nn.Linear(24, 3)
        self.b.weight = self.a.weight


class Late(nn.Module):
    """Goes wrong in a layer of its own."""

    def __init__(self, does: Any) -> None:
        super().__init__()
        self.flat, self.strange = nn.Flatten(), Strange(does)
        self.head = nn.Linear(24, 3)

    def forward(self, x: torch.Tensor) -> Any:
        return self.strange(self.head(self.flat(x)))


class Strange(nn.Module):
    def __init__(self, does: Any) -> None:
        super().__init__()
        self.does = does

    def forward(self, x: torch.Tensor) -> Any:
        return self.does(x)


BAD: dict[str, tuple[Any, str]] = {
    "raises": (raising(RuntimeError("no such\nluck")), "cannot be built with {}: RuntimeError: no such luck"),
    "exits": (raising(SystemExit(3)), "SystemExit: 3"),
    "wants a parameter": (lambda params, _: nn.Linear(params["width"], 3), "KeyError: 'width'"),
    "takes nothing": (lambda: None, "TypeError"),
    "no module": (lambda *_: "a string", "returned str, wanted a torch.nn.Module"),
    "nothing": (lambda *_: None, "returned NoneType"),
    "no parameters": (lambda *_: nn.Flatten(), "has no parameters"),
    "batch norm": (
        lambda *_: nn.Sequential(nn.Flatten(), nn.BatchNorm1d(24)),
        "1.running_mean is no parameter",
    ),
    "tied": (lambda *_: Tied(), "b.weight and a.weight are one tensor"),
    "lazy": (lambda *_: nn.Sequential(nn.Flatten(), nn.LazyLinear(3)), "1.weight has no shape"),
    "half": (lambda *_: nn.Sequential(nn.Flatten(), nn.Linear(24, 3).half()), "1.weight is torch.float16"),
}


@pytest.mark.parametrize("name", sorted(BAD))
def test_it_is_refused_when_it_is_built(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    build, words = BAD[name]
    point(monkeypatch, lambda: build)
    with pytest.raises(StructureError) as caught:
        structure_of("mine", {}, DATA)
    assert words in str(caught.value)
    assert str(caught.value).startswith("mine")
    assert "\n" not in str(caught.value)


LATE: dict[str, tuple[Any, str]] = {
    "raises": (raising(ValueError("odd")), "ValueError: odd (at layer strange)"),
    "exits": (raising(SystemExit(0)), "SystemExit: 0 (at layer strange)"),
    "a tuple": (lambda x: (x, x), "returned tuple, wanted logits (2, 3)"),
    "another shape": (lambda x: x[:, :2], "returned (2, 2), wanted logits (2, 3)"),
    "no gradient": (lambda x: x.detach(), "does not require grad"),
    "whole numbers": (lambda x: x.long(), "wanted logits"),
}


@pytest.mark.parametrize("name", sorted(LATE))
def test_it_is_refused_when_it_is_tried_with_the_layers_name(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    does, words = LATE[name]
    point(monkeypatch, lambda: lambda *_: Late(does))
    structure = structure_of("mine", {}, DATA)
    with pytest.raises(StructureError) as caught:
        cost(structure, DATA)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "load",
    [
        raising(ImportError("no module named x")),
        raising(SystemExit(1)),
        raising(ValueError("x")),
        lambda: "text",
    ],
    ids=["import", "exit", "value", "no function"],
)
def test_what_cannot_be_imported_is_refused(monkeypatch: pytest.MonkeyPatch, load: Any) -> None:
    point(monkeypatch, load)
    with pytest.raises(StructureError, match="their_package"):
        structure_of("mine", {}, DATA)


def test_names_that_no_message_takes_are_not_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    point(monkeypatch, lambda: noisy, "My Family!")
    assert "My Family!" not in families.known_families()
    monkeypatch.setattr("importlib.metadata.entry_points", raising(ValueError("damaged metadata")))
    assert "mlp" in families.known_families()
    assert "torch" in sys.modules
