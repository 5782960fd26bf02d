"""Families, training, distillation and export: what comes out is a flat vector, the same every time."""

import importlib
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import EntryPoint
from typing import Any

import numpy as np
import pytest

from liberatai_core.errors import (
    ConfigError,
    DataError,
    MissingExtraError,
    NonFiniteError,
    StructureError,
    TrainingError,
)
from liberatai_core.learning import families
from liberatai_core.learning.distillation import DistillSettings, distill, usual_copies, usual_steps
from liberatai_core.learning.families import cost, initial_weights, installed, structure_of
from liberatai_core.learning.training import TrainSettings, log_probabilities, log_shares, train
from liberatai_core.structure import DataContract, Structure, Tensor, to_tensors
from liberatai_core.weights import to_bytes

torch = pytest.importorskip("torch")

# Deep families have tests of their own (test_families.py).
SMALL = {"cnn": {"width": 4}, "ds_cnn": {"width": 8}, "mlp": {"hidden": 12}, "cnn1d": {"width": 4}}
DIGITS = DataContract(input_shape=(1, 8, 8), classes=3)
MLP = structure_of("mlp", {"hidden": 12}, DIGITS)


def blobs(samples: int, seed: int, data: Any = DIGITS) -> Any:
    """Return one noisy prototype per class: easy to learn, impossible to guess."""
    prototypes = np.random.default_rng(99).normal(size=(data.classes, *data.input_shape))
    random = np.random.default_rng(seed)
    y = random.integers(0, data.classes, samples)
    x = prototypes[y] + 0.5 * random.normal(size=(samples, *data.input_shape))
    return x.astype(np.float32), y


def accuracy(structure: Structure, weights: Any, data: Any = DIGITS) -> Any:
    x, y = blobs(300, 12345, data)
    return float(np.mean(log_probabilities(structure, data, weights, x).argmax(axis=1) == y))


# --- families ----------------------------------------------------------------------------------------

CASES = [
    (family, params, shape)
    for family, params in [
        *SMALL.items(),
        ("cnn", {"width": 4, "layers": 2, "hidden": 8}),
        ("ds_cnn", {"width": 8, "layers": 2}),
        ("mlp", {"hidden": 8, "layers": 3}),
    ]
    for shape in [(1, 8, 8), (1, 28, 28), (3, 32, 32), (1, 49, 40), (2, 3, 5), (9, 128), (1, 7), (20,)]
    if len(shape) == {"cnn": 3, "ds_cnn": 3, "cnn1d": 2}.get(family, len(shape))
]


@pytest.mark.parametrize(("family", "params", "shape"), CASES)
def test_every_family_takes_every_shape_of_its_rank(family: str, params: Any, shape: Any) -> None:
    """A batch, and a single sample, give one finite row of log-probabilities each."""
    data = DataContract(input_shape=shape, classes=5)
    structure = structure_of(family, params, data)
    weights = initial_weights(structure, data, 1)
    assert weights.shape == (structure.parameters,)
    out = log_probabilities(structure, data, weights, np.zeros((3, *shape), dtype=np.float32))
    assert np.exp(out).sum(axis=1) == pytest.approx(np.ones(3), rel=1e-5)
    x = np.ones((1, *shape), dtype=np.float32)
    train(structure, data, weights, x, np.array([2]), TrainSettings(epochs=1), 0)


def test_tensors_come_in_the_order_of_named_parameters() -> None:
    structure = structure_of("cnn", {"width": 4}, DIGITS)
    module = families.build("cnn", {"width": 4}, DIGITS)
    wanted = [(name, tuple(p.shape)) for name, p in module.named_parameters()]
    assert [(t.name, t.shape) for t in structure.tensors] == wanted
    assert structure.id == "cnn-width4"


@pytest.mark.parametrize("family", sorted(SMALL))
def test_no_family_has_running_statistics_unless_asked(family: str) -> None:
    shape = (2, 16) if family == "cnn1d" else (1, 8, 8)
    module = families.build(family, SMALL[family], DataContract(input_shape=shape, classes=3))
    assert list(module.buffers()) == []


def test_mlp_has_the_sizes_that_its_parameters_say() -> None:
    """64 * 12 weights, a scale and an offset per unit, 12 * 3 + 3 of the head."""
    assert MLP.parameters == 64 * 12 + 2 * 12 + 12 * 3 + 3


@pytest.mark.parametrize(
    ("family", "params", "text"),
    [
        ("nope", {}, "known: cnn, cnn1d, ds_cnn, mlp"),
        ("cnn", {}, "width must be an integer"),
        ("cnn", {"width": 0}, "width"),
        ("cnn", {"width": 10**9}, "width"),
        ("cnn", {"width": True}, "width"),
        ("cnn", {"width": 4.0}, "width"),
        ("cnn", {"width": 4, "depth": 2}, "unknown parameter 'depth'"),
        ("mlp", {"hidden": 4, "layers": 1000}, "layers"),
        ("cnn1d", {"width": 4}, "2 axes"),
    ],
)
def test_wrong_families_and_parameters_are_refused(family: str, params: Any, text: str) -> None:
    with pytest.raises(StructureError, match=text):
        structure_of(family, params, DIGITS)


def _linear(params: Any, data: Any) -> Any:
    return torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(math.prod(data.input_shape), data.classes, bias=params["bias"])
    )


def _with_statistics(_params: Any, data: Any) -> Any:
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.BatchNorm1d(math.prod(data.input_shape)))


def _entry_points(monkeypatch: pytest.MonkeyPatch, **functions: Any) -> None:
    for name, function in functions.items():
        monkeypatch.setattr(sys.modules[__name__], name, function, raising=False)
    points = [EntryPoint(name, f"{__name__}:{name}", installed.GROUP) for name in functions]
    monkeypatch.setattr(EntryPoint, "load", lambda self: functions[self.name])
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: points)


def test_installed_families_can_be_used_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    _entry_points(monkeypatch, linear=_linear)
    structure = structure_of("linear", {"bias": True}, DIGITS)
    assert structure.parameters == 64 * 3 + 3
    assert "linear" in families.known_families()
    assert accuracy(structure, _trained(structure).weights) > 0.9


def test_an_entry_point_cannot_replace_a_built_in_family(monkeypatch: pytest.MonkeyPatch) -> None:
    _entry_points(monkeypatch, mlp=_linear)
    assert structure_of("mlp", {"hidden": 12}, DIGITS) == MLP


def test_batch_normalisation_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    _entry_points(monkeypatch, stats=_with_statistics)
    with pytest.raises(StructureError, match="running statistics do not federate"):
        structure_of("stats", {}, DIGITS)


def test_initial_weights_follow_the_seed_and_leave_torch_alone() -> None:
    torch.manual_seed(7)
    wanted = torch.rand(3)
    torch.manual_seed(7)
    first = initial_weights(MLP, DIGITS, 1)
    assert torch.equal(torch.rand(3), wanted)
    assert to_bytes(initial_weights(MLP, DIGITS, 1)) == to_bytes(first)
    assert to_bytes(initial_weights(MLP, DIGITS, 2)) != to_bytes(first)


def test_structures_of_another_program_are_refused() -> None:
    """Same family, same parameters, but other tensors: another version built it."""
    other = Structure(
        family="mlp", params={"hidden": 12}, tensors=(Tensor(name="w", shape=(MLP.parameters,)),)
    )
    with pytest.raises(StructureError, match="not those that this family builds"):
        initial_weights(other, DIGITS, 0)
    with pytest.raises(StructureError, match="not those that this family builds"):
        log_probabilities(other, DIGITS, np.zeros(MLP.parameters, dtype=np.float32), blobs(1, 0)[0])


def test_cost_of_a_dense_network_by_hand() -> None:
    """MACs: 64 * 12 + 12 * 3. Values: input 64, flat 64, dense, norm and relu 12 each, head 3."""
    found = cost(MLP, DIGITS)
    assert found.macs_per_sample == 64 * 12 + 12 * 3
    assert found.activation_bytes_per_sample == 4 * (64 + 64 + 3 * 12 + 3)


def test_cost_of_a_convolution_by_hand() -> None:
    """First stage: 8 * 8 places x 4 channels x 9; second: 4 * 4 x 8 x 4 * 9; head: 16 * 8 x 3."""
    found = cost(structure_of("cnn", {"width": 4}, DIGITS), DIGITS)
    assert found.macs_per_sample == 64 * 4 * 9 + 16 * 8 * 36 + 128 * 3


# --- training ----------------------------------------------------------------------------------------


def _trained(structure: Structure = MLP, data: Any = DIGITS, seed: int = 3, **settings: Any) -> Any:
    x, y = blobs(90, 1, data)
    start = initial_weights(structure, data, 0)
    return train(structure, data, start, x, y, TrainSettings(**{"epochs": 8, **settings}), seed)


@pytest.mark.parametrize("family", sorted(SMALL))
def test_training_learns(family: str) -> None:
    data = DataContract(input_shape=(2, 16) if family == "cnn1d" else (1, 8, 8), classes=3)
    structure = structure_of(family, SMALL[family], data)
    before = initial_weights(structure, data, 0)
    result = _trained(structure, data)
    assert result.samples == 90
    assert result.seconds > 0
    assert accuracy(structure, result.weights, data) > max(0.9, accuracy(structure, before, data))


EVERYTHING = {
    "optimizer": "adam",
    "learning_rate": 0.01,
    "augment": 1.0,
    "mixup": 0.5,
    "proximal": 0.1,
    "label_smoothing": 0.1,
    "weight_decay": 1e-4,
}


@pytest.mark.parametrize("settings", [{}, EVERYTHING])
@pytest.mark.parametrize("family", sorted(SMALL))
def test_the_same_arguments_give_the_same_bytes(family: str, settings: Any) -> None:
    """Whatever the number of threads and the global random state were before."""
    data = DataContract(input_shape=(2, 16) if family == "cnn1d" else (1, 8, 8), classes=3)
    structure = structure_of(family, SMALL[family], data)
    first = _trained(structure, data, epochs=2, **settings)
    torch.manual_seed(1)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        second = _trained(structure, data, epochs=2, **settings)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert to_bytes(second.weights) == to_bytes(first.weights)
    assert second.loss == first.loss
    assert to_bytes(_trained(structure, data, seed=4, epochs=2, **settings).weights) != to_bytes(
        first.weights
    )


def test_training_leaves_its_arguments_alone() -> None:
    x, y = blobs(20, 1)
    start = initial_weights(MLP, DIGITS, 0)
    copies = x.copy(), y.copy(), start.copy()
    train(MLP, DIGITS, start, x, y, TrainSettings(augment=1.0), 0)
    for value, copy in zip((x, y, start), copies, strict=True):
        assert np.array_equal(value, copy)


def test_one_step_of_gradient_descent_by_hand() -> None:
    """With zero weights in the head all classes are equally likely: its bias moves by shares minus 1/3."""
    weights = initial_weights(MLP, DIGITS, 0)
    to_tensors(weights, MLP)["head.weight"][:] = 0
    to_tensors(weights, MLP)["head.bias"][:] = 0
    x, y = blobs(4, 0)
    y[:] = [0, 0, 0, 1]
    settings = TrainSettings(
        epochs=1, batch_size=4, learning_rate=1.0, momentum=0.0, balance=0.0, clip_norm=0.0
    )
    result = train(MLP, DIGITS, weights, x, y, settings, 0)
    moved = to_tensors(result.weights, MLP)["head.bias"]
    assert moved == pytest.approx(np.array([3 / 4, 1 / 4, 0]) - 1 / 3, abs=1e-6)
    assert result.loss == pytest.approx(math.log(3), rel=1e-6)


def test_balanced_softmax_starts_from_the_class_shares() -> None:
    """The same step with balance: predictions start at the (smoothed) shares, so the bias hardly moves."""
    weights = initial_weights(MLP, DIGITS, 0)
    to_tensors(weights, MLP)["head.weight"][:] = 0
    to_tensors(weights, MLP)["head.bias"][:] = 0
    x, y = blobs(4, 0)
    y[:] = [0, 0, 0, 1]
    settings = TrainSettings(
        epochs=1, batch_size=4, learning_rate=1.0, momentum=0.0, clip_norm=0.0, balance=1.0
    )
    moved = to_tensors(train(MLP, DIGITS, weights, x, y, settings, 0).weights, MLP)["head.bias"]
    assert moved == pytest.approx(np.array([3 / 4, 1 / 4, 0]) - np.array([3.1, 1.1, 0.1]) / 4.3, abs=1e-6)


def test_class_shares_are_smoothed_by_a_tenth_of_a_sample() -> None:
    assert np.exp(log_shares(np.array([0, 0, 1]), 3)) == pytest.approx(np.array([2.1, 1.1, 0.1]) / 3.3)


def test_balanced_softmax_does_not_unlearn_absent_classes() -> None:
    """A device with one class of three: plain softmax makes the other two unlikely, balanced hardly."""
    start = _trained().weights
    x, y = blobs(90, 5)
    only = y == 0
    others = x[~only]
    wanted = y[~only]

    def belief(weights: Any) -> Any:
        return float(log_probabilities(MLP, DIGITS, weights, others)[np.arange(len(wanted)), wanted].mean())

    plain, balanced = (
        train(MLP, DIGITS, start, x[only], y[only], TrainSettings(epochs=30, balance=balance), 0).weights
        for balance in (0.0, 1.0)
    )
    assert abs(belief(balanced) - belief(start)) < 0.25 * abs(belief(plain) - belief(start))


def test_a_strong_proximal_term_keeps_weights_near_the_start() -> None:
    start = initial_weights(MLP, DIGITS, 0)
    free, held = (
        np.linalg.norm(_trained(proximal=mu, learning_rate=0.01).weights - start) for mu in (0.0, 10.0)
    )
    assert held < free / 2


def test_the_gradient_norm_is_clipped() -> None:
    """One step of size 1 with a gradient of at most 0.01 moves the weights by at most 0.01."""
    start = initial_weights(MLP, DIGITS, 0)
    moved = _trained(epochs=1, max_steps=1, learning_rate=1.0, clip_norm=0.01).weights - start
    assert np.linalg.norm(moved) == pytest.approx(0.01, rel=1e-3)


def test_steps_are_bounded_and_reported() -> None:
    """90 samples in batches of 32 are 3 steps; 8 epochs would be 24."""
    x, y = blobs(90, 1)
    seen = []
    start = initial_weights(MLP, DIGITS, 0)
    train(
        MLP,
        DIGITS,
        start,
        x,
        y,
        TrainSettings(epochs=8, max_steps=7),
        0,
        on_step=lambda *step: seen.append(step),
    )
    assert seen == [(step, 7) for step in range(1, 8)]
    seen.clear()
    train(MLP, DIGITS, start, x, y, TrainSettings(epochs=2), 0, on_step=lambda *step: seen.append(step))
    assert seen[-1] == (6, 6)


def test_on_step_can_stop_training() -> None:
    def stop(step: Any, _steps: Any) -> None:
        if step == 2:
            raise TrainingError("deadline")

    x, y = blobs(90, 1)
    with pytest.raises(TrainingError, match="deadline"):
        train(MLP, DIGITS, initial_weights(MLP, DIGITS, 0), x, y, TrainSettings(), 0, on_step=stop)
    assert not torch.are_deterministic_algorithms_enabled()


def test_one_sample_and_one_class_can_be_trained_on() -> None:
    x, y = blobs(1, 0)
    assert np.isfinite(
        train(MLP, DIGITS, initial_weights(MLP, DIGITS, 0), x, y, TrainSettings(), 0).weights
    ).all()


def test_a_loss_that_explodes_is_an_error() -> None:
    x, y = blobs(30, 0)
    settings = TrainSettings(learning_rate=100, clip_norm=0, epochs=50, momentum=0.999)
    big = initial_weights(MLP, DIGITS, 0) * np.float32(1e30)
    with pytest.raises(TrainingError, match="lower learning_rate"):
        train(MLP, DIGITS, big, x * 1e30, y, settings, 0)


def test_data_of_another_form_is_refused() -> None:
    start = initial_weights(MLP, DIGITS, 0)
    x, y = blobs(5, 0)
    for inputs, labels in (
        (x[:0], y[:0]),
        (x[:, 0], y),
        (x, y[:4]),
        (x, y + 3),
        (x, y - 3),
    ):
        with pytest.raises(DataError):
            train(MLP, DIGITS, start, inputs, labels, TrainSettings(), 0)


def test_weights_of_another_structure_are_refused() -> None:
    x, y = blobs(5, 0)
    with pytest.raises(StructureError):
        train(MLP, DIGITS, np.zeros(3, dtype=np.float32), x, y, TrainSettings(), 0)
    bad = np.full(MLP.parameters, np.nan, dtype=np.float32)
    with pytest.raises(NonFiniteError):
        log_probabilities(MLP, DIGITS, bad, x)


def test_predictions_do_not_depend_on_the_batch_size() -> None:
    x, _ = blobs(10, 0)
    weights = initial_weights(MLP, DIGITS, 0)
    whole = log_probabilities(MLP, DIGITS, weights, x)
    assert log_probabilities(MLP, DIGITS, weights, x, batch_size=3) == pytest.approx(whole, abs=1e-6)
    assert log_probabilities(MLP, DIGITS, weights, x[:0]).shape == (0, 3)


@pytest.mark.parametrize("kind", [TrainSettings, DistillSettings])
def test_settings_out_of_range_are_refused_all_at_once(kind: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        kind(learning_rate=float("nan"), batch_size=0, mixup=-1)
    assert len(caught.value.faults) == 3


@pytest.mark.parametrize(
    "settings",
    [{"learning_rate": 0}, {"optimizer": "lbfgs"}, {"epochs": 10**6}, {"epochs": True}, {"epochs": "5"}],
)
def test_wrong_training_settings_are_refused(settings: Any) -> None:
    with pytest.raises(ConfigError):
        TrainSettings(**settings)


# --- distillation --------------------------------------------------------------------------------------


def _teacher(weights: Any, structure: Structure = MLP) -> Any:
    return lambda x: log_probabilities(structure, DIGITS, weights, x)


def test_a_student_of_another_structure_learns_without_labels() -> None:
    student = structure_of("cnn", {"width": 4}, DIGITS)
    start = initial_weights(student, DIGITS, 5)
    x, _ = blobs(200, 7)
    taught = distill(student, DIGITS, start, x, _teacher(_trained().weights), DistillSettings(augment=0.2), 0)
    assert accuracy(student, taught) > 0.9 > accuracy(student, start)


@pytest.mark.parametrize("mixup", [0.0, 0.5])
def test_distillation_is_reproducible(mixup: Any) -> None:
    x, _ = blobs(40, 7)
    start, teacher = initial_weights(MLP, DIGITS, 5), _teacher(_trained().weights)
    settings = DistillSettings(steps=10, mixup=mixup)
    first = distill(MLP, DIGITS, start, x, teacher, settings, 1)
    assert to_bytes(distill(MLP, DIGITS, start, x, teacher, settings, 1)) == to_bytes(first)
    assert to_bytes(distill(MLP, DIGITS, start, x, teacher, settings, 2)) != to_bytes(first)


def test_the_teacher_is_asked_once_and_about_the_samples_as_they_are() -> None:
    x, _ = blobs(40, 7)
    start, teacher = initial_weights(MLP, DIGITS, 5), _teacher(_trained().weights)
    settings, asked = DistillSettings(steps=10, copies=2), []

    def telling(inputs: Any) -> Any:
        asked.append(inputs.copy())
        return teacher(inputs)

    taught = distill(MLP, DIGITS, start, x, telling, settings, 1)
    assert len(asked) == 1
    assert np.array_equal(asked[0], x)
    assert to_bytes(distill(MLP, DIGITS, start, x, teacher(x), settings, 1)) == to_bytes(taught)


def test_copies_are_changed_and_the_samples_stay_what_they_are() -> None:
    """Copies of strength 0 are the samples; without copies no strength matters; the inputs are not touched."""
    x, _ = blobs(7, 0)
    before, start = x.copy(), initial_weights(MLP, DIGITS, 5)
    answers = _teacher(_trained().weights)(x)

    def taught(**given: Any) -> bytes:
        settings = DistillSettings(steps=8, batch_size=4, **given)
        return to_bytes(distill(MLP, DIGITS, start, x, answers, settings, 1))

    assert taught(copies=0, augment=0) == taught(copies=0, augment=2)
    assert taught(copies=3, augment=0) != taught(copies=3, augment=1)
    assert np.array_equal(x, before)


def test_every_sample_can_have_its_own_number_of_copies() -> None:
    """The same number for all is the setting; other numbers teach otherwise, and wrong ones are refused."""
    x, _ = blobs(7, 0)
    start, answers = initial_weights(MLP, DIGITS, 5), _teacher(_trained().weights)(x)

    def taught(settings: int, copies: list[int] | None) -> bytes:
        given = DistillSettings(steps=8, batch_size=4, copies=settings)
        own = None if copies is None else np.array(copies)
        return to_bytes(distill(MLP, DIGITS, start, x, answers, given, 1, copies=own))

    assert taught(0, [2] * 7) == taught(2, None)
    assert taught(0, [0] * 6 + [9]) not in (taught(0, None), taught(9, None))
    for wrong in ([1] * 6, [1] * 8, [-1] + [1] * 6):
        with pytest.raises(DataError, match="copies must be counts"):
            taught(0, wrong)


def test_few_samples_get_copies_and_all_are_seen_six_times() -> None:
    assert [usual_copies(samples) for samples in (1, 375, 376, 750, 1500, 1501)] == [4, 4, 3, 2, 1, 0]
    assert [usual_steps(samples, 32) for samples in (1, 1600, 3201, 10**9)] == [300, 300, 601, 1000]


def test_a_student_that_equals_its_teacher_stays() -> None:
    """The gradient is zero at the teacher's own weights (Adam would amplify noise: the step is small)."""
    start = _trained().weights
    x, _ = blobs(64, 7)
    settings = DistillSettings(steps=1, batch_size=64, copies=0, learning_rate=1e-3)
    taught = distill(MLP, DIGITS, start, x, _teacher(start), settings, 0)
    assert log_probabilities(MLP, DIGITS, taught, x) == pytest.approx(
        log_probabilities(MLP, DIGITS, start, x), abs=0.2
    )


def test_bad_teachers_and_inputs_are_refused() -> None:
    x, _ = blobs(5, 0)
    start = initial_weights(MLP, DIGITS, 0)
    good = np.zeros((5, 3), dtype=np.float32)
    for inputs, outputs in ((x[:0], good[:0]), (x, good[:4]), (x, good + np.nan), (x[:, 0], good)):
        with pytest.raises(DataError):
            distill(MLP, DIGITS, start, inputs, outputs, DistillSettings(steps=1), 0)


# --- import cost -----------------------------------------------------------------------------------------


def test_importing_learning_imports_no_backend() -> None:
    modules = ["", ".families", ".training", ".distillation", ".dataset", ".export", ".augmentation"]
    imports = "; ".join(f"import liberatai_core.learning{module}" for module in modules)
    code = f"import sys; {imports}; sys.exit(bool({{'torch', 'onnx', 'onnxruntime'}} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_torch_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingExtraError, match=r"liberatai\[train\]"):
        importlib.import_module("liberatai_core.learning.families").require_torch()


def _with_dropout(params: dict[str, Any], data: DataContract) -> Any:
    size = math.prod(data.input_shape)
    return torch.nn.Sequential(
        torch.nn.Flatten(),
        torch.nn.Linear(size, 32),
        torch.nn.Dropout(0.5),
        torch.nn.Linear(32, data.classes),
    )


def test_two_threads_that_teach_with_dropout_at_once_give_what_each_gives_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Dropout draws from torch's one random state: two jobs of one coordinator must not share it."""
    _entry_points(monkeypatch, forgetful=_with_dropout)
    structure = structure_of("forgetful", {}, DIGITS)
    rng = np.random.default_rng(0)
    x = rng.random((40, *DIGITS.input_shape), dtype=np.float32)
    probs = np.log(rng.dirichlet(np.ones(DIGITS.classes), 40)).astype(np.float32)
    settings = DistillSettings(steps=60, batch_size=8)
    weights = initial_weights(structure, DIGITS, 1)

    def taught(seed: int) -> bytes:
        return to_bytes(distill(structure, DIGITS, weights, x, probs, settings, seed))

    alone = [taught(1), taught(2)]
    with ThreadPoolExecutor(2) as threads:
        for _ in range(3):
            assert list(threads.map(taught, (1, 2))) == alone
