"""Sparse updates: `top_k` (default) and `quantile` (baseline) choose, `codec` writes and reads the bytes."""
