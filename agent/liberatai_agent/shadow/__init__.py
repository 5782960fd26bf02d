"""What the fleet wishes this device to be like, and what it is like."""
