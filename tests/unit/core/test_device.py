"""Learning on a device that is not the processor: torch's "meta" device stands for it.

It knows shapes and refuses to mix devices, but has no values: whatever is copied from it is zeros here.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_leaves

from liberatai_core.compressor import codebook
from liberatai_core.errors import ConfigError
from liberatai_core.learning.device import chosen, computing_on
from liberatai_core.learning.distillation import DistillSettings, distill
from liberatai_core.learning.export import onnx_bytes
from liberatai_core.learning.families import initial_weights, structure_of
from liberatai_core.learning.retraining import RetrainSettings, retrain
from liberatai_core.learning.sensitivity import importance, sensitivity
from liberatai_core.learning.statistics import reestimate
from liberatai_core.learning.training import TrainSettings, log_probabilities, train
from liberatai_core.structure import DataContract

DATA = DataContract(input_shape=(1, 8, 8), classes=4)


class _Elsewhere(torch.overrides.TorchFunctionMode):
    """Values that leave the device are zeros; an operation takes its values from one place."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        first: Any = args[0] if args else None
        away = isinstance(first, torch.Tensor) and first.is_meta
        if away and func in (torch.Tensor.cpu, torch.Tensor.item, torch.Tensor.__float__):
            zeros = torch.zeros(first.shape, dtype=first.dtype)
            return zeros if func is torch.Tensor.cpu else zeros.item()
        assert not (away and func is torch.Tensor.numpy), "numpy reads the processor's memory only"
        leaves = [arg for arg in tree_leaves((args, kwargs)) if isinstance(arg, torch.Tensor) and arg.dim()]
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and away:
            leaves = []  # an index may be the processor's
        if getattr(func, "__name__", "") not in ("__get__", "__set__", "to", "copy_"):
            assert len({leaf.is_meta for leaf in leaves}) < 2, f"{func}: values on two devices"
        return func(*args, **(kwargs or {}))


@pytest.fixture
def elsewhere() -> Iterator[None]:
    with computing_on("meta"), _Elsewhere():
        yield


STRUCTURE = structure_of("resnet", {"depth": 20, "width": 4, "norm": "batch"}, DATA)
WEIGHTS = initial_weights(STRUCTURE, DATA, 0)
X = np.random.default_rng(0).standard_normal((12, *DATA.input_shape)).astype(np.float32)
Y = np.arange(12) % DATA.classes


@pytest.mark.usefixtures("elsewhere")
class TestNothingIsMixed:
    def test_train_with_all_that_changes_a_step(self) -> None:
        settings = TrainSettings(
            epochs=1, batch_size=4, proximal=0.1, clip_norm=1.0, mixup=0.5, augment=0.5, weight_decay=0.1
        )
        gain = np.ones_like(WEIGHTS)
        assert not train(STRUCTURE, DATA, WEIGHTS, X, Y, settings, seed=0, gain=gain).weights.any()

    @pytest.mark.parametrize("loss", ["kl", "outputs"])
    def test_distill(self, loss: Literal["kl", "outputs"]) -> None:
        settings = DistillSettings(steps=2, batch_size=4, copies=1, loss=loss, clip_norm=1.0, mixup=0.5)
        teacher = np.log(np.full((12, DATA.classes), 1 / DATA.classes, np.float32))
        taught = distill(STRUCTURE, DATA, WEIGHTS, X, teacher, settings, 0, gain=np.ones_like(WEIGHTS))
        assert not taught.any()

    def test_log_probabilities_and_statistics(self) -> None:
        assert not log_probabilities(STRUCTURE, DATA, WEIGHTS, X).any()
        assert not reestimate(STRUCTURE, DATA, WEIGHTS, X).any()

    def test_measuring_sensitivities(self) -> None:
        fisher = importance(STRUCTURE, DATA, WEIGHTS, X, 0)
        assert len(sensitivity(STRUCTURE, DATA, WEIGHTS, X, fisher, 0)) == len(STRUCTURE.tensors)

    def test_retraining_through_both_phases_with_an_interruption(self, tmp_path: Path) -> None:
        budget = 2 * codebook.smallest_bytes(STRUCTURE)
        given = {tensor.name: 1.0 for tensor in STRUCTURE.tensors}
        settings = RetrainSettings(steps=12, batch_size=4, centroids=0.5, refresh=2)

        def again(on_step: Callable[[int, int], None]) -> bytes:
            return retrain(
                STRUCTURE, DATA, WEIGHTS, budget, X, given, settings, 0, cache=tmp_path, on_step=on_step
            ).file

        def cut(at: int, _steps: int) -> None:
            if at == 5:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            again(cut)
        assert list(tmp_path.iterdir()), "nothing was kept"
        seen: list[int] = []
        assert 0 < len(again(lambda at, _steps: seen.append(at))) <= budget
        assert seen[0] > 1, "began anew"


def test_an_export_stays_on_the_processor() -> None:
    pytest.importorskip("onnxscript")
    with computing_on("meta"):
        assert onnx_bytes(STRUCTURE, DATA, WEIGHTS)


def test_the_processor_is_the_default_and_comes_back() -> None:
    assert chosen().type == "cpu"
    with computing_on("meta"):
        assert chosen().type == "meta"
    assert chosen().type == "cpu"


@pytest.mark.parametrize("name", ["abacus", "mps:3"])
def test_a_device_that_is_not_there_is_a_clear_error(name: str) -> None:
    with pytest.raises(ConfigError, match="take cpu"), computing_on(name):
        pytest.fail("entered")
    assert chosen().type == "cpu"
