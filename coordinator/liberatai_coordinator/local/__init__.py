"""A whole fleet on one machine, for the demo, the tests and a user's first steps."""

from liberatai_coordinator.local.files import LocalDevice
from liberatai_coordinator.local.fleet import LocalFleet
from liberatai_coordinator.local.training import Result, run, wait

__all__ = ["LocalDevice", "LocalFleet", "Result", "run", "wait"]
