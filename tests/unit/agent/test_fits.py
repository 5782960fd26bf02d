"""A device has ceilings of its own: what is above one is refused before anything is reserved."""

import math
from typing import Any

import pytest

from liberatai_agent.session.fits import MIB, Limits, memory_bytes, require_fits, seen, trainer_of
from liberatai_core.contract.messages import TaskSpec, Training
from liberatai_core.errors import LiberataiError
from liberatai_core.profile import Trainer
from liberatai_core.structure import MAX_INPUT, MAX_PARAMETERS, DataContract, Structure, Tensor

BOARD = Limits(memory_bytes=512 * MIB, residual_bytes=128 * MIB, samples=1000)


def a_spec(*shape: int, **changes: Any) -> TaskSpec:
    structure = Structure("mlp", {"hidden": 1}, (Tensor("w", shape or (100, 100)),))
    fields: dict[str, Any] = {"job": "job", "structure": structure, "data": DataContract((10,), 3)} | changes
    return TaskSpec(**fields)


TORCH: Trainer = "torch"


def test_numpy_trains_where_torch_does_not_fit_or_did_not() -> None:
    both = {"runtimes": ("torch", "onnxruntime", "numpy")}
    roomy, tight = Limits(memory_bytes=512 * MIB, **both), Limits(memory_bytes=300 * MIB, **both)  # type: ignore[arg-type]
    assert trainer_of(a_spec(), roomy) == "torch"
    assert trainer_of(a_spec(), roomy, (TORCH,)) == "numpy"
    assert trainer_of(a_spec(), roomy, ("torch", "numpy")) == "numpy"
    assert trainer_of(a_spec(), tight) == "numpy"
    assert trainer_of(a_spec(), Limits()) == "torch"
    with pytest.raises(LiberataiError, match="this device gives 60"):
        require_fits(a_spec(), 0.05, Limits(memory_bytes=60 * MIB))
    require_fits(a_spec(), 0.05, Limits(memory_bytes=60 * MIB), "numpy")


def test_an_ordinary_task_fits() -> None:
    require_fits(a_spec(), 0.05, BOARD)
    require_fits(a_spec(1000, 1000, training=Training(optimizer="adam")), 1.0, BOARD)
    require_fits(a_spec(), 0.05, Limits())


@pytest.mark.parametrize(
    ("spec", "density", "code"),
    [
        (a_spec(MAX_PARAMETERS), 0.01, "E_MEMORY"),
        (a_spec(16_000_000), 0.01, "E_MEMORY"),
        (a_spec(data=DataContract((MAX_INPUT,), 2)), 0.01, "E_MEMORY"),
        (
            a_spec(data=DataContract((60_000,), 65_536), training=Training(batch_size=65_536)),
            0.01,
            "E_MEMORY",
        ),
        (a_spec(1000, 9000, codec="quantile"), 1.0, "E_SIZE"),
    ],
    ids=["parameters", "more parameters", "input", "batch", "update"],
)
def test_what_is_too_large_is_refused_with_its_code(spec: TaskSpec, density: float, code: str) -> None:
    with pytest.raises(LiberataiError) as caught:
        require_fits(spec, density, BOARD)
    assert caught.value.code == code


def test_what_would_run_for_ever_is_refused() -> None:
    many = Limits(samples=10_000_000)
    with pytest.raises(LiberataiError, match="samples in 1000 epochs") as caught:
        require_fits(a_spec(training=Training(epochs=1000)), 0.1, many)
    assert caught.value.code == "E_LIMIT"
    require_fits(a_spec(training=Training(epochs=1000, max_steps=100)), 0.1, many)


def test_what_waits_on_disk_is_bounded() -> None:
    with pytest.raises(LiberataiError, match="may wait here"):
        require_fits(a_spec(1000, 1000), 0.1, Limits(residual_bytes=MIB))


def test_the_estimates_are_numbers_for_every_spec() -> None:
    huge = a_spec(MAX_PARAMETERS, data=DataContract((MAX_INPUT,), 65_536), training=Training(epochs=1000))
    assert memory_bytes(huge, 10_000_000) > 1 << 40
    assert seen(huge, 0) == 0
    assert math.isfinite(seen(huge, 10_000_000))
