"""One line in the ledger per change that is asked for, whoever asks: no route can forget it."""

import logging
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import unquote

import msgspec

from liberatai_coordinator import clock
from liberatai_coordinator.client.wire import Problem
from liberatai_coordinator.store.rows import AuditRow
from liberatai_core.errors import LiberataiError

log = logging.getLogger(__name__)

ACTOR: Final = "liberatai.actor"
"""Where a listener notes in a request's scope who asks."""
READS: Final = frozenset({"/v1/plan", "/v1/jobs/check"})
"""Changes nothing although it has a body."""
MAX_DETAIL: Final = 300
"""Characters of a request's body that are kept."""
MAX_ANSWER: Final = 65_536

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Actor:
    """Who asks: the name of a token and its role, or whoever may use the Unix socket."""

    name: str = "local"
    role: str = "admin"


class Audited:
    """Notes every change before it is answered.

    Args:
        app: that answers.
        note: writes an entry down.
    """

    def __init__(self, app: App, note: Callable[[AuditRow], Awaitable[None]]) -> None:
        self._app, self._note = app, note

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Answer a request."""
        asks = scope["type"] != "http" or scope["method"] in ("GET", "HEAD") or scope["path"] in READS
        if asks:
            await self._app(scope, receive, send)
            return
        said, answer, kept = bytearray(), bytearray(), list[Message]()

        async def hear() -> Message:
            message = await receive()
            said.extend(message.get("body", b"")[: 4 * MAX_DETAIL])
            return message

        async def keep(message: Message) -> None:
            kept.append(message)
            if len(answer) < MAX_ANSWER:
                answer.extend(message.get("body", b""))

        await self._app(scope, hear, keep)
        await self._write(scope, bytes(said), kept, bytes(answer))
        for message in kept:
            await send(message)

    async def _write(
        self, scope: MutableMapping[str, Any], said: bytes, kept: list[Message], answer: bytes
    ) -> None:
        status = next((one["status"] for one in kept if one["type"] == "http.response.start"), 500)
        actor: Actor = scope.get(ACTOR, Actor())
        action, target = action_of(scope["method"], scope["path"])
        entry = AuditRow(
            at_s=clock.wall(),
            actor=actor.name,
            role=actor.role,
            action=action,
            target=target or _made(answer),
            code=_code(status, answer),
            detail=_detail(said),
        )
        try:
            await self._note(entry)
        except LiberataiError as error:
            # What was done is done, and the log has the line.
            words = f"{entry.actor}: {entry.action} {entry.target}"
            log.error("a change could not be noted (%s): %s %s", words, error.code, error)  # noqa: TRY400


def action_of(method: str, path: str) -> tuple[str, str]:
    """Return noun and verb of a request, and what it is about: ("devices drain", "gateway-01")."""
    noun, *rest = [unquote(part) for part in path.removeprefix("/v1/").split("/")]
    if not rest:
        return f"{noun} {'delete' if method == 'DELETE' else 'create'}", ""
    if method == "DELETE":
        return f"{noun} delete", "/".join(rest)
    if len(rest) == 1:
        return f"{noun} change", rest[0]
    return f"{noun} {rest[-1]}", "/".join(rest[:-1])


def _code(status: int, answer: bytes) -> str:
    if status < 400:
        return ""
    try:
        return msgspec.json.decode(answer, type=Problem).code
    except msgspec.MsgspecError:
        return f"HTTP {status}"


def _made(answer: bytes) -> str:
    """Return the name of what was made, as its view tells it."""
    try:
        view = msgspec.json.decode(answer)
    except msgspec.MsgspecError:
        return ""
    name = view.get("name") or view.get("id") if isinstance(view, dict) else None
    return name if isinstance(name, str) else ""


def _detail(said: bytes) -> str:
    try:
        text = " ".join(said.decode().split())
    except UnicodeDecodeError:
        return f"{len(said)} bytes"
    shown = text if len(text) <= MAX_DETAIL else f"{text[:MAX_DETAIL]}…"
    return "" if shown == "{}" else "".join(c if c.isprintable() else "?" for c in shown)
