"""The command line `liberatai`: one file per noun."""

from liberatai_coordinator.cli.app import main

__all__ = ["main"]
