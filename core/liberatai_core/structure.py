"""A structure is data: a family, its parameters, and the named tensors they fix.

The flat weight vector (`weights.py`) is the concatenation of the tensors in the order given here,
each in C order. A structure travels inside messages, so an agent without torch knows every slice.

Importing this module (and with it the messages) does not import numpy: an agent that waits for a task
stays small. Only the functions that touch arrays do.
"""

import math
import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec

from liberatai_core.errors import StructureError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from liberatai_core.weights import Vector

MAX_TENSORS = 4096
"""ResNet-152 has 467 tensors; ten times that is still cheap to check."""
MAX_PARAMETERS = 1 << 28
"""1 GiB of float32: far above any model of an edge device, far below an overflow."""

MAX_INPUT = 1 << 24
"""Values of one sample: a minute of 48 kHz sound has 2.9 million, a 2048 x 2048 colour image 12.6 million."""
MAX_RANK = 8
"""Axes of one tensor: a 3-D convolution has 5."""
MAX_PARAMS = 16
"""Parameters of a family; built-in ones have at most 4."""
MAX_ID = 128
"""Characters of a structure's name, which stands in updates and file names."""

Parameter = int | float | str | bool

_PARAM_NAME = re.compile(r"[a-z][a-z0-9_]{0,31}")


class DataContract(msgspec.Struct, frozen=True, forbid_unknown_fields=True, gc=False):
    """What every device's data must look like: inputs of one shape, labels 0 … classes-1.

    Attributes:
        input_shape: shape of one sample without the batch axis, channel first, e.g. (1, 8, 8).
        classes: number of labels.
    """

    input_shape: Annotated[
        tuple[Annotated[int, msgspec.Meta(ge=1, le=MAX_INPUT)], ...], msgspec.Meta(min_length=1, max_length=4)
    ]
    classes: Annotated[int, msgspec.Meta(ge=2, le=65536)]

    def __post_init__(self) -> None:
        """Refuse a sample that is too large together."""
        if math.prod(self.input_shape) > MAX_INPUT:
            raise StructureError(f"input_shape {self.input_shape}: more than {MAX_INPUT} values per sample")


Fit = Literal["same", "add axis", "drop axis", "channels first", "flatten"]


def fitting(shape: tuple[int, ...], wanted: tuple[int, ...]) -> Fit | None:
    """Return how samples of one shape are brought to another with their values as they are, None: not at all.

    Only where it is a matter of an axis of length 1 in front, of channels that stand last, or of a job that
    wants its inputs flat. Who plans and who loads ask the same function.
    """
    if shape == wanted:
        return "same"
    if (1, *shape) == wanted:
        return "add axis"
    if shape == (1, *wanted):
        return "drop axis"
    # Square shapes are ambiguous only where the tests above have already answered.
    if len(shape) > 1 and (shape[-1], *shape[:-1]) == wanted:
        return "channels first"
    if len(wanted) == 1 and math.prod(shape) == wanted[0]:
        return "flatten"
    return None


class Tensor(msgspec.Struct, frozen=True, forbid_unknown_fields=True, gc=False):
    """One named tensor: `shape` in the framework's order, e.g. (out, in, height, width)."""

    name: Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
    shape: Annotated[tuple[int, ...], msgspec.Meta(max_length=MAX_RANK)]

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


class Structure(msgspec.Struct, frozen=True, forbid_unknown_fields=True, dict=True):
    """A family with its parameters fixed, and the tensors that follow from them.

    Attributes:
        family: registered name, e.g. "cnn".
        params: what the family's builder was given, e.g. {"width": 16}.
        tensors: names and shapes in the order of the flat vector.
    """

    family: Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9_]{1,32}\Z")]
    params: dict[str, Parameter]
    tensors: Annotated[tuple[Tensor, ...], msgspec.Meta(min_length=1, max_length=MAX_TENSORS)]

    def __post_init__(self) -> None:
        """Refuse shapes that are empty, negative or too large together, and parameters that name no file."""
        self._check_params()
        total = 0
        for tensor in self.tensors:
            if len(tensor.shape) > MAX_RANK or any(not 0 < side <= MAX_PARAMETERS for side in tensor.shape):
                raise StructureError(f"{tensor.name}: impossible shape {tensor.shape}")
            total += tensor.size
        if total > MAX_PARAMETERS:
            raise StructureError(f"{self.family}: {total} parameters, at most {MAX_PARAMETERS}")
        if len({tensor.name for tensor in self.tensors}) != len(self.tensors):
            raise StructureError(f"{self.family}: two tensors have one name")

    def _check_params(self) -> None:
        if len(self.params) > MAX_PARAMS:
            raise StructureError(f"{self.family}: {len(self.params)} parameters, at most {MAX_PARAMS}")
        for name, value in self.params.items():
            if not _PARAM_NAME.fullmatch(name):
                raise StructureError(f"{self.family}: impossible parameter {name[:64]!r}")
            if isinstance(value, float) and not math.isfinite(value):
                raise StructureError(f"{self.family}: parameter {name} must be finite")
        if len(self.id) > MAX_ID:
            raise StructureError(f"{self.family}: name of {len(self.id)} characters, at most {MAX_ID}")

    @property
    def id(self) -> str:
        """Readable name, unique inside a job: family and parameters, e.g. "cnn-width16"."""
        return structure_id(self.family, self.params)

    @cached_property
    def parameters(self) -> int:
        """Number of values of the flat vector: every update asks for it."""
        return sum(tensor.size for tensor in self.tensors)

    def slices(self) -> Iterator[tuple[Tensor, slice]]:
        """Yield every tensor with its place in the flat vector."""
        start = 0
        for tensor in self.tensors:
            yield tensor, slice(start, start + tensor.size)
            start += tensor.size


def structure_id(family: str, params: Mapping[str, Parameter]) -> str:
    """Return the readable name of a family with these parameters, e.g. "mlp-hidden64"."""
    parts = [f"{key}{_slug(value)}" for key, value in sorted(params.items())]
    return "-".join([family, *parts])


def _slug(value: Parameter) -> str:
    text = str(int(value)) if isinstance(value, bool) else str(value)
    return "".join(c if c.isascii() and c.isalnum() else "_" for c in text.lower())


TRAIN, HEAD = "train", "head"
"""The parameter, and its value, of structures whose last layer alone is trained: {"train": "head"}."""


def trains_head(structure: Structure) -> bool:
    """Whether only the last layer of a structure is trained, on a frozen backbone."""
    return structure.params.get(TRAIN) == HEAD


def head_tensors(structure: Structure) -> tuple[Tensor, ...]:
    """Return the tensors of the last layer, which built-in families call "head".

    Raises:
        StructureError: there are none.
    """
    found = tuple(tensor for tensor in structure.tensors if tensor.name.startswith(f"{HEAD}."))
    if not found:
        raise StructureError(f"{structure.id}: no layer is called {HEAD}: it cannot be trained alone")
    return found


def head_places(structure: Structure) -> slice:
    """Return where the last layer lies in the flat vector: at its end.

    Raises:
        StructureError: there is no such layer, or others come behind it.
    """
    size = sum(tensor.size for tensor in head_tensors(structure))
    if structure.tensors[-len(head_tensors(structure)) :] != head_tensors(structure):
        raise StructureError(f"{structure.id}: its head is not its end")
    return slice(structure.parameters - size, structure.parameters)


def to_tensors(weights: "Vector", structure: Structure) -> "dict[str, NDArray[np.float32]]":
    """Return views into `weights`, one per tensor, in its shape.

    Raises:
        StructureError: the vector has another length than the structure.
    """
    require_length(weights, structure)
    return {tensor.name: weights[place].reshape(tensor.shape) for tensor, place in structure.slices()}


def from_tensors(tensors: "Mapping[str, NDArray[np.float32]]", structure: Structure) -> "Vector":
    """Return the flat float32 vector of these named tensors.

    Raises:
        StructureError: a tensor is missing or has another shape.
    """
    import numpy as np

    flat = np.empty(structure.parameters, dtype=np.float32)
    for tensor, place in structure.slices():
        if tensor.name not in tensors or tuple(tensors[tensor.name].shape) != tensor.shape:
            raise StructureError(f"{structure.id}: tensor {tensor.name} missing or not {tensor.shape}")
        flat[place] = np.asarray(tensors[tensor.name], dtype=np.float32).ravel()
    return flat


def require_length(weights: "Vector", structure: Structure) -> None:
    """Raise StructureError unless `weights` is a flat vector of this structure."""
    if weights.shape != (structure.parameters,):
        raise StructureError(f"{structure.id}: shape {weights.shape}, wanted ({structure.parameters},)")
