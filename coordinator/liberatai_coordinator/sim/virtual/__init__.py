"""Thousands of devices in one process, whose time is virtual: link, clock and training are replaced."""
