"""Families that others install: found by entry point, built, and looked over before anything rests on them.

Whatever such a package does (it raises, exits, prints, returns something else), the answer is a
StructureError that names family and layer; a family that passes works: its parameters are all there is to a
model, and one step of training on the processor goes through.
"""

import contextlib
import re
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from liberatai_core.errors import LiberataiError, StructureError
from liberatai_core.learning.families.torch_state import TORCH_STATE
from liberatai_core.structure import DataContract, Parameter, Structure

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    import torch

GROUP = "liberatai.families"
NAME = re.compile(r"[a-z0-9_]{1,32}")
TRIAL_SAMPLES = 2
"""Norms over a batch need two."""


def names() -> list[str]:
    """Return the names of installed families that can stand in a structure."""
    return sorted({point.name for point in _points() if NAME.fullmatch(point.name)})


def _points() -> "list[EntryPoint]":
    from importlib.metadata import entry_points  # brings email and more, which a small device can do without

    with contextlib.suppress(Exception):  # of any installed package, however broken
        return list(entry_points(group=GROUP))
    return []


def find(family: str) -> Any:
    """Return the builder of an installed family, None if there is none.

    Raises:
        StructureError: it cannot be imported, or is no function.
    """
    point = next((point for point in _points() if point.name == family), None)
    if point is None:
        return None
    with blamed(f"{family}: cannot be imported from {point.value}"):
        found = point.load()
    if not callable(found):
        raise StructureError(f"{family}: {point.value} is no function that builds a module")
    return found


@contextlib.contextmanager
def blamed(what: str) -> Iterator[None]:
    """Turn whatever somebody else's code raises into a StructureError; what it prints goes to stderr."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except (LiberataiError, MemoryError, KeyboardInterrupt):
        raise
    except (Exception, SystemExit) as error:
        text = " ".join(str(error).split())[:300]
        raise StructureError(f"{what}: {type(error).__name__}: {text}") from error


def built(
    family: str, build: Any, params: Mapping[str, Parameter], data: DataContract, device: str
) -> "torch.nn.Module":
    """Return a new module of an installed family; on device "meta" if that works, else with values.

    Raises:
        StructureError: it cannot be built, or is not what a family must be.
    """
    import torch

    module: Any = None
    if device == "meta":
        # Builders may compute with values, which nothing on that device has.
        with contextlib.suppress(Exception, SystemExit), torch.device("meta"), _quiet():
            module = build(params, data)
    if module is None:
        with blamed(f"{family} cannot be built with {dict(params)}"), torch.device(_real(device)):
            module = build(params, data)
    return require_module(family, module)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with contextlib.redirect_stdout(sys.stderr):
        yield


def _real(device: str) -> str:
    return "cpu" if device == "meta" else device


def require_module(family: str, module: Any) -> "torch.nn.Module":
    """Return the module; raise StructureError unless it keeps parameters only, each one once, in float32."""
    import torch

    if not isinstance(module, torch.nn.Module):
        raise StructureError(
            f"{family}: its builder returned {type(module).__name__}, wanted a torch.nn.Module"
        )
    with blamed(f"{family}: its parameters cannot be listed"):
        state = module.state_dict()
        parameters = dict(module.named_parameters(remove_duplicate=False))
        own = {id(parameter): name for name, parameter in reversed(list(parameters.items()))}
    if not parameters:
        raise StructureError(f"{family}: its module has no parameters")
    for name, parameter in parameters.items():
        if isinstance(parameter, torch.nn.parameter.UninitializedParameter):
            raise StructureError(
                f"{family}: {name} has no shape before the first batch: give its layer its sizes"
            )
        if own[id(parameter)] != name:
            raise StructureError(f"{family}: {name} and {own[id(parameter)]} are one tensor: tied weights")
        if parameter.dtype != torch.float32:
            raise StructureError(f"{family}: {name} is {parameter.dtype}, wanted torch.float32")
        if name not in state:
            raise StructureError(f"{family}: {name} does not stand in the module's state")
    for name in state:
        if name not in parameters:
            raise StructureError(f"{family}: {name} is no parameter: running statistics do not federate")
    return module


def require_sound(structure: Structure) -> Structure:
    """Return the structure if a message can hold it; raise StructureError otherwise."""
    try:
        return msgspec.convert(msgspec.to_builtins(structure), Structure)
    except (msgspec.ValidationError, StructureError) as error:
        raise StructureError(f"{structure.family}: {error}") from None


def require_trainable(structure: Structure, module: "torch.nn.Module", data: DataContract) -> None:
    """Raise StructureError, with the layer, unless a step of training goes through with two samples of zeros.

    Args:
        structure: of the module.
        module: with values.
        data: the job's contract.
    """
    import torch

    entered: list[str] = []

    def enter(name: str) -> Any:
        return lambda *_: entered.append(name)

    for name, layer in module.named_modules():
        layer.register_forward_pre_hook(enter(name or "the module"))
    batch = torch.zeros((TRIAL_SAMPLES, *data.input_shape))
    try:
        with blamed(structure.id), TORCH_STATE, torch.random.fork_rng(devices=[]):
            for training in (True, False):
                module.train(training)
                logits = module(batch)
                _require_logits(structure, logits, data)
            labels = torch.zeros(TRIAL_SAMPLES, dtype=torch.int64)
            torch.autograd.backward(torch.nn.functional.cross_entropy(logits, labels))
    except StructureError as error:
        at = f" (at layer {entered[-1]})" if entered else ""
        raise StructureError(f"{error}{at}") from error


def _require_logits(structure: Structure, logits: Any, data: DataContract) -> None:
    import torch

    wanted = (TRIAL_SAMPLES, data.classes)
    if not isinstance(logits, torch.Tensor):
        raise StructureError(
            f"{structure.id}: its module returned {type(logits).__name__}, wanted logits {wanted}"
        )
    if tuple(logits.shape) != wanted or not logits.is_floating_point():
        raise StructureError(
            f"{structure.id}: its module returned {tuple(logits.shape)}, wanted logits {wanted}"
        )


def sizes(output: Any) -> int:
    """Return the numbers in what a layer returned: a tensor, or tensors in tuples and the like."""
    import torch

    if isinstance(output, torch.Tensor):
        return output.numel()
    if isinstance(output, Mapping):
        return sum(map(sizes, output.values()))
    if isinstance(output, tuple | list):
        return sum(map(sizes, output))
    return 0
