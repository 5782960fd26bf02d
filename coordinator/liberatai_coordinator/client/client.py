"""Ask a running coordinator over its Unix socket.

The methods mirror `api.Operations`. An error of the coordinator is raised here as the same class with
the same code, so a caller cannot tell whether the fault was found on this side or on the other.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar
from urllib.parse import quote

import msgspec

from liberatai_coordinator.client.views import (
    DeviceView,
    EnsembleView,
    JobView,
    PlanView,
    SizesView,
    VariantDetail,
    VariantView,
    VersionView,
)
from liberatai_coordinator.client.wire import (
    JobRequest,
    PlanRequest,
    Problem,
    Reason,
    VariantUpload,
    Weights,
    Wire,
)
from liberatai_coordinator.store.manifests import VariantManifest
from liberatai_core.errors import BY_CODE, ConfigError, DigestError, LiberataiError, LinkError, SchemaError
from liberatai_core.structure import DataContract, Structure

if TYPE_CHECKING:
    import httpx

TIMEOUT_S = 120.0
"""A plan compresses every structure once; nothing else takes longer than a second."""

Answer = TypeVar("Answer")


class CoordinatorError(LiberataiError):
    """The coordinator failed in a way that has no code; its log has the reason."""


class Client:
    """A connection to `liberatai serve`. Use it in a `with` block, from one thread.

    Raises (all methods): LinkError when no coordinator answers on the socket, and what `Operations` says.
    """

    def __init__(self, socket: Path, *, timeout_s: float = TIMEOUT_S) -> None:
        import httpx  # noqa: PLC0415 - 0.1 s that `liberatai --help` does not need

        self.socket = socket
        # A kept connection that the other side has closed meanwhile would fail; a new one costs nothing here.
        limits = httpx.Limits(max_keepalive_connections=0)
        # No TLS on a Unix socket: reading the certificates of this machine would take 0.1 s for nothing.
        transport = httpx.HTTPTransport(uds=str(socket), limits=limits, verify=False)
        self._http = httpx.Client(transport=transport, base_url="http://liberatai/v1", timeout=timeout_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._http.close()

    def health(self) -> dict[str, Any]:
        """Return what the coordinator says about itself."""
        return self._ask("GET", "/health", dict[str, Any])

    def devices(self) -> list[DeviceView]:
        """Return all devices."""
        return self._ask("GET", "/devices", list[DeviceView])

    def device(self, name: str) -> DeviceView:
        """Return one device."""
        return self._ask("GET", f"/devices/{_part(name)}", DeviceView)

    def approve(self, name: str) -> DeviceView:
        """Let a device in."""
        return self._ask("POST", f"/devices/{_part(name)}/approve", DeviceView)

    def quarantine(self, name: str, reason: str) -> DeviceView:
        """Shut a device out."""
        return self._ask("POST", f"/devices/{_part(name)}/quarantine", DeviceView, Reason(reason=reason))

    def release(self, name: str) -> DeviceView:
        """Let a quarantined device in again."""
        return self._ask("POST", f"/devices/{_part(name)}/release", DeviceView)

    def create_job(self, yaml_text: str, base_dir: Path | str) -> JobView:
        """Create a job from its YAML; relative paths in it start from `base_dir`."""
        return self._ask("POST", "/jobs", JobView, JobRequest(yaml=yaml_text, base_dir=str(base_dir)))

    def jobs(self) -> list[JobView]:
        """Return all jobs."""
        return self._ask("GET", "/jobs", list[JobView])

    def job(self, name: str) -> JobView:
        """Return one job."""
        return self._ask("GET", f"/jobs/{_part(name)}", JobView)

    def pause(self, name: str) -> JobView:
        """Open no further round until `resume`."""
        return self._ask("POST", f"/jobs/{_part(name)}/pause", JobView)

    def resume(self, name: str) -> JobView:
        """Go on with a paused job."""
        return self._ask("POST", f"/jobs/{_part(name)}/resume", JobView)

    def abort(self, name: str) -> JobView:
        """End a job for good; its versions stay."""
        return self._ask("POST", f"/jobs/{_part(name)}/abort", JobView)

    def plan(self, job_name: str | None = None, yaml_text: str | None = None) -> PlanView:
        """Return which device gets what in a job, in one only described (YAML), or in the newest job."""
        return self._ask("POST", "/plan", PlanView, PlanRequest(job=job_name, yaml=yaml_text))

    def models(self) -> list[VersionView]:
        """Return the newest version of every model."""
        return self._ask("GET", "/models", list[VersionView])

    def log(self, model: str) -> list[VersionView]:
        """Return all versions of a model, newest first."""
        return self._ask("GET", f"/models/{_part(model)}/versions", list[VersionView])

    def version(self, model: str, ref: str = "latest") -> VersionView:
        """Return one version by number, tag or "latest"."""
        return self._ask("GET", f"/models/{_part(model)}/versions/{_part(ref)}", VersionView)

    def ensemble(self, model: str, ref: str = "latest") -> EnsembleView:
        """Return how the structures of a version are combined."""
        return self._ask("GET", f"/models/{_part(model)}/versions/{_part(ref)}/ensemble", EnsembleView)

    def weights(self, model: str, ref: str, structure: str) -> tuple[Structure, DataContract, bytes]:
        """Return the weights of one structure of a version, verified.

        Raises:
            DigestError: they were damaged on the way.
        """
        path = f"/models/{_part(model)}/versions/{_part(ref)}/structures/{_part(structure)}/weights"
        content = self._send("GET", path, None)
        found = _decode(content, Weights, msgspec.msgpack.decode)
        if hashlib.sha256(found.weights).digest() != found.sha256:
            raise DigestError(f"{model}: the weights of {structure} were damaged on the way")
        return found.structure, found.data, found.weights

    def sizes(self, model: str, ref: str, structure: str) -> SizesView:
        """Return where the bytes of one structure's files go."""
        path = f"/models/{_part(model)}/versions/{_part(ref)}/structures/{_part(structure)}/sizes"
        return self._ask("GET", path, SizesView)

    def commit_variant(self, ref: str, manifest: VariantManifest, file: bytes) -> VariantView:
        """Add a variant to a version of the manifest's model; the same one again is stored once."""
        path = f"/models/{_part(manifest.model)}/versions/{_part(ref)}/variants"
        body = msgspec.msgpack.encode(VariantUpload(manifest=manifest, file=file))
        content = self._send("POST", path, body, "application/msgpack")
        return _decode(content, VariantView, msgspec.json.decode)

    def variants(self, model: str, ref: str = "latest") -> list[VariantView]:
        """Return the variants of a version, the smallest first."""
        return self._ask("GET", f"/models/{_part(model)}/versions/{_part(ref)}/variants", list[VariantView])

    def variant(self, model: str, prefix: str) -> VariantDetail:
        """Return one variant by the beginning of its id, with its structure and where its bytes go."""
        return self._ask("GET", f"/models/{_part(model)}/variants/{_part(prefix)}", VariantDetail)

    def variant_file(self, variant: VariantView) -> bytes:
        """Return the file of a variant, verified.

        Raises:
            DigestError: it was damaged on the way.
        """
        path = f"/models/{_part(variant.model)}/variants/{_part(variant.id)}/file"
        content = self._send("GET", path, None)
        if hashlib.sha256(content).hexdigest() != variant.file:
            raise DigestError(
                f"{variant.model}: the file of variant {variant.id[:12]} was damaged on the way"
            )
        return content

    def _ask(self, method: str, path: str, wanted: type[Answer], body: Wire | None = None) -> Answer:
        content = None if body is None else msgspec.json.encode(body)
        return _decode(self._send(method, path, content), wanted, msgspec.json.decode)

    def _send(
        self, method: str, path: str, content: bytes | None, media_type: str = "application/json"
    ) -> bytes:
        import httpx  # noqa: PLC0415

        headers: Mapping[str, str] = {} if content is None else {"content-type": media_type}
        try:
            response = self._http.request(method, path, content=content, headers=headers)
        except httpx.TimeoutException:
            raise LinkError(f"the coordinator at {self.socket} does not answer: look at its log") from None
        except httpx.ConnectError as error:
            raise LinkError(self._out_of_reach(error)) from None
        except httpx.HTTPError as error:
            raise LinkError(
                f"the coordinator at {self.socket} broke off ({error}): look at its log"
            ) from None
        if response.is_success:
            return response.content
        raise _error(response)

    def _out_of_reach(self, error: Exception) -> str:
        if "Permission denied" in str(error):
            return f"{self.socket}: permission denied; run this as the user of the coordinator"
        return f"no coordinator at {self.socket}: start one with `liberatai serve` (or give --socket)"


def _part(name: str) -> str:
    return quote(name, safe="")


def _decode(content: bytes, wanted: type[Answer], decode: Any) -> Answer:
    try:
        answer: Answer = decode(content, type=wanted)
    except (msgspec.DecodeError, ValueError) as error:
        raise SchemaError(f"answer of another release of the coordinator: {error}") from None
    return answer


def _error(response: "httpx.Response") -> LiberataiError:
    try:
        problem = msgspec.json.decode(response.content, type=Problem)
    except msgspec.DecodeError:
        return CoordinatorError(f"HTTP {response.status_code} without a reason; look at its log")
    if problem.code == ConfigError.code:
        return ConfigError(problem.where, list(problem.faults) or [problem.message])
    kind = BY_CODE.get(problem.code)
    if kind is None or kind is LiberataiError:
        return CoordinatorError(problem.message)
    return kind(problem.message)
