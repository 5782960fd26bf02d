"""How much one device may say: a bucket of words each, that fills up again. Pure: time is an argument.

A flood costs a look into a table, before anything of it is verified. Parts of uploads have bounds of their
own (credits), and are not counted here.
"""

from dataclasses import dataclass, field

from liberatai_core.contract.topics import Place
from liberatai_core.errors import QuotaError

AT_ONCE = 500.0
"""After a restart a device says all it has again; a coordinator hears what the broker kept of it."""
PER_S = 20.0
"""An agent says one word in some seconds; a whole round of small updates is one word."""
MAX_BUCKETS = 100_000
"""As many devices as there may be; names that the broker lets through are bounded by its certificates."""


@dataclass(slots=True)
class Flow:
    """Buckets by the name in the topic, which the broker vouches for."""

    _buckets: dict[str, tuple[float, float]] = field(default_factory=dict)

    def may(self, name: str, now_s: float) -> bool:
        """Whether a device may say one more word now."""
        left, before_s = self._buckets.get(name, (AT_ONCE, now_s))
        left = min(AT_ONCE, left + (now_s - before_s) * PER_S)
        if name not in self._buckets and len(self._buckets) >= MAX_BUCKETS:
            self._buckets.pop(next(iter(self._buckets)))
        self._buckets[name] = (left - 1.0 if left >= 1.0 else left, now_s)
        return left >= 1.0

    def require_calm(self, place: Place, now_s: float, *, retained: bool) -> None:
        """Refuse a flood before anything of it is looked at; parts of uploads have bounds of their own.

        Args:
            place: what the topic says.
            now_s: as in `may`.
            retained: the broker had it in store.

        Raises:
            QuotaError: the device says too much.
        """
        counted = place.side == "up" and place.part is None and not retained
        if counted and not self.may(place.owner, now_s):
            raise QuotaError(f"{place.owner} says more than a device has to say")
