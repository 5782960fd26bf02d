"""What somebody most likely meant by a name that nothing has: said wherever a name is refused."""

from collections.abc import Iterable
from typing import Final

LONGEST: Final = 128
"""Characters of a name that are looked at."""
MANY: Final = 20_000
"""Names that are looked through: a tenth of a second."""
LIKE: Final = 0.6
"""How much of a name must be the same."""


def meant(name: str, known: Iterable[str]) -> str:
    """Return the known name that a misspelt one is most like, as it follows a message; "" if none is.

    Args:
        name: that nothing has.
        known: all names there are.
    """
    from difflib import get_close_matches  # noqa: PLC0415 - only who misspells needs it
    from itertools import islice  # noqa: PLC0415

    names = [one for one in islice(known, MANY) if one != name]
    found = get_close_matches(name[:LONGEST].lower(), names, n=1, cutoff=LIKE)
    if not found:  # PI4 for pi4, and what differs in nothing but its case
        folded = {one.lower(): one for one in names}
        found = [folded[one] for one in get_close_matches(name[:LONGEST].lower(), folded, n=1, cutoff=LIKE)]
    return f"; did you mean {found[0]}?" if found else ""
