"""All members of an ensemble and how they answer together, as one ONNX file for other programs.

Every member is torch's own graph, as `export.py` writes it; the pool behind them is that of
`aggregator.ensemble`, in the operators of ONNX. The file is checked against both.
"""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from liberatai_core.aggregator.ensemble import FLOOR, TIE, Pool, normalised, pooled
from liberatai_core.errors import MissingExtraError, SchemaError, StructureError
from liberatai_core.learning.export import INPUT, OUTPUT, TOLERANCE, onnx_bytes, session_of
from liberatai_core.structure import DataContract, Structure
from liberatai_core.weights import Vector

CHECKED: Final = 64
"""Samples on which the file is compared with the members and the pool."""
NEAR: Final = 1e-3
"""Probabilities of a member this close may change places by rounding; a vote is not compared there."""


def ensemble_onnx(members: Sequence[tuple[Structure, Vector]], pool: Pool, data: DataContract) -> bytes:
    """Return a file with input "x" (n, *input_shape) and output "logits" (n, classes), any n.

    The output is the ensemble's log-probabilities: logits whose softmax is its answer.

    Args:
        members: structures and their weights, in the order of the pool's rows.
        pool: how they are combined.
        data: the job's contract.

    Raises:
        MissingExtraError: torch, onnx, onnxscript or onnxruntime is not installed.
        SchemaError: the pool has another number of members or classes.
        StructureError: weights of another structure, or the file computes something else.
        NonFiniteError: a weight is NaN or infinite.
    """
    try:
        import onnx
    except ImportError as error:
        raise MissingExtraError("onnx is not installed: pip install 'liberatai[coordinator]'") from error
    wanted = (len(members), data.classes)
    if pool.weights.shape != wanted:
        raise SchemaError(f"ensemble weights: shape {pool.weights.shape}, wanted {wanted}")
    files = [onnx_bytes(structure, data, weights) for structure, weights in members]
    graph = _Graph(onnx)
    said = [graph.member(number, file) for number, file in enumerate(files)]
    graph.node("LogSoftmax", [graph.pool(pool, said)], out=OUTPUT, axis=1)
    content = graph.content(data)
    _check(content, files, pool, data)
    return content


class _Graph:
    """Nodes and constants so far, of all members and of the pool."""

    def __init__(self, onnx: Any) -> None:
        self._onnx = onnx
        self._nodes: list[Any] = []
        self._constants: list[Any] = []
        self._opsets: dict[str, int] = {}
        self._version = 0

    def member(self, number: int, file: bytes) -> str:
        """Add a member's network; return the name of its logits."""
        model = self._onnx.load_model_from_string(file)
        if model.functions:
            raise StructureError("a member's ONNX graph has functions of its own: it cannot be put together")
        for one in model.opset_import:
            if self._opsets.setdefault(one.domain, one.version) != one.version:
                raise StructureError("the members' ONNX graphs are of unlike versions")
        self._version = max(self._version, model.ir_version)
        own = self._onnx.compose.add_prefix(model, f"member{number}.").graph
        (x,) = own.input
        for node in own.node:
            for place, name in enumerate(node.input):
                if name == x.name:
                    node.input[place] = INPUT
        self._nodes.extend(own.node)
        self._constants.extend(own.initializer)
        return str(own.output[0].name)

    def pool(self, pool: Pool, logits: Sequence[str]) -> str:
        """Add how members answer together; return the name of the scores, whose softmax is the answer."""
        parts = []
        for number, one in enumerate(logits):
            if pool.kind == "log":
                own = self.node("Max", [self.node("LogSoftmax", [one], axis=1), self.values(np.log(FLOOR))])
                if pool.log_priors is not None:
                    own = self.node("Sub", [own, self.values(pool.log_priors[number])])
            else:
                own = self.node("Softmax", [one], axis=1)
            if pool.kind == "vote":
                own = self.node("Add", [self._vote(own), self.node("Mul", [own, self.values(TIE)])])
            parts.append(self.node("Mul", [own, self.values(pool.weights[number])]))
        total = self.node("Sum", parts)
        if pool.kind != "log":
            return self.node("Log", [self.node("Max", [total, self.values(FLOOR)])])
        return total if pool.bias is None else self.node("Add", [total, self.values(pool.bias)])

    def _vote(self, probabilities: str) -> str:
        """Add one vote for what is most probable, the first of equals."""
        best = self.node("ArgMax", [probabilities], axis=1, keepdims=0)
        classes = self.node("Shape", [probabilities], start=1)
        return self.node("OneHot", [best, classes, self.values([0.0, 1.0])], axis=1)

    def node(self, operator: str, inputs: Sequence[str], *, out: str = "", **attributes: int) -> str:
        """Add a node; return the name of its output."""
        out = out or f"pool.v{len(self._nodes)}"
        self._nodes.append(self._onnx.helper.make_node(operator, inputs, [out], **attributes))
        return out

    def values(self, values: Any) -> str:
        """Add a constant of float32; return its name."""
        name = f"pool.c{len(self._constants)}"
        array: NDArray[np.float32] = np.asarray(values, dtype=np.float32)
        self._constants.append(self._onnx.numpy_helper.from_array(array, name))
        return name

    def content(self, data: DataContract) -> bytes:
        """Return the file."""
        helper, kind = self._onnx.helper, self._onnx.TensorProto.FLOAT
        graph = helper.make_graph(
            self._nodes,
            "ensemble",
            [helper.make_tensor_value_info(INPUT, kind, ["n", *data.input_shape])],
            [helper.make_tensor_value_info(OUTPUT, kind, ["n", data.classes])],
            self._constants,
        )
        opsets = [helper.make_opsetid(domain, version) for domain, version in sorted(self._opsets.items())]
        model = helper.make_model(graph, opset_imports=opsets, producer_name="")
        model.ir_version = self._version
        self._onnx.checker.check_model(model)
        written: bytes = model.SerializeToString(deterministic=True)
        return written


def _check(content: bytes, files: Sequence[bytes], pool: Pool, data: DataContract) -> None:
    """Raise StructureError unless the file answers what its members answer together."""
    x = np.random.default_rng(0).normal(size=(CHECKED, *data.input_shape)).astype(np.float32)
    alone = np.stack([normalised(session_of(file).run([OUTPUT], {INPUT: x})[0]) for file in files])
    sure = np.ones(len(x), bool)
    if pool.kind == "vote":
        best = np.sort(np.exp(alone), axis=-1)
        sure = (best[..., -1] - best[..., -2] > NEAR).all(axis=0)
    session = session_of(content)
    for rows in (sure, np.flatnonzero(sure)[:1]):
        if not len(x[rows]):
            continue
        (found,) = session.run([OUTPUT], {INPUT: x[rows]})
        wanted = pooled(pool, alone[:, rows])
        if not np.allclose(np.exp(found), np.exp(wanted), rtol=TOLERANCE, atol=TOLERANCE):
            worst = float(np.abs(np.exp(found) - np.exp(wanted)).max())
            raise StructureError(f"the ONNX file's answers differ from the ensemble's by {worst:g}")
