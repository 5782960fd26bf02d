"""Ask a running coordinator over its Unix socket.

The methods mirror `api.operations`, noun by noun. An error of the coordinator is raised here as the same
class with the same code, so a caller cannot tell whether the fault was found on this side or on the other.
"""

import hashlib
from http import HTTPStatus
from pathlib import Path
from typing import Any, Self, TypeVar
from urllib.parse import quote, urlencode

import msgspec

from liberatai_coordinator.client import https, unix_http
from liberatai_coordinator.client.fleet import (
    AuditClient,
    EventsClient,
    GroupsClient,
    RolloutsClient,
    ShadowsClient,
    TokensClient,
)
from liberatai_coordinator.client.fleet_views import LogView, PingView
from liberatai_coordinator.client.https import Server
from liberatai_coordinator.client.views import (
    DeviceView,
    EnsembleView,
    InvitationView,
    JobSummary,
    JobView,
    PlanView,
    SizesView,
    VariantDetail,
    VariantView,
    VersionView,
)
from liberatai_coordinator.client.wire import (
    InvitationRequest,
    JobRequest,
    Key,
    Labels,
    Lines,
    PlanRequest,
    Problem,
    Reason,
    VariantUpload,
    Weights,
    Wire,
)
from liberatai_coordinator.store.manifests import VariantManifest
from liberatai_core.errors import BY_CODE, ConfigError, DigestError, LiberataiError, SchemaError
from liberatai_core.structure import DataContract, Structure

TIMEOUT_S = 120.0
"""A plan compresses every structure once; nothing else takes longer than a second."""

Answer = TypeVar("Answer")


class CoordinatorError(LiberataiError):
    """The coordinator failed in a way that has no code; its log has the reason."""


class Client:
    """A way to `liberatai serve`. It holds nothing open: a request is a connection of its own.

    Raises (all methods): LinkError when no coordinator answers on the socket, and what the operations say.
    """

    def __init__(self, socket: Path | Server, *, timeout_s: float = TIMEOUT_S) -> None:
        self.socket = socket
        self.timeout_s = timeout_s
        self.devices = DevicesClient(self)
        self.invitations = InvitationsClient(self)
        self.jobs = JobsClient(self)
        self.models = ModelsClient(self)
        self.variants = VariantsClient(self)
        self.groups = GroupsClient(self)
        self.shadows = ShadowsClient(self)
        self.rollouts = RolloutsClient(self)
        self.tokens = TokensClient(self)
        self.events = EventsClient(self)
        self.audit = AuditClient(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_reason: object) -> None:
        """Nothing is held open."""

    def health(self) -> dict[str, Any]:
        """Return what the coordinator says about itself."""
        return self.ask("GET", "/health", dict[str, Any])

    def plan(self, job_name: str | None = None, yaml_text: str | None = None) -> PlanView:
        """Return which device gets what in a job, in one only described (YAML), or in the newest job."""
        return self.ask("POST", "/plan", PlanView, PlanRequest(job=job_name, yaml=yaml_text))

    def ask(self, method: str, path: str, wanted: type[Answer], body: Wire | None = None) -> Answer:
        """Send a request and return its answer as a view."""
        content = None if body is None else msgspec.json.encode(body)
        return _decode(self.send(method, path, content), wanted, msgspec.json.decode)

    def send(
        self, method: str, path: str, content: bytes | None = None, media_type: str = "application/json"
    ) -> bytes:
        """Send a request and return the bytes of its answer.

        Args:
            method: of HTTP.
            path: below /v1, quoted.
            content: of the request; None for none.
            media_type: of the content.
        """
        target = f"/v1{path}"
        if isinstance(self.socket, Server):
            status, answer = https.request(
                self.socket, method, target, content, media_type, timeout_s=self.timeout_s
            )
        else:
            status, answer = unix_http.request(
                self.socket, method, target, content, media_type, timeout_s=self.timeout_s
            )
        if status < HTTPStatus.MULTIPLE_CHOICES:
            return answer
        raise error_of(status, answer)


class DevicesClient:
    """Devices of a coordinator."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def list(self, selector: str = "", query: str = "", group: str = "") -> tuple[DeviceView, ...]:
        """Return all devices, or those of which selector, question and group are true."""
        asked = {"selector": selector, "query": query, "group": group}
        given = urlencode({name: text for name, text in asked.items() if text})
        return self._client.ask("GET", f"/devices?{given}" if given else "/devices", tuple[DeviceView, ...])

    def show(self, name: str) -> DeviceView:
        """Return one device."""
        return self._client.ask("GET", f"/devices/{_part(name)}", DeviceView)

    def approve(self, name: str, key: str = "") -> DeviceView:
        """Let a device in; with `key` only if its fingerprint begins so."""
        return self._client.ask("POST", f"/devices/{_part(name)}/approve", DeviceView, Key(key=key))

    def reject(self, name: str, reason: str) -> None:
        """Send a pending device away; its key is refused for good."""
        self._tell(name, "reject", reason)

    def decommission(self, name: str, reason: str) -> None:
        """Remove a device; its key is refused for good."""
        self._tell(name, "decommission", reason)

    def rekey(self, name: str, key: str = "") -> DeviceView:
        """Take the key that asks for a device's name; with `key` only if its fingerprint begins so."""
        return self._client.ask("POST", f"/devices/{_part(name)}/rekey", DeviceView, Key(key=key))

    def label(self, name: str, labels: dict[str, str | None]) -> DeviceView:
        """Give a device labels, or take them away (None)."""
        return self._client.ask("POST", f"/devices/{_part(name)}/labels", DeviceView, Labels(labels=labels))

    def drain(self, name: str, reason: str) -> DeviceView:
        """Give a device no new task."""
        path = f"/devices/{_part(name)}/drain"
        return self._client.ask("POST", path, DeviceView, Reason(reason=reason))

    def resume(self, name: str) -> DeviceView:
        """Let a drained device work again."""
        return self._client.ask("POST", f"/devices/{_part(name)}/resume", DeviceView)

    def ping(self, name: str) -> PingView:
        """Ask a device whether it is there."""
        return self._client.ask("POST", f"/devices/{_part(name)}/ping", PingView)

    def probe(self, name: str) -> DeviceView:
        """Let a device look at its machine again."""
        return self._client.ask("POST", f"/devices/{_part(name)}/probe", DeviceView)

    def logs(self, name: str, lines: int = 50) -> LogView:
        """Return the newest lines of a device's log."""
        return self._client.ask("POST", f"/devices/{_part(name)}/logs", LogView, Lines(lines=lines))

    def _tell(self, name: str, verb: str, reason: str) -> None:
        content = msgspec.json.encode(Reason(reason=reason))
        self._client.send("POST", f"/devices/{_part(name)}/{verb}", content)

    def quarantine(self, name: str, reason: str) -> DeviceView:
        """Shut a device out."""
        path = f"/devices/{_part(name)}/quarantine"
        return self._client.ask("POST", path, DeviceView, Reason(reason=reason))

    def release(self, name: str) -> DeviceView:
        """Let a quarantined device in again."""
        return self._client.ask("POST", f"/devices/{_part(name)}/release", DeviceView)


class InvitationsClient:
    """Invitations of a coordinator."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def list(self) -> tuple[InvitationView, ...]:
        """Return all invitations, without their tokens."""
        return self._client.ask("GET", "/invitations", tuple[InvitationView, ...])

    def create(self, wanted: InvitationRequest) -> tuple[InvitationView, ...]:
        """Make invitations; their tokens are in the answer and nowhere else."""
        return self._client.ask("POST", "/invitations", tuple[InvitationView, ...], wanted)


class JobsClient:
    """Jobs of a coordinator."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def create(self, yaml_text: str, base_dir: Path | str) -> JobView:
        """Create a job from its YAML; relative paths in it start from `base_dir`."""
        return self._client.ask("POST", "/jobs", JobView, JobRequest(yaml=yaml_text, base_dir=str(base_dir)))

    def check(self, yaml_text: str, base_dir: Path | str) -> PlanView:
        """Return which device would get what; faults are those of `create`, and nothing is created."""
        body = JobRequest(yaml=yaml_text, base_dir=str(base_dir))
        return self._client.ask("POST", "/jobs/check", PlanView, body)

    def list(self) -> tuple[JobSummary, ...]:
        """Return all jobs, without their rounds."""
        return self._client.ask("GET", "/jobs", tuple[JobSummary, ...])

    def show(self, name: str) -> JobView:
        """Return one job with its rounds."""
        return self._client.ask("GET", f"/jobs/{_part(name)}", JobView)

    def pause(self, name: str) -> JobView:
        """Open no further round until `resume`."""
        return self._client.ask("POST", f"/jobs/{_part(name)}/pause", JobView)

    def resume(self, name: str) -> JobView:
        """Go on with a paused job."""
        return self._client.ask("POST", f"/jobs/{_part(name)}/resume", JobView)

    def abort(self, name: str) -> JobView:
        """End a job for good; its versions stay."""
        return self._client.ask("POST", f"/jobs/{_part(name)}/abort", JobView)

    def delete(self, name: str) -> None:
        """Forget an ended job, so that its name can be used again; its versions stay."""
        self._client.send("DELETE", f"/jobs/{_part(name)}")


class ModelsClient:
    """Models of a coordinator. A version is asked for by number, tag or "latest"."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def list(self) -> tuple[VersionView, ...]:
        """Return the newest version of every model."""
        return self._client.ask("GET", "/models", tuple[VersionView, ...])

    def log(self, model: str) -> tuple[VersionView, ...]:
        """Return all versions of a model, newest first."""
        return self._client.ask("GET", f"/models/{_part(model)}/versions", tuple[VersionView, ...])

    def version(self, model: str, ref: str = "latest") -> VersionView:
        """Return one version."""
        return self._client.ask("GET", _version(model, ref), VersionView)

    def ensemble(self, model: str, ref: str = "latest") -> EnsembleView:
        """Return how the structures of a version are combined."""
        return self._client.ask("GET", f"{_version(model, ref)}/ensemble", EnsembleView)

    def weights(self, model: str, ref: str, structure: str) -> tuple[Structure, DataContract, bytes]:
        """Return the weights of one structure of a version, verified.

        Raises:
            DigestError: they were damaged on the way.
        """
        path = f"{_version(model, ref)}/structures/{_part(structure)}/weights"
        weights = _decode(self._client.send("GET", path), Weights, msgspec.msgpack.decode)
        if hashlib.sha256(weights.weights).digest() != weights.sha256:
            raise DigestError(f"{model}: the weights of {structure} were damaged on the way")
        return weights.structure, weights.data, weights.weights

    def sizes(self, model: str, ref: str, structure: str) -> SizesView:
        """Return where the bytes of one structure's files go."""
        path = f"{_version(model, ref)}/structures/{_part(structure)}/sizes"
        return self._client.ask("GET", path, SizesView)


class VariantsClient:
    """Variants of a coordinator's models."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def commit(self, ref: str, manifest: VariantManifest, file: bytes) -> VariantView:
        """Add a variant to a version of the manifest's model; the same one again is stored once."""
        body = msgspec.msgpack.encode(VariantUpload(manifest=manifest, file=file))
        path = f"{_version(manifest.model, ref)}/variants"
        content = self._client.send("POST", path, body, "application/msgpack")
        return _decode(content, VariantView, msgspec.json.decode)

    def list(self, model: str, ref: str = "latest") -> tuple[VariantView, ...]:
        """Return the variants of a version, the smallest first."""
        return self._client.ask("GET", f"{_version(model, ref)}/variants", tuple[VariantView, ...])

    def show(self, model: str, prefix: str) -> VariantDetail:
        """Return one variant by the beginning of its id, with its structure and where its bytes go."""
        return self._client.ask("GET", f"/models/{_part(model)}/variants/{_part(prefix)}", VariantDetail)

    def file(self, variant: VariantView) -> bytes:
        """Return the file of a variant, verified.

        Raises:
            DigestError: it was damaged on the way.
        """
        content = self._client.send(
            "GET", f"/models/{_part(variant.model)}/variants/{_part(variant.id)}/file"
        )
        if hashlib.sha256(content).hexdigest() != variant.file:
            raise DigestError(
                f"{variant.model}: the file of variant {variant.id[:12]} was damaged on the way"
            )
        return content


def _part(name: str) -> str:
    return quote(name, safe="")


def _version(model: str, ref: str) -> str:
    return f"/models/{_part(model)}/versions/{_part(ref)}"


def _decode(content: bytes, wanted: type[Answer], decode: Any) -> Answer:
    try:
        answer: Answer = decode(content, type=wanted)
    except (msgspec.DecodeError, ValueError) as error:
        raise SchemaError(f"answer of another release of the coordinator: {error}") from None
    return answer


def error_of(status: int, content: bytes) -> LiberataiError:
    """Return the error that an answer tells of.

    Args:
        status: of HTTP, 300 or more.
        content: a `Problem`, if the answer is one of this coordinator.
    """
    try:
        problem = msgspec.json.decode(content, type=Problem)
    except msgspec.DecodeError:
        return CoordinatorError(f"HTTP {status} without a reason; look at its log")
    if problem.code == ConfigError.code:
        return ConfigError(problem.where, list(problem.faults) or [problem.message])
    kind = BY_CODE.get(problem.code)
    if kind is None or kind is LiberataiError:
        return CoordinatorError(problem.message)
    return kind(problem.message)
