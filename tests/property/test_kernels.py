"""Every layer in numpy computes what torch computes, forward and backward; so do whole networks and trainings."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from liberatai_core.learning.augmentation import augment as torch_augment
from liberatai_core.learning.families import FAMILIES, cost, initial_weights, layers, structure_of
from liberatai_core.learning.families.layers import (
    Convolution,
    Dense,
    Flatten,
    MaxPool,
    Mean,
    Network,
    Norm,
    Relu,
    Residual,
    Sequence,
)
from liberatai_core.learning.families.parts import norm_groups
from liberatai_core.learning.kernels.augmentation import affine, augment, matrices, shifted
from liberatai_core.learning.kernels.loss import cross_entropy
from liberatai_core.learning.kernels.network import assembled, network
from liberatai_core.learning.training import TrainSettings, log_probabilities, train
from liberatai_core.profile import MAPS, MAPS_BYTES
from liberatai_core.structure import DataContract, Structure, to_tensors

torch = pytest.importorskip("torch")
from liberatai_core.learning.families.modules import module_of  # noqa: E402

CLOSE: Any = {"rtol": 1e-5, "atol": 1e-5}
seeds = st.integers(0, 2**32 - 1)
few = settings(max_examples=25, deadline=None)


def values(seed: int, *shape: int) -> Any:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def agrees(layer: layers.Layer, x: Any, *, training: bool = True) -> None:
    """Compare output, gradient by the input, gradients by weights, and running statistics."""
    description = Network(Sequence((("only", layer),)))
    tensors = layers.tensors_of(description)
    module = module_of(description).train(training)
    weights = [values(7 + i, *tensor.shape) for i, tensor in enumerate(tensors)]
    for (name, part), value in zip(module.state_dict().items(), weights, strict=True):
        part.copy_(torch.from_numpy(np.abs(value) + 0.5 if name.endswith("running_var") else value))
    state = {name: part.numpy().copy() for name, part in module.state_dict().items()}
    gradients = {name: np.zeros_like(part) for name, part in state.items()}
    ours = assembled(description, state, gradients)

    given_x = torch.from_numpy(x.copy()).requires_grad_()
    wanted = module(given_x)
    last = np.ascontiguousarray(np.moveaxis(x, 0, -1))
    found = ours.forward(last, training=training)
    np.testing.assert_allclose(np.moveaxis(found, -1, 0), wanted.detach().numpy(), **CLOSE)
    for name, part in module.state_dict().items():
        np.testing.assert_allclose(state[name], part.numpy(), err_msg=name, **CLOSE)
    if not training:
        return
    slope = values(3, *wanted.shape)
    wanted.backward(torch.from_numpy(slope))
    assert given_x.grad is not None
    dx = ours.backward(np.ascontiguousarray(np.moveaxis(slope, 0, -1)), wanted=True)
    tight: Any = {"rtol": 1e-4, "atol": 1e-5 * max(1.0, float(np.abs(given_x.grad.numpy()).max()))}
    np.testing.assert_allclose(np.moveaxis(dx, -1, 0), given_x.grad.numpy(), **tight)
    slopes: Any = {name: p.grad.numpy() for name, p in module.named_parameters() if p.grad is not None}
    for name in slopes:
        size = max(1.0, float(np.abs(slopes[name]).max()))
        np.testing.assert_allclose(gradients[name] / size, slopes[name] / size, err_msg=name, **CLOSE)


@few
@given(st.integers(1, 5), st.integers(1, 6), st.integers(1, 3), st.integers(1, 2), st.integers(5, 9), seeds)
def test_convolutions_of_images(into: int, out: int, half: int, stride: int, side: int, seed: int) -> None:
    kernel = 2 * half - 1
    layer = Convolution(into, out, (kernel, kernel), stride, kernel // 2)
    agrees(layer, values(seed, 3, into, side, side + 2))


@few
@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 2), st.integers(1, 12), seeds)
def test_convolutions_of_signals(into: int, out: int, padding: int, length: int, seed: int) -> None:
    agrees(Convolution(into, out, (5,), padding=padding), values(seed, 2, into, length + 5))


@few
@given(st.integers(2, 6), st.integers(1, 2), st.integers(3, 9), st.integers(3, 9), st.integers(1, 4), seeds)
def test_depthwise_convolutions(
    channels: int, stride: int, height: int, width: int, n: int, seed: int
) -> None:
    layer = Convolution(channels, channels, (3, 3), stride, 1, channels)
    agrees(layer, values(seed, n, channels, height, width))


@few
@given(st.integers(1, 9), st.integers(1, 9), st.booleans(), st.integers(1, 5), seeds)
def test_dense_layers(into: int, out: int, bias: bool, n: int, seed: int) -> None:
    agrees(Dense(into, out, bias), values(seed, n, into))


@few
@given(st.sampled_from([1, 4, 6, 8, 16]), st.sampled_from([(), (7,), (3, 4)]), st.integers(1, 5), seeds)
def test_group_normalisation(channels: int, sides: Any, n: int, seed: int) -> None:
    if channels == 1 and not sides:
        return  # one value is normalised to 0, and its gradient is rounding
    agrees(Norm(channels, "group", norm_groups(channels)), values(seed, n, channels, *sides) * 2 + 3)


@few
@given(st.integers(1, 6), st.sampled_from([(), (7,), (3, 4)]), st.integers(3, 6), st.booleans(), seeds)
def test_batch_normalisation(
    channels: int,
    sides: Any,
    n: int,
    training: bool,
    seed: int,
) -> None:
    agrees(Norm(channels, "batch"), values(seed, n, channels, *sides) + 2, training=training)


def test_a_batch_of_one_value_is_normalised_with_the_running_statistics() -> None:
    agrees(Norm(3, "batch"), values(1, 1, 3))


@few
@given(st.sampled_from([(2, 2, 0), (3, 2, 1)]), st.integers(4, 9), st.integers(4, 9), seeds)
def test_largest_of_a_window(pool: Any, height: int, width: int, seed: int) -> None:
    x = np.rint(values(seed, 2, 3, height, width))  # many equal ones: the first gets the gradient
    agrees(MaxPool(*pool), x)


@pytest.mark.parametrize("layer", [Relu(), Relu(6.0), Mean(), Flatten()])
def test_layers_without_weights(layer: Any) -> None:
    agrees(layer, values(2, 3, 4, 5, 2) * 6)


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("straight", [True, False])
def test_residual_blocks(straight: bool, relu: bool) -> None:
    branch = Sequence((("conv", Convolution(4, 4, (3, 3), 1, 1)), ("norm", Norm(4, "group"))))
    shortcut = Sequence() if straight else Sequence((("conv", Convolution(4, 4, (1, 1))),))
    agrees(Residual(branch, shortcut, relu), values(5, 2, 4, 5, 5))


@few
@given(st.integers(2, 12), st.integers(1, 9), st.sampled_from([0.0, 0.1, 0.5]), seeds)
def test_loss(classes: int, n: int, smoothing: float, seed: int) -> None:
    logits = values(seed, n, classes) * 4
    labels = np.random.default_rng(seed).integers(0, classes, n)
    there = torch.from_numpy(logits).requires_grad_()
    wanted = torch.nn.functional.cross_entropy(there, torch.from_numpy(labels), label_smoothing=smoothing)
    wanted.backward()
    loss, gradient = cross_entropy(logits.T.copy(), labels, smoothing)
    assert loss == pytest.approx(wanted.item(), rel=1e-5, abs=1e-6)
    np.testing.assert_allclose(gradient.T, there.grad.numpy(), **CLOSE)


# --- whole networks ----------------------------------------------------------------------------------

NETWORKS = [
    ("mlp", {"hidden": 16, "layers": 2}, (2, 9)),
    ("cnn1d", {"width": 8}, (3, 21)),
    ("cnn", {"width": 8, "layers": 2, "hidden": 12}, (2, 11, 9)),
    ("ds_cnn", {"width": 8, "layers": 2}, (1, 13, 12)),
    ("vgg", {"width": 4, "depth": 11}, (3, 16, 16)),
    ("resnet", {"width": 4}, (3, 16, 16)),
    ("mobilenet", {"width": 20}, (3, 16, 16)),
]


def test_every_built_in_family_is_compared() -> None:
    assert {family for family, *_ in NETWORKS} == set(FAMILIES)


def built(family: str, params: Any, shape: Any, norm: str = "group") -> tuple[Structure, DataContract, Any]:
    data = DataContract(input_shape=shape, classes=5)
    structure = structure_of(family, {**params, "norm": norm}, data)
    weights = initial_weights(structure, data, 3)
    weights += values(9, len(weights)) * 0.02 + (weights == 0) * 0.02
    return structure, data, weights


@pytest.mark.parametrize("norm", ["group", "batch"])
@pytest.mark.parametrize(("family", "params", "shape"), NETWORKS)
def test_both_runtimes_predict_the_same(family: str, params: Any, shape: Any, norm: str) -> None:
    structure, data, weights = built(family, params, shape, norm)
    if norm == "batch":
        for name, part in to_tensors(weights, structure).items():
            if name.endswith("running_var"):
                np.abs(part, out=part)
    x = values(1, 70, *shape)
    wanted, found = (log_probabilities(structure, data, weights, x, runtime=r) for r in ("torch", "numpy"))
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


RECIPES = [
    {},
    {"weight_decay": 0.01, "clip_norm": 0.5, "label_smoothing": 0.1},
    {"optimizer": "adam", "learning_rate": 0.003, "weight_decay": 0.01},
    {"momentum": 0.0, "proximal": 0.3, "balance": 0.0, "clip_norm": 0.0},
]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("norm", ["group", "batch"])
@pytest.mark.parametrize(("family", "params", "shape"), NETWORKS[:4])
def test_both_runtimes_train_the_same(
    family: str, params: Any, shape: Any, norm: str, recipe: dict[str, Any]
) -> None:
    """All samples in one batch: their order is what the two draw differently."""
    structure, data, weights = built(family, params, shape, norm)
    x, y = values(2, 24, *shape), np.random.default_rng(2).integers(0, 5, 24)
    how = TrainSettings(**{"epochs": 4, "batch_size": 64, "learning_rate": 0.01, **recipe})
    gain = np.random.default_rng(4).integers(0, 2, len(weights)).astype(np.float32)
    for chosen in (None, gain):
        wanted, found = (
            train(structure, data, weights, x, y, how, 1, gain=chosen, runtime=r) for r in ("torch", "numpy")
        )
        assert found.loss == pytest.approx(wanted.loss, rel=1e-4)
        moved = float(np.abs(wanted.weights - weights).max())
        assert moved > 1e-3
        # Adam divides by a gradient's size: one that is nothing but rounding moves as far as any other.
        bound = 1e-5 if how.optimizer == "sgd" else 0.2 * moved
        far = np.abs(found.weights - wanted.weights) > bound
        assert far.mean() <= (0 if how.optimizer == "sgd" else 0.01)


def test_a_batch_that_goes_through_in_parts_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    structure, data, weights = built("cnn", {"width": 8}, (1, 9, 9))
    x, y = values(2, 23, 1, 9, 9), np.random.default_rng(2).integers(0, 5, 23)
    how = TrainSettings(epochs=2, batch_size=10, label_smoothing=0.1, mixup=0.3)
    whole = train(structure, data, weights, x, y, how, 1, runtime="numpy")
    monkeypatch.setitem(MAPS_BYTES, "numpy", 4 * MAPS * cost(structure, data).activation_bytes_per_sample)
    parts = train(structure, data, weights, x, y, how, 1, runtime="numpy")
    assert parts.loss == pytest.approx(whole.loss, rel=1e-5)
    np.testing.assert_allclose(parts.weights, whole.weights, rtol=1e-4, atol=1e-5)
    assert parts.weights.tobytes() != whole.weights.tobytes()


def test_equal_seeds_give_equal_bytes_and_a_training_learns() -> None:
    structure, data, weights = built("ds_cnn", {"width": 8}, (1, 8, 8))
    x = values(1, 200, 1, 8, 8)
    y = (x.mean(axis=(1, 2, 3)) > 0).astype(np.int64)
    how = TrainSettings(epochs=12, augment=0.3, mixup=0.2)
    one, two, other = (train(structure, data, weights, x, y, how, s, runtime="numpy") for s in (5, 5, 6))
    assert one.weights.tobytes() == two.weights.tobytes() != other.weights.tobytes()
    predicted = log_probabilities(structure, data, one.weights, x, runtime="numpy").argmax(axis=1)
    assert (predicted == y).mean() > 0.8


def test_an_untouched_copy_is_trained_and_the_data_stay_as_they_are() -> None:
    structure, data, weights = built("cnn1d", {"width": 4}, (2, 20))
    x, y = values(1, 10, 2, 20), np.arange(10) % 5
    before = weights.copy(), x.copy()
    train(structure, data, weights, x, y, TrainSettings(epochs=1, augment=1.0), 1, runtime="numpy")
    model = network(structure, data, weights)
    model.forward(x, training=True)
    assert (weights == before[0]).all()
    assert (x == before[1]).all()


# --- changes of inputs -------------------------------------------------------------------------------


def test_images_are_seen_through_the_same_maps() -> None:
    x, maps = values(1, 6, 2, 7, 9), matrices(6, 2.0, np.random.default_rng(3))
    grid = torch.nn.functional.affine_grid(torch.from_numpy(maps), list(x.shape), align_corners=False)
    wanted = torch.nn.functional.grid_sample(torch.from_numpy(x), grid, align_corners=False)
    np.testing.assert_allclose(affine(x, maps), wanted.numpy(), rtol=1e-4, atol=1e-4)


def test_signals_move_by_whole_positions() -> None:
    x = np.arange(5, dtype=np.float32)[None, None].repeat(2, axis=0)
    assert shifted(x, np.array([2, -1])).tolist() == [[[0, 0, 0, 1, 2]], [[1, 2, 3, 4, 4]]]


@pytest.mark.parametrize("shape", [(6,), (2, 12), (1, 10, 10)])
def test_changes_are_as_large_as_with_torch(shape: Any) -> None:
    x = values(1, 400, *shape)
    generator = torch.Generator().manual_seed(1)
    wanted = float((torch_augment(torch.from_numpy(x), 1.0, generator).numpy() - x).std())
    found = float((augment(x, 1.0, np.random.default_rng(1)) - x).std())
    assert found == pytest.approx(wanted, rel=0.1)
    assert augment(x, 0.0, np.random.default_rng(1)) is x
