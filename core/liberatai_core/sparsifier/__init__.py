"""Sparse updates, both ends.

- `top_k.py` (default) chooses what is worth sending and keeps the rest; `codec.py` has the bytes.
- `methods.py` lists it and the baselines by name: `dense.py`, `quantile.py`, `random_k.py`, `ternary.py`,
  and `small.py`, which sends small tensors whole.
- `support.py`: coordinates that the coordinator names, so that all updates of a round have one support.
- `merge.py`: several deltas as one. `schedule.py`: density of the rounds, worth of an old residual.
"""
