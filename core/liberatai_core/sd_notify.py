"""What a service tells its manager: ready, alive, stopping, and how it is (systemd's sd_notify).

One datagram to the socket that NOTIFY_SOCKET names; without one nothing happens. See sd_notify(3).
"""

import contextlib
import os
import socket

LONGEST_PAUSE_S = 20.0
"""Between two signs of life where the manager asks for none."""


def notify(*lines: str) -> None:
    """Tell the service manager, if it asked: e.g. `READY=1`, `WATCHDOG=1`, `STATUS=…`; never raises."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as client:
        client.setblocking(False)
        client.connect("\0" + address[1:] if address.startswith("@") else address)
        client.sendall("\n".join(" ".join(line.split()) for line in lines).encode())


def pause_s() -> float:
    """Return how often the manager wants a sign of life: twice in its patience (WATCHDOG_USEC)."""
    asked = os.environ.get("WATCHDOG_USEC", "")
    if not asked.isdigit() or not int(asked):
        return LONGEST_PAUSE_S
    return max(0.1, min(LONGEST_PAUSE_S, int(asked) / 2e6))
