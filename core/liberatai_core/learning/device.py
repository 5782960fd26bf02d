"""Where models compute: the processor, unless the caller chose a graphics card.

Samples, their order and their changes are drawn on the processor in any case, so a seed means the same
batches everywhere; only what a network does with a batch happens on the device. Results are byte-identical
on the processor only: a card adds up in another order.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

from liberatai_core.errors import ConfigError
from liberatai_core.learning.families import require_torch

if TYPE_CHECKING:
    import torch

_CHOSEN: ContextVar[str] = ContextVar("device", default="cpu")


def chosen() -> "torch.device":
    """Return the device that new modules are made on."""
    import torch

    return torch.device(_CHOSEN.get())


@contextmanager
def computing_on(name: str) -> Iterator[None]:
    """Make everything in `learning` compute there, in this thread or task, until the block ends.

    Args:
        name: as torch names it: `cpu`, `cuda`, `cuda:1`.

    Raises:
        ConfigError: no such device, or torch cannot use it on this machine.
    """
    require_torch()
    import torch

    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        fault = f"torch cannot compute on {name!r} here ({reason}): take cpu"
        raise ConfigError("device", [fault]) from error
    before = _CHOSEN.set(name)
    try:
        yield
    finally:
        _CHOSEN.reset(before)
