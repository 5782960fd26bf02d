"""Import paho without what it never uses here.

paho imports `urllib.request`, and with it an HTTP client and the e-mail parser (1.6 MiB of resident memory),
to read proxy settings; it looks at them only if PySocks is installed. On a device of 512 MB that memory
counts, so without PySocks paho gets an empty module in that place. Everybody else still gets the real one.
"""

import importlib.util
import sys
import types
import urllib
from collections.abc import Iterator
from contextlib import contextmanager

_NAME = "urllib.request"


@contextmanager
def without_proxies() -> Iterator[None]:
    """Let `import urllib.request` find an empty module inside this block, if PySocks is not installed."""
    if _NAME in sys.modules or importlib.util.find_spec("socks") is not None:
        yield
        return
    sys.modules[_NAME] = types.ModuleType(_NAME)
    try:
        yield
    finally:
        del sys.modules[_NAME]
        if hasattr(urllib, "request"):
            del urllib.request


with without_proxies():
    import paho.mqtt.client  # noqa: F401 - loaded here, so that `client.py` finds it loaded
