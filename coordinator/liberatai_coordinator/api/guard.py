"""The door of the API for other machines: a token says who asks, its role says what that may do."""

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final

import msgspec

from liberatai_coordinator.api.auditing import ACTOR, READS, Actor, App, Receive, Send
from liberatai_coordinator.client.wire import Problem

WRONG_S: Final = 0.5
"""Before a wrong token is answered."""
ADMIN: Final = ("/v1/tokens", "/v1/audit")
"""Only admins may see and change who may do what."""
ONLY_ADMIN: Final = ("decommission", "rekey")
"""Verbs that cannot be undone."""


class Guard:
    """Lets in who has a token, to what its role may do.

    Args:
        app: that answers.
        who: returns who has a token; None: nobody.
    """

    def __init__(self, app: App, who: Callable[[str], Awaitable[Actor | None]]) -> None:
        self._app, self._who = app, who

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            return
        actor = await self._who(_bearer(scope))
        if actor is None:
            await asyncio.sleep(WRONG_S)
            await _refuse(send, 401, "E_TOKEN", "no token, a wrong one, or one that has ended")
        elif not may(actor.role, scope["method"], scope["path"]):
            words = f"{actor.name} is {actor.role}: may not {scope['method']} {scope['path']}"
            await _refuse(send, 403, "E_ROLE", words)
        else:
            scope[ACTOR] = actor
            await self._app(scope, receive, send)


def may(role: str, method: str, path: str) -> bool:
    """Whether a role may do something: viewers look, operators run the fleet, admins decide who may."""
    if path.startswith(ADMIN) or path.rsplit("/", 1)[-1] in ONLY_ADMIN:
        return role == "admin"
    if method in ("GET", "HEAD") or path in READS:
        return role in ("viewer", "operator", "admin")
    return role in ("operator", "admin")


def _bearer(scope: MutableMapping[str, Any]) -> str:
    for name, value in scope["headers"]:
        if name == b"authorization" and value[:7].lower() == b"bearer ":
            return str(value[7:].decode("latin-1")).strip()
    return ""


async def _refuse(send: Send, status: int, code: str, words: str) -> None:
    body = msgspec.json.encode(Problem(code=code, message=words))
    headers = [(b"content-type", b"application/json"), (b"www-authenticate", b"Bearer")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
