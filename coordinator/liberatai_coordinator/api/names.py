"""What a client most likely meant by a name that nothing has."""

import asyncio
from collections.abc import Sequence

from liberatai_core.errors import NotFoundError
from liberatai_core.spelling import meant


async def not_found(error: NotFoundError, name: str, known: Sequence[str]) -> NotFoundError:
    """Return an error with the name that is most like the one that was asked for, if one is.

    Args:
        error: nothing has this name.
        name: that was asked for.
        known: all names; with thousands of them the search takes a while, so a thread does it.
    """
    return NotFoundError(f"{error}{await asyncio.to_thread(meant, name, known)}")
