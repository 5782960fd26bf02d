"""The agent: a light program on every device."""
