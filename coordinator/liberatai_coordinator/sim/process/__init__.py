"""Devices as child processes behind links of their own: no containers, no privileges."""
