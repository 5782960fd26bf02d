"""One network, ready to predict: with torch if it is installed, else onnxruntime, else numpy."""

from collections.abc import Callable
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from liberatai_core.errors import ConfigError, MissingExtraError
from liberatai_core.learning import runtimes
from liberatai_core.learning.families import FAMILIES
from liberatai_core.learning.training import require_inputs
from liberatai_core.structure import DataContract, Structure, require_length
from liberatai_core.weights import Vector, require_finite

Floats = NDArray[np.float32]
Engine = Literal["torch", "onnxruntime", "numpy"]
ENGINES: tuple[Engine, ...] = ("torch", "onnxruntime", "numpy")
"""What predicts, the wanted one first; all give the same outputs up to rounding."""
LIGHT: tuple[Engine, ...] = ("onnxruntime", "numpy")
"""Where memory is short: torch takes 200 MiB."""
AT_ONCE = 64
"""Samples of one forward pass: their maps stay in the cache of a small processor."""

Forward = Callable[[Floats], Floats]
"""Inputs (n, *input_shape), n at most AT_ONCE, to logits (n, classes)."""


class Predictor:
    """Predicts with weights that do not change.

    Args:
        structure: of the network.
        data: what it was trained for.
        weights: shape (parameters,).
        engine: what computes; None: the first of `ENGINES` that is installed and knows the family.

    Attributes:
        engine: what computes.

    Raises:
        ConfigError: no such engine.
        MissingExtraError: it is not installed, or only torch knows the family.
        StructureError, NonFiniteError: the weights are not of this structure, or not finite.
    """

    def __init__(
        self, structure: Structure, data: DataContract, weights: Vector, engine: Engine | None = None
    ) -> None:
        require_length(weights, structure)
        require_finite(weights, structure.id)
        self._data = data
        self.engine = engine_for(structure.family) if engine is None else require_engine(engine)
        self._forward = _MAKERS[self.engine](structure, data, weights)

    def probabilities(self, x: Floats) -> Floats:
        """Return the class probabilities, shape (n, classes).

        Args:
            x: shape (n, *input_shape).

        Raises:
            DataError: `x` has another shape.
        """
        require_inputs(self._data, x)
        out = np.empty((len(x), self._data.classes), np.float32)
        for start in range(0, len(x), AT_ONCE):
            logits = self._forward(np.ascontiguousarray(x[start : start + AT_ONCE], np.float32))
            shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
            out[start : start + AT_ONCE] = shifted / shifted.sum(axis=1, keepdims=True)
        return out


def features_by(
    structure: Structure, data: DataContract, weights: Vector, engine: Engine | None = None
) -> Forward:
    """Return a function from inputs (n, *input_shape), n at most AT_ONCE, to what the last layer reads.

    Args:
        structure: of a built-in family.
        data: the job's contract.
        weights: shape (parameters,).
        engine: "onnxruntime" or "numpy"; None: the first of them that is installed.

    Raises:
        MissingExtraError: it is not installed.
    """
    if (engine or engine_for(structure.family, LIGHT)) == "onnxruntime":
        require_engine("onnxruntime")
        return _with_onnxruntime(structure, data, weights, to_features=True)
    return _with_numpy(structure, data, weights, to_features=True)


def engine_for(family: str, wanted: tuple[Engine, ...] = ENGINES) -> Engine:
    """Return the first engine that is installed and knows a family.

    Raises:
        MissingExtraError: only torch knows it, and it is not installed or not wanted.
    """
    for engine in wanted:
        if runtimes.installed(engine) and (engine == "torch" or family in FAMILIES):
            return engine
    raise MissingExtraError(
        f"the family {family} is not built in and needs torch: pip install 'liberatai[train]'"
    )


def require_engine(engine: Engine) -> Engine:
    """Return an engine that is installed; raise ConfigError or MissingExtraError otherwise."""
    if engine not in ENGINES:
        raise ConfigError("runtime", [f"{engine!r} is none of {', '.join(ENGINES)}"])
    if not runtimes.installed(engine):
        extra = {"torch": "train", "onnxruntime": "infer"}.get(engine, "")
        raise MissingExtraError(f"{engine} is not installed: pip install 'liberatai[{extra}]'")
    return engine


def _with_torch(structure: Structure, data: DataContract, weights: Vector) -> Forward:
    import torch

    from liberatai_core.learning._flat import flat_module, reproducible

    module = flat_module(structure, data, weights).module.eval()

    def forward(x: Floats) -> Floats:
        with reproducible(0), torch.no_grad():
            logits: Floats = module(torch.from_numpy(x)).numpy()
        return logits

    return forward


def _with_onnxruntime(
    structure: Structure, data: DataContract, weights: Vector, *, to_features: bool = False
) -> Forward:
    from liberatai_core.learning.export import session_of
    from liberatai_core.learning.onnx_graph import INPUT, OUTPUT, onnx_graph

    session = session_of(onnx_graph(structure, data, weights, to_features=to_features))

    def forward(x: Floats) -> Floats:
        logits: Floats = session.run([OUTPUT], {INPUT: x})[0]
        return logits

    return forward


def _with_numpy(
    structure: Structure, data: DataContract, weights: Vector, *, to_features: bool = False
) -> Forward:
    from liberatai_core.learning.kernels.network import network

    model = network(structure, data, weights, to_features=to_features)
    return lambda x: model.forward(x, training=False).T


_MAKERS: dict[Engine, Callable[[Structure, DataContract, Vector], Forward]] = {
    "torch": _with_torch,
    "onnxruntime": _with_onnxruntime,
    "numpy": _with_numpy,
}
