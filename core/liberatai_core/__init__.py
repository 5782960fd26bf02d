"""What agent and coordinator must agree on."""

__version__ = "0.1.0"
