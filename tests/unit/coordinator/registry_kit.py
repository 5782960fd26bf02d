"""A registry inside the process: what OCI distribution asks of one, and what goes wrong with real ones."""

import base64
import hashlib
import re
from dataclasses import dataclass, field

import httpx

TOKEN = "let-me-in"


@dataclass
class FakeRegistry:
    """Answers requests of httpx.

    Attributes:
        pieces: whether it takes PATCH.
        ranges: whether it knows Range.
        login: "user:password" that its token service wants; None: everybody may do everything.
        cut_after: requests after which every third one dies before its answer.
        damage: digests of which it sends something else.
    """

    pieces: bool = True
    ranges: bool = True
    login: str | None = None
    cuts: int = 0
    damage: set[str] = field(default_factory=set)
    blobs: dict[str, bytes] = field(default_factory=dict)
    manifests: dict[str, tuple[bytes, str]] = field(default_factory=dict)
    uploads: dict[str, bytearray] = field(default_factory=dict)
    received: int = 0
    requests: list[str] = field(default_factory=list)

    def transport(self):
        return httpx.MockTransport(self.answer)

    def answer(self, request):
        path, method = request.url.path, request.method
        self.requests.append(f"{method} {path}")
        if path == "/token":
            wanted = "Basic " + base64.b64encode((self.login or "").encode()).decode()
            if request.headers.get("Authorization") != wanted:
                return httpx.Response(401)
            assert "repository:lab/digits:" in request.url.params["scope"]
            return httpx.Response(200, json={"token": TOKEN})
        if self.login is not None and request.headers.get("Authorization") != f"Bearer {TOKEN}":
            challenge = f'Bearer realm="http://{request.url.netloc.decode()}/token",service="here"'
            return httpx.Response(401, headers={"WWW-Authenticate": challenge})
        found = re.fullmatch(r"/v2/(.+?)/(manifests|blobs)/(.*)", path)
        assert found is not None
        name, kind, rest = found.groups()
        assert name == "lab/digits"
        if kind == "manifests":
            return self._manifest(request, rest)
        return self._upload(request, rest) if rest.startswith("uploads/") else self._blob(request, rest)

    def _manifest(self, request, reference):
        if request.method == "PUT":
            content = request.read()
            digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
            self.manifests[digest] = self.manifests[reference] = (content, request.headers["Content-Type"])
            return httpx.Response(201, headers={"Docker-Content-Digest": digest})
        if reference not in self.manifests:
            return httpx.Response(404)
        content, media_type = self.manifests[reference]
        digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
        if digest in self.damage:
            content += b" "
        return httpx.Response(
            200, headers={"Content-Type": media_type, "Docker-Content-Digest": digest}, content=content
        )

    def _blob(self, request, digest):
        if digest not in self.blobs:
            return httpx.Response(404)
        content = self.blobs[digest]
        if digest in self.damage:
            content = bytes(len(content))
        asked = re.fullmatch(r"bytes=(\d+)-\d+", request.headers.get("Range", ""))
        start = int(asked[1]) if asked and self.ranges else 0
        part = content[start:]
        if self.cuts and request.method == "GET" and len(part) > 1000:
            self.cuts -= 1

            def half():
                yield part[: len(part) // 2]
                raise httpx.ReadError("cut")

            return httpx.Response(206 if start else 200, content=half())
        return httpx.Response(206 if start else 200, content=iter([part]))

    def _upload(self, request, rest):
        number = rest.removeprefix("uploads/")
        if request.method == "POST":
            number = str(len(self.uploads) + 1)
            self.uploads[number] = bytearray()
            return httpx.Response(202, headers={"Location": f"/v2/lab/digits/blobs/uploads/{number}"})
        if number not in self.uploads:
            return httpx.Response(404)
        content = self.uploads[number]
        where = {"Location": f"/v2/lab/digits/blobs/uploads/{number}"}
        if request.method == "GET":
            return httpx.Response(204, headers={**where, "Range": f"0-{max(0, len(content) - 1)}"})
        if request.method == "PATCH":
            if not self.pieces:
                return httpx.Response(405)
            part = request.read()
            begin = int(request.headers["Content-Range"].partition("-")[0])
            if begin != len(content):
                return httpx.Response(416)
            if self.cuts:
                self.cuts -= 1
                content += part[: len(part) // 2]
                self.received += len(part) // 2
                raise httpx.WriteError("cut")
            content += part
            self.received += len(part)
            return httpx.Response(202, headers={**where, "Range": f"0-{len(content) - 1}"})
        content += request.read()
        digest = request.url.params["digest"]
        if f"sha256:{hashlib.sha256(content).hexdigest()}" != digest:
            return httpx.Response(400)
        self.blobs[digest] = bytes(self.uploads.pop(number))
        return httpx.Response(201)
