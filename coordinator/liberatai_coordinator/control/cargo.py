"""What a rollout brings, as wishes: a version of a model, a release of the agent, or settings."""

import asyncio
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from liberatai_coordinator.config import JobSpec
from liberatai_coordinator.control.shadows import Desired
from liberatai_coordinator.fleet.devices import Device
from liberatai_coordinator.jobs.materials import spec_of
from liberatai_coordinator.jobs.publisher import Publisher
from liberatai_coordinator.models.versions import step_from
from liberatai_coordinator.store.ledger import Ledger
from liberatai_coordinator.store.manifests import Manifest, MemberRecord, decode_manifest
from liberatai_coordinator.store.repository import Repository
from liberatai_core.contract.frame import encode_spec
from liberatai_core.contract.limits import MAX_OBJECT_BYTES
from liberatai_core.contract.messages import AgentWish, BlobRef, ModelWish, TaskSpec, Wishes
from liberatai_core.errors import BudgetError, ConfigError, NotFoundError


class Cargo(msgspec.Struct, frozen=True, kw_only=True):
    """What a rollout brings; one of the three.

    Attributes:
        model, version: a version of a model.
        agent, bundle: a release of the agent, and the file with its signed bundle.
        settings: changes of wished settings; None: as the device has it.
    """

    model: str = ""
    version: int = 0
    agent: str = ""
    bundle: str = ""
    settings: dict[str, bool | float | None] = {}

    @property
    def words(self) -> str:
        """What it is, for people."""
        if self.model:
            return f"{self.model}:{self.version}"
        if self.agent:
            return f"agent {self.agent}"
        return ", ".join(
            f"{name}={'-' if value is None else value}" for name, value in sorted(self.settings.items())
        )


@dataclass(slots=True, kw_only=True)
class Loaded:
    """Cargo whose files stand at the broker.

    Attributes:
        holder: under whose name they stand.
        wishes: of a model, by structure, the most parameters first.
        sizes: bytes on the device, by structure.
        families: of the structures.
        bundle: of a release.
    """

    cargo: Cargo
    holder: str
    wishes: dict[str, ModelWish] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    families: dict[str, str] = field(default_factory=dict)
    bundle: BlobRef | None = None

    def wish(self, device: Device, before: Desired) -> Desired:
        """Return what a device shall be like with the cargo, when it was wished to be like `before`.

        Raises:
            BudgetError: no structure of the version fits the device.
        """
        if self.wishes:
            return msgspec.structs.replace(before, model=self.wishes[self.structure(device)])
        if self.bundle is not None:
            wish = AgentWish(version=self.cargo.agent, bundle=self.bundle)
            return msgspec.structs.replace(before, agent=wish)
        return msgspec.structs.replace(before, settings=merged(before.settings, self.cargo.settings))

    def structure(self, device: Device) -> str:
        """Return the structure that a device gets: the largest that fits."""
        capability = device.capability
        if capability is None:
            raise BudgetError(f"{device.id} did not introduce itself yet")
        for sid, size_bytes in self.sizes.items():
            fits = not capability.storage_bytes or size_bytes <= capability.storage_bytes
            if fits and (not capability.families or self.families[sid] in capability.families):
                return sid
        least = min(self.sizes.values())
        raise BudgetError(
            f"{device.id}: no structure of {self.cargo.words} fits; the smallest has {least} bytes"
        )


async def load(
    cargo: Cargo, holder: str, ledger: Ledger, repository: Repository, publisher: Publisher
) -> Loaded:
    """Let the files of a rollout stand at the broker, once for all devices.

    Raises:
        NotFoundError: no such version, or its files were collected. ConfigError: the bundle cannot be read.
    """
    loaded = Loaded(cargo=cargo, holder=holder)
    if cargo.model:
        manifest = await asyncio.to_thread(_manifest, ledger, repository, cargo)
        members = sorted(manifest.structures.items(), key=lambda pair: -pair[1].structure.parameters)
        for sid, member in members:
            loaded.wishes[sid] = await _stand(cargo, manifest, member, holder, ledger, repository, publisher)
            loaded.sizes[sid] = sum(step.blob.size_bytes for step in loaded.wishes[sid].steps)
            loaded.families[sid] = member.structure.family
    elif cargo.agent:
        content = await asyncio.to_thread(_read, Path(cargo.bundle))
        loaded.bundle = await publisher.add_blob(content, holder)
    return loaded


async def unload(loaded: Loaded, publisher: Publisher) -> None:
    """Take the files of a rollout away, unless somebody else needs them."""
    refs = [ref for wish in loaded.wishes.values() for ref in (wish.spec, *(s.blob for s in wish.steps))]
    refs += [loaded.bundle] if loaded.bundle is not None else []
    await publisher.drop_blobs([ref.blob for ref in refs], loaded.holder)


def merged(before: Wishes, changes: dict[str, bool | float | None]) -> Wishes:
    """Return wishes with some settings changed; raises ValidationError for what may not be wished."""
    plain = {name: value for name, value in msgspec.to_builtins(before).items() if name not in changes}
    return msgspec.convert(
        plain | {name: value for name, value in changes.items() if value is not None}, Wishes
    )


async def _stand(
    cargo: Cargo,
    manifest: Manifest,
    member: MemberRecord,
    holder: str,
    ledger: Ledger,
    repository: Repository,
    publisher: Publisher,
) -> ModelWish:
    records = (member.keyframe, *member.deltas)
    contents = await asyncio.to_thread(lambda: [repository.get(record.blob) for record in records])
    for content in contents:
        await publisher.add_blob(content, holder)
    spec = await asyncio.to_thread(_spec, cargo, manifest, member, ledger)
    return ModelWish(
        model=cargo.model,
        version=cargo.version,
        spec=await publisher.add_blob(encode_spec(spec), holder),
        steps=tuple(map(step_from, records)),
    )


def _spec(cargo: Cargo, manifest: Manifest, member: MemberRecord, ledger: Ledger) -> TaskSpec:
    """Return what a device needs to read the files: as in the tasks of the job that made them."""
    try:
        job = msgspec.json.decode(ledger.jobs.get(cargo.model).spec, type=JobSpec)
    except (NotFoundError, msgspec.MsgspecError):  # deleted, or of another release
        return TaskSpec(job=cargo.model, structure=member.structure, data=manifest.data)
    return spec_of(job, member.structure)


def _manifest(ledger: Ledger, repository: Repository, cargo: Cargo) -> Manifest:
    manifest = decode_manifest(ledger.versions.get(cargo.model, cargo.version).manifest)
    repository.verify(manifest)
    return manifest


def _read(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError("--bundle", [f"{path}: {error.strerror}"]) from None
    if not 1 <= len(content) <= MAX_OBJECT_BYTES:
        raise ConfigError("--bundle", [f"{path}: {len(content)} bytes, at most {MAX_OBJECT_BYTES}"])
    return content
