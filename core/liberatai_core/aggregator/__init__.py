"""Aggregator: many unlike updates -> one result per structure -> one ensemble.

- `mean.py`: differences of one structure become their weighted mean; `server_optimizer.py` applies it.
- `ensemble.py`: predictions of unlike structures become one; `methods.py` lists how to find the weights.
- `guard.py`: the ensemble is never worse than its best member, as far as held-out labels can tell.
"""
