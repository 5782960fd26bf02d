"""A client of OCI distribution 1.1: manifests whole, blobs in pieces, in bounded memory, resumed after cuts.

Uploads: POST, then PATCH for each piece, then PUT; what the registry has of an upload is asked after a cut. A
registry that refuses pieces gets the blob in one PUT. Downloads go on with `Range`. Blobs are checked against
their digest by the caller's store; manifests here.
"""

import base64
import re
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import BinaryIO, Final, Protocol, Self, TypeVar
from urllib.parse import urlencode, urljoin, urlsplit

import httpx

from liberatai_coordinator.repository.descriptors import (
    INDEX,
    MANIFEST,
    MAX_JSON_BYTES,
    OTHER_INDEX,
    OTHER_MANIFEST,
    Descriptor,
    digest_of,
)
from liberatai_coordinator.repository.remote.credentials import Login, login_for
from liberatai_core.errors import DigestError, NotFoundError, RegistryError, TooLargeError

PIECE_BYTES: Final = 1024 * 1024
"""Of an upload: what a cut costs at most."""
READ_BYTES: Final = 256 * 1024
SENT_BYTES: Final = 64 * 1024
TRIES: Final = 6
"""In a row without progress."""
TIMEOUT: Final = httpx.Timeout(60.0, connect=15.0)
_ACCEPT: Final = f"{INDEX}, {MANIFEST}, {OTHER_INDEX}, {OTHER_MANIFEST}"
_CHALLENGE: Final = re.compile(r'(\w+)="([^"]*)"')
_RANGE: Final = re.compile(r"(?:bytes=)?0-([0-9]{1,19})")
_LOOPBACK: Final = frozenset({"localhost", "127.0.0.1", "[::1]", "::1"})


Result = TypeVar("Result")


class Uploads(Protocol):
    """Remembers where uploads stand, over restarts of the program."""

    def get(self, key: str) -> str | None:
        """Return the address of an upload that was begun."""

    def set(self, key: str, location: str | None) -> None:
        """Note the address of an upload; None: it is over."""


class Registry:
    """One repository at one registry. Use it as a context manager."""

    def __init__(
        self,
        host: str,
        name: str,
        *,
        plain: bool | None = None,
        login: Callable[[str, str], Login | None] = login_for,
        transport: httpx.BaseTransport | None = None,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        """Talk to a registry.

        Args:
            host: name and perhaps port.
            name: of the repository there.
            plain: http instead of https; None: for this machine only.
            login: finds user and password when the registry asks for them.
            transport: instead of the network, for tests.
            pause: waits between two tries.
        """
        self.host, self.name = host, name
        bare = host.rpartition(":")[0] if re.search(r":[0-9]+$", host) else host
        http = bare in _LOOPBACK if plain is None else plain
        address = "registry-1.docker.io" if host == "docker.io" else host
        self._base = f"{'http' if http else 'https'}://{address}"
        self._login = login
        self._client = httpx.Client(timeout=TIMEOUT, follow_redirects=True, transport=transport)
        self._authorization: dict[str, str] = {}
        self._pause = pause
        self.sent_bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_reason: object) -> None:
        self._client.close()

    # --- manifests -----------------------------------------------------------------------------------

    def manifest(self, reference: str) -> tuple[bytes, str]:
        """Return a manifest by tag or digest, and its media type.

        Raises:
            NotFoundError: there is none. DigestError: another one came.
            TooLargeError, RegistryError: too long, or the registry refuses.
        """
        path = f"/v2/{self.name}/manifests/{reference}"

        def get() -> tuple[bytes, str] | None:
            with self._stream("GET", path, headers={"Accept": _ACCEPT}) as answer:
                if answer.status_code == httpx.codes.NOT_FOUND:
                    return None
                self._require(answer, "manifest")
                content = bytearray()
                for part in answer.iter_bytes(READ_BYTES):
                    content += part
                    if len(content) > MAX_JSON_BYTES:
                        raise TooLargeError(f"{self._told(reference)}: more than {MAX_JSON_BYTES} bytes")
                return bytes(content), answer.headers.get("Content-Type", "").partition(";")[0].strip()

        found = self._tried(get)
        if found is None:
            raise NotFoundError(f"{self._told(reference)}: no such manifest there")
        content, media_type = found
        if reference.startswith("sha256:") and digest_of(content) != reference:
            raise DigestError(f"{self._told(reference)}: the registry sent something else")
        return content, media_type

    def has_manifest(self, reference: str) -> str | None:
        """Return the digest of a manifest; None if there is none."""

        def head() -> str | None:
            answer = self._request(
                "HEAD", f"/v2/{self.name}/manifests/{reference}", headers={"Accept": _ACCEPT}
            )
            if answer.status_code == httpx.codes.NOT_FOUND:
                return None
            self._require(answer, "manifest")
            told: str = answer.headers.get("Docker-Content-Digest", "")
            return told

        digest = self._tried(head)
        if digest == "":
            return digest_of(self.manifest(reference)[0])
        return digest

    def put_manifest(self, reference: str, content: bytes, media_type: str) -> None:
        """Store a manifest under a tag or its digest; the registry must have what it names.

        Raises:
            RegistryError: it refuses.
        """

        def put() -> None:
            answer = self._request(
                "PUT",
                f"/v2/{self.name}/manifests/{reference}",
                headers={"Content-Type": media_type},
                content=content,
            )
            self._require(answer, "storing the manifest")
            self.sent_bytes += len(content)

        self._tried(put)

    # --- blobs ---------------------------------------------------------------------------------------

    def has_blob(self, digest: str) -> bool:
        """Whether the registry has a blob."""

        def head() -> bool:
            answer = self._request("HEAD", f"/v2/{self.name}/blobs/{digest}")
            if answer.status_code == httpx.codes.NOT_FOUND:
                return False
            self._require(answer, "blob")
            return True

        return self._tried(head)

    def pull_blob(self, wanted: Descriptor, offset: int) -> Iterator[bytes]:
        """Yield the bytes of a blob from `offset` on, over cuts; what comes is not verified here.

        Raises:
            NotFoundError: there is none. TooLargeError: longer than it says. RegistryError: out of reach.
        """
        failures = 0
        while offset < wanted.size or wanted.size == 0:
            before = offset
            try:
                for part in self._part(wanted, offset):
                    offset += len(part)
                    if offset > wanted.size:
                        raise TooLargeError(
                            f"{self._told(wanted.digest)}: longer than its {wanted.size} bytes"
                        )
                    yield part
                if offset == wanted.size:
                    return
                raise httpx.ReadError("cut short")
            except httpx.TransportError as error:
                failures = 0 if offset > before else failures + 1
                self._wait(failures, error)

    def _part(self, wanted: Descriptor, offset: int) -> Iterator[bytes]:
        headers = {"Range": f"bytes={offset}-{wanted.size - 1}"} if offset else {}
        with self._stream("GET", f"/v2/{self.name}/blobs/{wanted.digest}", headers=headers) as answer:
            if answer.status_code == httpx.codes.NOT_FOUND:
                raise NotFoundError(f"{self._told(wanted.digest)}: no such blob there")
            if answer.status_code >= httpx.codes.INTERNAL_SERVER_ERROR:
                raise httpx.ReadError(f"status {answer.status_code}")
            self._require(answer, "blob")
            skip = offset if answer.status_code == httpx.codes.OK else 0  # it does not know ranges
            for content in answer.iter_raw(READ_BYTES):
                part = content[skip:] if skip < len(content) else b""
                skip = max(0, skip - len(content))
                if part:
                    yield part

    def push_blob(
        self,
        wanted: Descriptor,
        opened: Callable[[], BinaryIO],
        uploads: Uploads,
        progress: Callable[[int], None] = lambda _sent: None,
    ) -> None:
        """Upload a blob that the registry does not have, in pieces; goes on where an earlier try ended.

        Args:
            wanted: the blob.
            opened: opens its content.
            uploads: remembers where it stands.
            progress: is told how many bytes the registry has.

        Raises:
            RegistryError: the registry is out of reach or refuses.
        """
        key = f"{self._base}/{self.name}@{wanted.digest}"
        with opened() as content:
            location, offset, piece = self._begun(key, uploads)
            failures = 0
            while offset < wanted.size:
                before = offset
                try:
                    answer = self._patch(location, content, offset, min(piece, wanted.size - offset))
                    if answer is None:  # no pieces here
                        uploads.set(key, None)
                        self._whole(wanted, content, progress)
                        return
                    location, offset = answer
                    uploads.set(key, location)
                    progress(offset)
                    failures = 0
                except httpx.TransportError as error:
                    self._wait(failures + 1, error)
                    location, offset, piece = self._begun(key, uploads)
                    failures = 0 if offset > before else failures + 1
            self._finish(location, wanted, key, uploads)

    def _begun(self, key: str, uploads: Uploads) -> tuple[str, int, int]:
        """Return where an upload goes on: its address, what the registry has of it, bytes of a piece."""
        known = uploads.get(key)
        if known is not None:

            def status() -> httpx.Response:
                return self._request("GET", known)

            answer = self._tried(status)
            found = _RANGE.fullmatch(answer.headers.get("Range", ""))
            if answer.status_code == httpx.codes.NO_CONTENT:
                where = self._location(answer, known)
                return where, int(found[1]) + 1 if found and found[1] != "0" else 0, PIECE_BYTES
            uploads.set(key, None)

        def post() -> httpx.Response:
            answer = self._request("POST", f"/v2/{self.name}/blobs/uploads/", content=b"")
            self._require(answer, "beginning an upload")
            return answer

        answer = self._tried(post)
        location = self._location(answer, "")
        least = answer.headers.get("OCI-Chunk-Min-Length", "")
        uploads.set(key, location)
        return location, 0, max(PIECE_BYTES, min(int(least), 1 << 28) if least.isdigit() else 0)

    def _parts(self, content: BinaryIO, offset: int, size: int) -> Iterator[bytes]:
        """Yield a part of a file in small pieces: what is sent is not held in memory."""
        content.seek(offset)
        while size and (part := content.read(min(SENT_BYTES, size))):
            size -= len(part)
            self.sent_bytes += len(part)
            yield part

    def _patch(self, location: str, content: BinaryIO, offset: int, size: int) -> tuple[str, int] | None:
        headers = {
            "Content-Type": "application/octet-stream",
            "Content-Range": f"{offset}-{offset + size - 1}",
            "Content-Length": str(size),
        }
        parts = partial(self._parts, content, offset, size)
        answer = self._request("PATCH", location, headers=headers, content=parts)
        if answer.status_code in (httpx.codes.ACCEPTED, httpx.codes.CREATED, httpx.codes.NO_CONTENT):
            found = _RANGE.fullmatch(answer.headers.get("Range", ""))
            return self._location(answer, location), int(found[1]) + 1 if found else offset + size
        if answer.status_code == httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE or answer.status_code >= 500:
            raise httpx.WriteError(f"status {answer.status_code}")  # ask where it stands, and go on
        if offset == 0:
            return None
        self._require(answer, "uploading")
        return None

    def _finish(self, location: str, wanted: Descriptor, key: str, uploads: Uploads) -> None:
        def put() -> None:
            target = _with_query(location, {"digest": wanted.digest})
            answer = self._request("PUT", target, content=b"", headers={"Content-Length": "0"})
            if answer.status_code >= 400 and self.has_blob(wanted.digest):
                return  # an earlier try has ended it, and its answer was lost
            self._require(answer, "ending an upload")

        try:
            self._tried(put)
        finally:
            uploads.set(key, None)

    def _whole(self, wanted: Descriptor, content: BinaryIO, progress: Callable[[int], None]) -> None:
        def put() -> None:
            answer = self._request("POST", f"/v2/{self.name}/blobs/uploads/", content=b"")
            self._require(answer, "beginning an upload")
            target = _with_query(self._location(answer, ""), {"digest": wanted.digest})

            headers = {"Content-Type": "application/octet-stream", "Content-Length": str(wanted.size)}
            parts = partial(self._parts, content, 0, wanted.size)
            answer = self._request("PUT", target, headers=headers, content=parts)
            self._require(answer, "uploading")
            progress(wanted.size)

        self._tried(put)

    # --- requests --------------------------------------------------------------------------------------

    def _location(self, answer: httpx.Response, before: str) -> str:
        told: str = answer.headers.get("Location") or before
        if not told:
            raise RegistryError(f"{self.host}: began an upload and did not say where")
        return urljoin(self._base + "/", told)

    def _request(
        self,
        method: str,
        target: str,
        *,
        headers: Mapping[str, str] | None = None,
        content: bytes | Callable[[], Iterator[bytes]] | None = None,
    ) -> httpx.Response:
        with self._stream(method, target, headers=headers, content=content) as answer:
            if answer.status_code >= 400 or method in ("GET", "POST", "PUT", "PATCH"):
                body = b""
                for part in answer.iter_bytes(READ_BYTES):
                    body += part
                    if len(body) > READ_BYTES:
                        break
                answer._content = body[:READ_BYTES]  # noqa: SLF001 - what `content` shows of a stream
            return answer

    def _stream(
        self,
        method: str,
        target: str,
        *,
        headers: Mapping[str, str] | None = None,
        content: bytes | Callable[[], Iterator[bytes]] | None = None,
    ) -> "_Stream":
        return _Stream(self, method, urljoin(self._base + "/", target), dict(headers or {}), content)

    def send(
        self,
        method: str,
        url: str,
        headers: dict[str, str],
        content: bytes | Callable[[], Iterator[bytes]] | None,
    ) -> httpx.Response:
        """Send one request; once more with a login if the registry asks for one."""
        ours = urlsplit(url).netloc == urlsplit(self._base).netloc
        scope = "pull" if method in ("GET", "HEAD") else "pull,push"
        for again in (False, True):
            held = self._authorization.get(scope) if ours else None
            body = content() if callable(content) else content
            request = self._client.build_request(
                method, url, headers={**headers, **({"Authorization": held} if held else {})}, content=body
            )
            answer = self._client.send(request, stream=True)
            if answer.status_code != httpx.codes.UNAUTHORIZED or again or not ours:
                return answer
            challenge = answer.headers.get("WWW-Authenticate", "")
            answer.close()
            self._authorization[scope] = self._authorize(challenge, scope)
        raise AssertionError

    def _authorize(self, challenge: str, scope: str) -> str:
        """Return the header by which a registry lets us in."""
        kind, _, rest = challenge.partition(" ")
        login = self._login(self.host, self.name)
        if kind.lower() == "basic":
            if login is None:
                raise RegistryError(
                    f"{self.host} wants a login: `docker login {self.host}` or `podman login`"
                )
            return _basic(login)["Authorization"]
        if kind.lower() != "bearer":
            raise RegistryError(f"{self.host} wants a login of an unknown kind: {challenge[:80]!r}")
        asked = dict(_CHALLENGE.findall(rest))
        realm = asked.get("realm", "")
        parts = urlsplit(realm)
        safe = parts.scheme == "https" or (parts.scheme == "http" and self._base.startswith("http:"))
        if not parts.netloc or not safe:
            raise RegistryError(f"{self.host}: will not ask for a token at {realm[:120]!r}")
        wanted = {"scope": f"repository:{self.name}:{scope}"}
        if "service" in asked:
            wanted["service"] = asked["service"]
        return f"Bearer {self._token(realm, wanted, login)}"

    def _token(self, realm: str, wanted: Mapping[str, str], login: Login | None) -> str:
        if login is not None and not login[0]:
            form = {
                **wanted,
                "grant_type": "refresh_token",
                "refresh_token": login[1],
                "client_id": "liberatai",
            }
            answer = self._client.post(realm, data=form)
        else:
            answer = self._client.get(_with_query(realm, wanted), headers=_basic(login) if login else {})
        if answer.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
            raise RegistryError(f"{self.host} does not accept this login for {self.name}")
        self._require(answer, "token")
        try:
            told: dict[str, object] = answer.json()
            token = told.get("token") or told.get("access_token")
        except (ValueError, AttributeError):
            token = None
        if not isinstance(token, str) or not token:
            raise RegistryError(f"{realm[:120]}: answered without a token")
        return token

    def _tried(self, work: Callable[[], "Result"]) -> "Result":
        """Do one short thing, again after cuts and busy answers."""
        failures = 0
        while True:
            try:
                return work()
            except (httpx.TransportError, _BusyAnswer) as error:
                failures += 1
                self._wait(failures, error)

    def _wait(self, failures: int, error: Exception) -> None:
        if failures >= TRIES:
            raise RegistryError(
                f"{self._base}: out of reach ({error or type(error).__name__}); try again later"
            )
        self._pause(min(10.0, 0.2 * 2**failures) if failures else 0.0)

    def _require(self, answer: httpx.Response, what: str) -> None:
        """Raise RegistryError unless an answer is a success."""
        if answer.is_success:
            return
        if answer.status_code in (429, 500, 502, 503, 504):
            raise _BusyAnswer(f"status {answer.status_code}")
        try:
            told = answer.read()[:300].decode(errors="replace")
        except httpx.StreamError:
            told = getattr(answer, "_content", b"")[:300].decode(errors="replace")
        text = "".join(c if c.isprintable() else " " for c in told)
        if answer.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
            raise RegistryError(f"{self.host} refuses {what} of {self.name}: no right ({text[:120]})")
        raise RegistryError(f"{self.host}: {what} of {self.name}: status {answer.status_code} {text[:200]}")

    def _told(self, reference: str) -> str:
        return f"{self.host}/{self.name}{'@' if reference.startswith('sha256:') else ':'}{reference[:80]}"


class _BusyAnswer(Exception):  # noqa: N818 - it is no fault: the request is tried again
    """The registry is busy."""


class _Stream:
    """A request whose answer is read while it comes."""

    def __init__(
        self,
        registry: Registry,
        method: str,
        url: str,
        headers: dict[str, str],
        content: bytes | Callable[[], Iterator[bytes]] | None,
    ) -> None:
        self._registry, self._asked = registry, (method, url, headers, content)
        self._answer: httpx.Response | None = None

    def __enter__(self) -> httpx.Response:
        self._answer = self._registry.send(*self._asked)
        return self._answer

    def __exit__(self, *_reason: object) -> None:
        if self._answer is not None:
            self._answer.close()


def _basic(login: Login) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"{login[0]}:{login[1]}".encode()).decode()}


def _with_query(url: str, fields: Mapping[str, str]) -> str:
    return f"{url}{'&' if '?' in url else '?'}{urlencode(fields)}"
