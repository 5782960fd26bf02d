"""The demo: eight unlike devices on this machine."""
