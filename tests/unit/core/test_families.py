"""The zoo: parameter counts of the papers, batch norm in the flat vector, smaller members, out-of-the-box training."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from liberatai_coordinator.config import parse_job
from liberatai_coordinator.jobs.materials import candidates_of
from liberatai_core.compressor.artifact import restore
from liberatai_core.compressor.drawn import draw
from liberatai_core.errors import DataError, NonFiniteError, StructureError
from liberatai_core.learning import families
from liberatai_core.learning._flat import flat_module, reproducible
from liberatai_core.learning.families import cost, initial_weights, structure_of
from liberatai_core.learning.families.modules import BothWays
from liberatai_core.learning.statistics import reestimate
from liberatai_core.learning.training import TrainSettings, log_probabilities, train
from liberatai_core.structure import DataContract, Structure, Tensor, from_tensors, to_tensors

torch = pytest.importorskip("torch")

DIGITS = DataContract(input_shape=(1, 8, 8), classes=10)
FASHION = DataContract(input_shape=(1, 28, 28), classes=10)
CIFAR = DataContract(input_shape=(3, 32, 32), classes=10)
IMAGENET = DataContract(input_shape=(3, 224, 224), classes=1000)
DEEP = [
    ("vgg", {"depth": 11, "width": 4}),
    ("vgg", {"width": 2, "hidden": 8}),
    ("resnet", {"width": 4}),
    ("resnet", {"depth": 50, "width": 4}),
    ("mobilenet", {"width": 10}),
]


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    """Small layers lose time on several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def logits(structure: Structure, data: DataContract, weights: Any, x: Any) -> Any:
    with torch.no_grad():
        return flat_module(structure, data, weights).module.eval()(torch.from_numpy(x)).numpy()


def noise(data: DataContract, samples: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(size=(samples, *data.input_shape)).astype(np.float32)


# --- sizes of the papers ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "params", "data", "parameters"),
    [
        # Counted by hand: convolutions, two values per norm channel, linear head.
        ("vgg", {"width": 16}, FASHION, 922_842),
        ("vgg", {}, CIFAR, 14_724_042),
        # Torchvision's models of the same name and norm (two values per channel) have these counts.
        ("resnet", {"depth": 18, "norm": "group"}, IMAGENET, 11_689_512),
        ("resnet", {"depth": 34}, IMAGENET, 21_797_672),
        ("resnet", {"depth": 50}, IMAGENET, 25_557_032),
        ("mobilenet", {}, IMAGENET, 3_504_872),
        ("mobilenet", {}, CIFAR, 2_236_682),
        # Without the head: 23.5 million.
        ("resnet", {"depth": 50}, CIFAR, 23_500_352 + 2048 * 10 + 10),
    ],
)
def test_parameters_are_those_of_the_reference(family: str, params: Any, data: Any, parameters: int) -> None:
    assert structure_of(family, params, data).parameters == parameters


@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85)])
def test_small_resnets_have_the_size_that_the_paper_says(depth: int, millions: float) -> None:
    """Table 6; convolutions as shortcuts add some thousand to the paper's zero padding."""
    assert structure_of("resnet", {"depth": depth}, CIFAR).parameters / 1e6 == pytest.approx(
        millions, rel=0.02
    )


def test_vgg_with_dense_layers_is_that_of_the_paper() -> None:
    """138 million parameters (table 2, D), 15.5 billion multiply-accumulates."""
    structure = structure_of("vgg", {"hidden": 4096}, IMAGENET)
    assert structure.parameters == pytest.approx(138e6, rel=0.005)
    assert cost(structure, IMAGENET).macs_per_sample == pytest.approx(15.5e9, rel=0.005)


@pytest.mark.parametrize(
    ("family", "params", "data", "macs"),
    [
        ("resnet", {"depth": 18}, IMAGENET, 1.81e9),
        ("mobilenet", {}, IMAGENET, 300e6),
        ("resnet", {}, CIFAR, 41e6),
    ],
)
def test_multiply_accumulates_are_those_of_the_papers(
    family: str, params: Any, data: Any, macs: float
) -> None:
    assert cost(structure_of(family, params, data), data).macs_per_sample == pytest.approx(macs, rel=0.01)


EVERY = [
    *DEEP,
    ("mlp", {"hidden": 8}),
    ("cnn", {"width": 4, "hidden": 8}),
    ("ds_cnn", {"width": 4}),
]


@pytest.mark.parametrize("norm", ["group", "batch"])
@pytest.mark.parametrize(("family", "params"), EVERY)
def test_tensors_and_shapes_of_the_description_are_those_that_torch_gives(
    family: str, params: Any, norm: str
) -> None:
    given = params | {"norm": norm}
    structure = structure_of(family, given, CIFAR)
    module = families.build(family, given, CIFAR)
    state = [(name, tuple(tensor.shape)) for name, tensor in module.state_dict().items()]
    assert state == [(tensor.name, tensor.shape) for tensor in structure.tensors]
    values = 3 * 32 * 32

    def count(_layer: Any, _inputs: Any, output: Any) -> None:
        nonlocal values
        values += output.numel()

    for layer in module.modules():
        if (not any(True for _ in layer.children()) and not isinstance(layer, torch.nn.Identity)) or (
            isinstance(layer, BothWays) and isinstance(layer.after, torch.nn.Identity)
        ):
            layer.register_forward_hook(count)
    module.eval()(torch.zeros((1, 3, 32, 32)))
    assert cost(structure, CIFAR).activation_bytes_per_sample == 4 * values


def test_counting_imports_no_framework() -> None:
    """Torch takes seconds at a start, and a device may not have it."""
    program = f"""
import sys
from liberatai_core.learning.families import cost, structure_of
from liberatai_core.structure import DataContract
data = DataContract(input_shape=(3, 32, 32), classes=10)
for family, params in {EVERY!r}:
    cost(structure_of(family, params, data), data)
assert not {{"torch", "onnxruntime"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True)


# --- shapes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["group", "batch"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32), (1, 49, 40), (2, 3, 5), (1, 1, 70)])
@pytest.mark.parametrize(("family", "params"), DEEP)
def test_deep_families_take_small_and_large_images(family: str, params: Any, shape: Any, norm: str) -> None:
    data = DataContract(input_shape=shape, classes=5)
    structure = structure_of(family, {**params, "norm": norm}, data)
    weights = initial_weights(structure, data, 1)
    out = log_probabilities(structure, data, weights, noise(data, 3))
    assert np.exp(out).sum(axis=1) == pytest.approx(np.ones(3), rel=1e-5)
    one = train(structure, data, weights, noise(data, 1), np.array([2]), TrainSettings(epochs=1), 0)
    assert np.isfinite(one.weights).all()


def test_naming_the_default_norm_changes_nothing_but_the_name() -> None:
    plain, named = (structure_of("cnn", {"width": 4, **more}, DIGITS) for more in ({}, {"norm": "group"}))
    assert plain.tensors == named.tensors
    assert (plain.id, named.id) == ("cnn-width4", "cnn-normgroup-width4")


@pytest.mark.parametrize(
    ("family", "params", "text"),
    [
        ("vgg", {"depth": 12}, "depth must be one of 11, 13, 16, 19, not 12"),
        ("vgg", {"depth": True}, "depth"),
        ("vgg", {"norm": "layer"}, "norm must be group or batch"),
        ("vgg", {"norm": 1}, "norm"),
        ("vgg", {"width": 2000}, "width"),
        ("vgg", {"width": 1024}, "at most"),
        ("vgg", {"layers": 2}, "unknown parameter 'layers'"),
        ("resnet", {"depth": 110}, "depth"),
        ("resnet", {"width": 0}, "width"),
        ("mobilenet", {"width": 401}, "width"),
        ("mobilenet", {"width": "1.0"}, "width"),
        ("mlp", {"hidden": 4, "norm": "none"}, "norm"),
    ],
)
def test_wrong_parameters_are_refused(family: str, params: Any, text: str) -> None:
    with pytest.raises(StructureError, match=text):
        structure_of(family, params, DIGITS)


def test_parameters_that_do_not_fit_their_tensors_are_refused_before_memory_is_taken() -> None:
    """Width 1024 would take 2.4 GB for one convolution."""
    small = structure_of("mlp", {"hidden": 2}, DIGITS)
    lie = Structure(family="vgg", params={"width": 1024}, tensors=small.tensors)
    weights = np.zeros(lie.parameters, dtype=np.float32)
    for call in (lambda: initial_weights(lie, DIGITS, 0), lambda: flat_module(lie, DIGITS, weights)):
        with pytest.raises(StructureError, match="not those that this family builds"):
            call()


# --- starting values ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "params"), [("resnet", {"width": 4}), ("mobilenet", {"width": 10})])
def test_a_new_residual_block_passes_its_input_on(family: str, params: Any) -> None:
    structure = structure_of(family, params, DIGITS)
    module = flat_module(structure, DIGITS, initial_weights(structure, DIGITS, 0)).module.eval()
    blocks = [child for _, child in module.named_children() if hasattr(child, "branch")]
    x = torch.rand(2, next(blocks[0].parameters()).shape[1], 4, 4)
    assert len(blocks) >= 9
    with torch.no_grad():
        assert torch.equal(blocks[0](x), x)


@pytest.mark.parametrize(("family", "params"), DEEP)
def test_a_new_deep_model_travels_as_a_recipe(family: str, params: Any) -> None:
    """Gains (ones, and zeros in residual blocks) arrive exactly, weights with the same spread."""
    structure = structure_of(family, params, DIGITS)
    reference = initial_weights(structure, DIGITS, 3)
    file = draw(reference, structure, 5)
    assert len(file) < 4 * structure.parameters / 5
    wanted, found = to_tensors(reference, structure), to_tensors(restore(file, structure), structure)
    for name, value in wanted.items():
        if (value == value.flat[0]).all():
            assert np.array_equal(found[name], value), name
        elif value.size >= 1000:
            assert found[name].std() == pytest.approx(value.std(), rel=0.1), name


# --- running statistics -------------------------------------------------------------------------------

BATCH = structure_of("cnn", {"width": 4, "norm": "batch"}, DIGITS)


def test_running_statistics_are_tensors_behind_their_norm() -> None:
    names = [t.name for t in BATCH.tensors][:5]
    assert names == [
        "conv1_1.weight",
        *(f"norm1_1.{n}" for n in ("weight", "bias", "running_mean", "running_var")),
    ]
    named = families.statistics_of(BATCH)
    assert named == {f"norm{s}_1.running_{k}" for s in (1, 2) for k in ("mean", "var")}
    assert families.statistics_of(structure_of("cnn", {"width": 4}, DIGITS)) == frozenset()


def test_an_installed_family_has_no_statistics_whatever_its_tensors_are_called() -> None:
    foreign = Structure(family="foreign", params={}, tensors=BATCH.tensors)
    assert families.statistics_of(foreign) == frozenset()


def test_new_running_statistics_are_zero_mean_and_unit_variance() -> None:
    tensors = to_tensors(initial_weights(BATCH, DIGITS, 0), BATCH)
    assert (tensors["norm1_1.running_mean"] == 0).all()
    assert (tensors["norm1_1.running_var"] == 1).all()


def test_training_measures_statistics_and_nothing_else_moves_them() -> None:
    """Weight decay, the proximal pull and the step size act on what is learned only."""
    x, y = noise(DIGITS, 64), np.arange(64) % 10
    start = initial_weights(BATCH, DIGITS, 0)
    to_tensors(start, BATCH)["norm1_1.running_mean"][:] = 5.0
    settings = (
        TrainSettings(epochs=1, batch_size=64),
        TrainSettings(epochs=1, batch_size=64, weight_decay=10.0, proximal=1000.0, clip_norm=0.0),
    )
    plain, pulled = (train(BATCH, DIGITS, start, x, y, how, 0).weights for how in settings)
    learned, measured = to_tensors(plain, BATCH), to_tensors(pulled, BATCH)
    for name in families.statistics_of(BATCH):
        assert np.array_equal(learned[name], measured[name]), name
    first = to_tensors(start, BATCH)["conv1_1.weight"]
    out = torch.nn.functional.conv2d(torch.from_numpy(x), torch.from_numpy(first), padding=1)
    wanted = 0.9 * 5.0 + 0.1 * out.mean(dim=(0, 2, 3)).numpy()
    assert learned["norm1_1.running_mean"] == pytest.approx(wanted, abs=1e-5)
    assert not np.array_equal(learned["conv1_1.weight"], measured["conv1_1.weight"])


def test_a_gradient_of_statistics_stays_zero() -> None:
    model = flat_module(BATCH, DIGITS, initial_weights(BATCH, DIGITS, 0))
    model.module.train()(torch.rand(8, 1, 8, 8)).square().sum().backward()
    for tensor, place in BATCH.slices():
        if tensor.name in families.statistics_of(BATCH):
            assert not model.gradient[place].any(), tensor.name
            assert not np.array_equal(model.weights()[place], initial_weights(BATCH, DIGITS, 0)[place])
    assert model.gradient.any()


def test_reestimated_statistics_are_means_over_all_samples() -> None:
    """Batches of 40, 40 and 21 (20, and one that has no variance of its own); the first layer by hand."""
    x = noise(DIGITS, 101)
    start = initial_weights(BATCH, DIGITS, 0)
    found = reestimate(BATCH, DIGITS, start, x, batch_size=40)
    first = to_tensors(start, BATCH)["conv1_1.weight"]
    out = torch.nn.functional.conv2d(torch.from_numpy(x), torch.from_numpy(first), padding=1)
    parts = [out[:40], out[40:80], out[80:]]
    mean = out.mean(dim=(0, 2, 3)).numpy()
    variance = sum(len(p) * p.var(dim=(0, 2, 3)) for p in parts).numpy() / len(x)
    tensors = to_tensors(found, BATCH)
    assert tensors["norm1_1.running_mean"] == pytest.approx(mean, abs=1e-5)
    assert tensors["norm1_1.running_var"] == pytest.approx(variance, rel=1e-4)
    for name, value in to_tensors(start, BATCH).items():
        assert (name in families.statistics_of(BATCH)) != np.array_equal(tensors[name], value), name
    assert np.array_equal(found, reestimate(BATCH, DIGITS, start, x, batch_size=40))


def test_reestimating_mends_statistics_that_are_wrong() -> None:
    x = noise(DIGITS, 200)
    good = reestimate(BATCH, DIGITS, initial_weights(BATCH, DIGITS, 0), x)
    broken = good.copy()
    for name in families.statistics_of(BATCH):
        to_tensors(broken, BATCH)[name][:] = 3.0
    assert np.array_equal(reestimate(BATCH, DIGITS, broken, x), good)


def test_reestimating_needs_samples_and_finite_weights_of_the_structure() -> None:
    start = initial_weights(BATCH, DIGITS, 0)
    with pytest.raises(DataError, match="no samples"):
        reestimate(BATCH, DIGITS, start, noise(DIGITS, 0))
    with pytest.raises(DataError, match="shape"):
        reestimate(BATCH, DIGITS, start, noise(FASHION, 2))
    with pytest.raises(StructureError):
        reestimate(BATCH, DIGITS, start[1:], noise(DIGITS, 2))
    with pytest.raises(NonFiniteError):
        reestimate(BATCH, DIGITS, start * np.nan, noise(DIGITS, 2))
    with pytest.raises(ValueError, match="one sample has no variance"):
        reestimate(BATCH, DIGITS, start, noise(DIGITS, 2), batch_size=1)


def test_one_sample_is_enough_where_maps_have_several_values() -> None:
    found = reestimate(BATCH, DIGITS, initial_weights(BATCH, DIGITS, 0), noise(DIGITS, 1))
    assert np.isfinite(found).all()
    assert (to_tensors(found, BATCH)["norm1_1.running_var"] != 1).all()


def test_without_statistics_the_weights_come_back_as_a_copy() -> None:
    plain = structure_of("cnn", {"width": 4}, DIGITS)
    start = initial_weights(plain, DIGITS, 0)
    found = reestimate(plain, DIGITS, start, noise(DIGITS, 0))
    assert np.array_equal(found, start)
    assert not np.shares_memory(found, start)


# --- smaller members ----------------------------------------------------------------------------------

LARGE: list[tuple[str, Any, Any]] = [
    ("vgg", {"width": 16}, CIFAR),
    ("vgg", {"depth": 13, "width": 16, "hidden": 64}, CIFAR),
    ("resnet", {}, CIFAR),
    ("resnet", {"depth": 50, "width": 16}, CIFAR),
    ("mobilenet", {}, CIFAR),
    ("cnn", {"width": 16, "hidden": 64, "layers": 2}, FASHION),
    ("ds_cnn", {"width": 64}, FASHION),
    ("cnn1d", {"width": 32}, DataContract(input_shape=(9, 128), classes=6)),
    ("mlp", {"hidden": 64, "layers": 2}, FASHION),
]


@pytest.mark.parametrize("share", [1.0, 0.5, 0.1])
@pytest.mark.parametrize(("family", "params", "data"), LARGE)
def test_a_smaller_member_fits_and_uses_what_it_may(
    family: str, params: Any, data: Any, share: float
) -> None:
    structure = structure_of(family, params, data)
    limit = int(structure.parameters * share)
    found = families.smaller(structure, data, limit)
    assert found is not None
    assert found == structure_of(family, found.params, data)
    assert limit * 0.4 < found.parameters <= min(limit, structure.parameters - 1)


def test_width_shrinks_before_depth_and_depth_before_the_first_stage_is_too_narrow() -> None:
    structure = structure_of("vgg", {"width": 16}, CIFAR)
    params = [families.smaller(structure, CIFAR, limit).params for limit in (400_000, 200_000, 50_000)]  # type: ignore[union-attr]
    assert params == [{"width": 10}, {"width": 8, "depth": 13}, {"width": 4, "depth": 11}]


def test_dense_layers_shrink_along() -> None:
    structure = structure_of("cnn", {"width": 16, "hidden": 64}, FASHION)
    found = families.smaller(structure, FASHION, structure.parameters // 3)
    assert found is not None
    assert found.params == {"width": 8, "hidden": 32}


def test_there_may_be_no_smaller_member() -> None:
    structure = structure_of("mlp", {"hidden": 8}, DIGITS)
    assert families.smaller(structure, DIGITS, 50) is None
    assert families.smaller(structure_of("mlp", {"hidden": 1}, DIGITS), DIGITS, 10**6) is None
    foreign = Structure(family="foreign", params={}, tensors=structure.tensors)
    assert families.smaller(foreign, DIGITS, 10**6) is None


@pytest.mark.parametrize(("family", "params", "data"), LARGE)
def test_cutting_drops_the_channels_that_do_nothing(family: str, params: Any, data: Any) -> None:
    """Every other channel is dead in all tensors: a member of half the width computes the same.

    Its head alone is scaled by the share of inputs that it lost.
    """
    params = {**params, "norm": "batch"}
    halves = {"hidden": 2, "width": 2} if family != "mobilenet" else {"width": 2}
    default = {"resnet": 16, "mobilenet": 100}.get(family)
    own = {**({"width": default} if default else {}), **params}
    structure = structure_of(family, own, data)
    member = structure_of(
        family, {k: v // halves.get(k, 1) if k in halves else v for k, v in own.items()}, data
    )
    random = np.random.default_rng(1)
    tensors = {k: v.copy() for k, v in to_tensors(initial_weights(structure, data, 0), structure).items()}
    for name, value in tensors.items():
        if value.ndim == 1 and not name.startswith("head"):
            value[:] = random.uniform(0.5, 2.0, value.size)
            if name.endswith(("weight", "bias")):
                value[0::2] = 0
    tensors["head.bias"][:] = 0
    weights = from_tensors(tensors, structure)
    x = noise(data, 4)
    wanted = logits(structure, data, weights, x)
    cut = families.sliced(weights, structure, member)
    lost = tensors["head.weight"].shape[1] / to_tensors(cut, member)["head.weight"].shape[1]
    assert lost == 2
    assert np.ptp(wanted) > 0
    found = logits(member, data, cut, x) / lost
    assert np.allclose(found, wanted, rtol=1e-3, atol=1e-3 * float(np.abs(wanted).max()))


def test_a_shallower_vgg_can_be_cut_out_and_other_kernels_cannot() -> None:
    large = structure_of("vgg", {"width": 8}, CIFAR)
    small = structure_of("vgg", {"width": 4, "depth": 11}, CIFAR)
    weights = initial_weights(large, CIFAR, 0)
    assert families.sliced(weights, large, small).shape == (small.parameters,)
    bottleneck = structure_of("resnet", {"depth": 50, "width": 8}, CIFAR)
    basic = structure_of("resnet", {"depth": 18, "width": 4}, CIFAR)
    with pytest.raises(StructureError, match="cannot be cut out"):
        families.sliced(initial_weights(bottleneck, CIFAR, 0), bottleneck, basic)
    for first, second in ((small, large), (large, basic)):
        with pytest.raises(StructureError, match="cannot be cut out"):
            families.sliced(initial_weights(first, CIFAR, 0), first, second)
    with pytest.raises(StructureError, match="wanted"):
        families.sliced(weights[1:], large, small)


# --- federated jobs ---------------------------------------------------------------------------------


def test_a_federated_job_with_running_statistics_is_refused() -> None:
    spec = """
name: lab
data: {input_shape: [1, 8, 8], classes: 10}
structures: [{family: cnn, params: {width: 4, norm: batch}}]
"""
    with pytest.raises(StructureError, match="running statistics do not federate: use norm: group"):
        candidates_of(parse_job(spec, "job"))
    assert candidates_of(parse_job(spec.replace("batch", "group"), "job"))[0][0].id == "cnn-normgroup-width4"


# --- training -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "params", "asked"),
    [
        ("vgg", {"depth": 11, "width": 8}, 0.6),
        ("vgg", {"depth": 11, "width": 8, "norm": "batch"}, 0.6),
        ("resnet", {"width": 8}, 0.8),
    ],
)
def test_deep_families_learn_digits_with_the_default_settings(family: str, params: Any, asked: float) -> None:
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    x = (digits.images / 16).astype(np.float32)[:, None]
    y = digits.target.astype(np.int64)
    structure = structure_of(family, params, DIGITS)
    start = initial_weights(structure, DIGITS, 0)
    trained = train(structure, DIGITS, start, x[:1400], y[:1400], TrainSettings(epochs=4), 0)
    right = log_probabilities(structure, DIGITS, trained.weights, x[1400:]).argmax(axis=1) == y[1400:]
    assert right.mean() > asked


@pytest.mark.parametrize(
    ("family", "params"),
    [
        ("vgg", {"depth": 11, "width": 2, "norm": "batch"}),
        ("resnet", {"width": 2}),
        ("mobilenet", {"width": 5}),
    ],
)
def test_training_a_deep_family_gives_the_same_bytes_again(family: str, params: Any) -> None:
    structure = structure_of(family, params, DIGITS)
    start = initial_weights(structure, DIGITS, 0)
    x, y = noise(DIGITS, 40), np.arange(40) % 10
    first, second = (
        train(structure, DIGITS, start, x, y, TrainSettings(epochs=1), 7).weights.tobytes() for _ in range(2)
    )
    assert first == second
    assert first != start.tobytes()


def test_the_cost_of_a_wide_model_for_large_images_takes_no_memory() -> None:
    """Its maps would take gigabytes."""
    data = DataContract(input_shape=(4, 2048, 2048), classes=3)
    price = cost(structure_of("cnn", {"width": 64}, data), data)
    assert price.activation_bytes_per_sample > 2 << 30


def test_the_cost_of_another_structure_than_the_family_builds_is_refused() -> None:
    wrong = Structure("cnn", {"width": 1024}, (Tensor("w", (4,)),))
    with pytest.raises(StructureError, match="not those that this family builds"):
        cost(wrong, DataContract(input_shape=(1, 8, 8), classes=3))


def test_two_jobs_that_start_at_once_get_the_weights_that_each_gets_alone() -> None:
    """Torch has one random state per process: a job beside another one had other weights."""
    structure = structure_of("cnn", {"width": 16, "hidden": 96}, DIGITS)
    wanted = [initial_weights(structure, DIGITS, seed) for seed in range(2)]

    def start(number: int) -> bool:
        return np.array_equal(initial_weights(structure, DIGITS, number % 2), wanted[number % 2])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(start, range(200)))


def test_torch_is_as_it_was_after_the_last_of_two_threads() -> None:
    before = torch.get_rng_state()
    first, second = reproducible(1), reproducible(2)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.are_deterministic_algorithms_enabled()
    second.__exit__(None, None, None)
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.equal(torch.get_rng_state(), before)
