"""The last layer on frozen features: the same as training the whole network with all else kept, and small."""

import numpy as np
import pytest

from liberatai_core.errors import DataError, StructureError
from liberatai_core.learning import head_training
from liberatai_core.learning.families import FAMILIES, initial_weights, structure_of
from liberatai_core.learning.inference import Predictor
from liberatai_core.learning.training import TrainSettings, train
from liberatai_core.sparsifier.subspace import subspace, trained_structure
from liberatai_core.structure import DataContract, Structure, Tensor, head_places, trains_head

pytest.importorskip("torch")
DATA = DataContract(input_shape=(3, 8, 8), classes=4)
SMALL = {
    "cnn": {"width": 4, "hidden": 8},
    "ds_cnn": {"width": 8},
    "mlp": {"hidden": 16},
    "mobilenet": {"width": 5},
    "resnet": {"width": 4},
    "vgg": {"width": 2, "depth": 11},
}
X = np.random.default_rng(1).normal(size=(60, 3, 8, 8)).astype(np.float32)
Y = np.random.default_rng(2).integers(0, 4, 60)


def network(family: str) -> Structure:
    return structure_of(family, {**SMALL[family], "train": "head"}, DATA)


def test_every_family_ends_in_a_head() -> None:
    assert set(SMALL) | {"cnn1d"} == set(FAMILIES)
    structure = structure_of("cnn1d", {"width": 4, "train": "head"}, DataContract((2, 20), 4))
    assert trains_head(structure)
    assert structure.id == "cnn1d-trainhead-width4"


@pytest.mark.parametrize("engine", ["onnxruntime", "numpy"])
@pytest.mark.parametrize("family", SMALL)
def test_features_are_what_the_head_reads(family: str, engine: str) -> None:
    if engine == "onnxruntime":
        pytest.importorskip("onnxruntime")
    structure = network(family)
    weights = initial_weights(structure, DATA, 3)
    found = head_training.features(structure, DATA, weights, X, engine)  # type: ignore[arg-type]
    assert found.values.dtype == np.uint8
    wanted = Predictor(structure, DATA, weights, "numpy").probabilities(X)
    np.testing.assert_allclose(
        np.exp(head_training.log_probabilities(structure, weights, found)), wanted, atol=0.02
    )


def test_it_is_the_training_of_the_whole_network_with_all_else_kept() -> None:
    structure = network("ds_cnn")
    weights = initial_weights(structure, DATA, 3)
    part = subspace(structure, 1.0, 0)
    how = TrainSettings(epochs=6, batch_size=64, learning_rate=0.05)
    whole = train(structure, DATA, weights, X, Y, how, 1, gain=part.gain)
    given = head_training.features(structure, DATA, weights, X)
    head = head_training.train_head(structure, DATA, weights, given, Y, how, 1)
    moved, alone = whole.weights - weights, head.weights - weights
    assert (alone[: head_places(structure).start] == 0).all()
    assert np.abs(moved).max() > 0.01
    np.testing.assert_allclose(alone, moved, atol=0.05 * float(np.abs(moved).max()))  # eight bits
    assert head.loss == pytest.approx(whole.loss, rel=0.02)


def test_the_part_is_the_head_whatever_the_share() -> None:
    structure = network("vgg")
    part = subspace(structure, 0.01, 7)
    assert [tensor.name for tensor in part.part.tensors] == ["head.weight", "head.bias"]
    assert part.part == trained_structure(structure, 0.01)
    whole = np.arange(structure.parameters, dtype=np.float32)
    assert part.gather(whole).tolist() == whole[head_places(structure)].tolist()


def test_what_is_no_head_is_refused() -> None:
    with pytest.raises(StructureError, match="train must be head"):
        structure_of("mlp", {"hidden": 4, "train": "tail"}, DATA)
    odd = Structure("of_somebody", {"train": "head"}, (Tensor("w", (4,)),))
    with pytest.raises(StructureError, match="no layer is called head"):
        subspace(odd, 1.0, 0)
    middle = Structure("of_somebody", {"train": "head"}, (Tensor("head.w", (4,)), Tensor("w", (4,))))
    with pytest.raises(StructureError, match="not its end"):
        subspace(middle, 1.0, 0)
    structure = network("mlp")
    given = head_training.features(structure, DATA, initial_weights(structure, DATA, 0), X[:0])
    with pytest.raises(DataError, match="no samples"):
        head_training.train_head(
            structure, DATA, initial_weights(structure, DATA, 0), given, Y[:0], TrainSettings(), 0
        )


def test_what_is_kept_for_training_is_small() -> None:
    """Twelve classes, 256 features: weights, gradient and momentum in 40 kB, a sample in 256 bytes."""
    structure = structure_of("mlp", {"hidden": 256, "train": "head"}, DataContract((64,), 12))
    places = head_places(structure)
    assert 3 * 4 * (places.stop - places.start) <= 40_000
    data = DataContract((64,), 12)
    x = np.random.default_rng(0).normal(size=(10, 64)).astype(np.float32)
    found = head_training.features(structure, data, initial_weights(structure, data, 0), x)
    assert found.values.nbytes == 10 * 256
