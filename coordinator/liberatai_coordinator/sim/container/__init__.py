"""Devices in containers, driven by the command line of podman or docker."""
