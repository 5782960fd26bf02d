"""Versions: how updates become one, what it consists of, what is measured of it."""
