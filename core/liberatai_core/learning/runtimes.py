"""What computes a network on this machine: torch, else onnxruntime (forward only), else numpy."""

from importlib.util import find_spec
from typing import Literal

from liberatai_core.errors import MissingExtraError
from liberatai_core.learning.families import FAMILIES

Runtime = Literal["torch", "numpy"]
"""What can train."""


def preferred(family: str) -> Runtime:
    """Return what trains a family here: torch where it is installed, else numpy.

    Raises:
        MissingExtraError: only torch knows the family, and it is not installed.
    """
    if installed("torch"):
        return "torch"
    if family in FAMILIES:
        return "numpy"
    raise MissingExtraError(
        f"the family {family} is not built in and needs torch: pip install 'liberatai[train]'"
    )


def installed(name: str) -> bool:
    """Whether a library is there, without importing it."""
    return find_spec(name) is not None
