"""The lock around what torch keeps for the whole process: its random state and its settings.

Two jobs of one coordinator work in two threads. Without it one seeds the generator while the other draws from
it, and the same job gets other weights.
"""

import threading
from typing import Final

TORCH_STATE: Final = threading.RLock()
