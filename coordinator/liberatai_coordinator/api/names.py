"""What a client most likely meant by a name that nothing has."""

import asyncio
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Final

from liberatai_core.errors import NotFoundError

LONGEST: Final = 128
"""Characters of a name that are looked at."""


async def not_found(error: NotFoundError, name: str, known: Sequence[str]) -> NotFoundError:
    """Return an error with the name that is most like the one that was asked for, if one is.

    Args:
        error: nothing has this name.
        name: that was asked for.
        known: all names; with thousands of them the search takes a while, so a thread does it.
    """
    close = await asyncio.to_thread(get_close_matches, name[:LONGEST], known, 1, 0.75)
    return NotFoundError(f"{error}; did you mean {close[0]}?") if close else error
