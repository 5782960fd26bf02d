"""HTTP on a Unix socket: what a client may ask, and how every value is shown."""
