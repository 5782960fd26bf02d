"""A small coordinator in memory behind the real API on a real Unix socket, for the tests of both ends."""

import asyncio
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar, cast

import msgspec
import numpy as np

from liberatai_coordinator.api.listener import serve_uds
from liberatai_coordinator.api.operations import Operations
from liberatai_coordinator.api.rollouts import plan_of, view
from liberatai_coordinator.api.routes import make_app
from liberatai_coordinator.api.shadows import changed, shadow_view
from liberatai_coordinator.client.fleet_views import (
    AuditView,
    EventView,
    GroupView,
    LogView,
    PingView,
    RolloutView,
    ShadowView,
)
from liberatai_coordinator.client.views import (
    AssignmentView,
    DeviceView,
    EnsembleView,
    JobState,
    JobSummary,
    JobView,
    PlanView,
    RoundView,
    SizesView,
    StructureView,
    TensorView,
    VariantDetail,
    VariantView,
    VersionView,
)
from liberatai_coordinator.client.wire import RolloutRequest
from liberatai_coordinator.config import JobSpec, parse_job
from liberatai_coordinator.control.cargo import Cargo
from liberatai_coordinator.control.rollouts import Running, Spec
from liberatai_coordinator.control.shadows import Desired, Shadow
from liberatai_coordinator.fleet import query
from liberatai_coordinator.fleet import rollout as deciding
from liberatai_coordinator.store.manifests import VariantManifest, version_id
from liberatai_coordinator.store.rows import AuditRow
from liberatai_core.contract.messages import Wishes
from liberatai_core.errors import ConfigError, DigestError, DiskError, NotFoundError, StateError
from liberatai_core.structure import DataContract, Structure, Tensor
from liberatai_core.weights import digest, to_bytes

STRUCTURE = Structure(
    family="mlp",
    params={"hidden": 4},
    tensors=(Tensor(name="0.weight", shape=(4, 2)), Tensor(name="0.bias", shape=(4,))),
)
DATA = DataContract(input_shape=(2,), classes=4)
WEIGHTS = np.linspace(-1, 1, STRUCTURE.parameters, dtype=np.float32)

JOB = """
name: digits
data: {input_shape: [2], classes: 4}
structures: [{family: mlp, params: {hidden: 4}}]
rounds: {count: 3}
"""

Found = TypeVar("Found")


class MemoryOperations:
    """What the coordinator promises, without devices: `look` runs before every look at a job."""

    def __init__(self) -> None:
        gateway = DeviceView(
            id="gateway",
            status="approved",
            last_seen_s=1.7e9,
            storage_bytes=65_536,
            reason="\x1b[31mx",
            up_bits_s=64_000.0,
            down_bits_s=2.5e6,
            link_measured=True,
            metered=True,
            day_quota_bytes=50 << 20,
            sent_bytes=4096,
            received_bytes=10_240,
            updates=2,
            round_sent_bytes=2048,
            round_received_bytes=5120,
            key="00112233aabbccdd",
            labels={"site": "hall"},
        )
        camera = msgspec.structs.replace(gateway, id="camera", status="pending", labels={}, knocks="44556677")
        self.fleet = {device.id: device for device in (gateway, camera)}
        self.trainings: dict[str, JobView] = {}
        self.base_dirs: dict[str, str] = {}
        self.look: Callable[[JobView], JobView] = lambda job: job
        self.disk_full = False
        self.fits = True
        self.committed: dict[str, tuple[VariantView, bytes]] = {}
        self.devices = MemoryDevices(self)
        self.jobs = MemoryJobs(self)
        self.plans = MemoryPlans(self)
        self.models = MemoryModels(self)
        self.variants = MemoryVariants(self)
        self.questions: dict[str, GroupView] = {}
        self.groups = MemoryGroups(self)
        self.shadows = MemoryShadows(self)
        self.rollouts = MemoryRollouts()
        self.tokens: Any = None
        self.events = MemoryEvents()
        self.audit = MemoryAudits()

    async def health(self) -> dict[str, Any]:
        return {"ok": True, "epoch": 3}


class MemoryDevices:
    def __init__(self, memory: "MemoryOperations") -> None:
        self.memory = memory

    async def list(self, selector: str = "", where: str = "", group: str = "") -> tuple[DeviceView, ...]:
        parts = [query.select(selector)] if selector else []
        parts += [query.parse(where)] if where else []
        parts += [query.parse(find(self.memory.questions, group, "group").query)] if group else []
        asked = query.Both(tuple(parts))
        return tuple(
            device
            for device in sorted(self.memory.fleet.values(), key=lambda device: device.id)
            if query.matches(asked, memory_facts(device))
        )

    async def show(self, device: str) -> DeviceView:
        return find(self.memory.fleet, device, "device")

    async def approve(self, device: str, key: str = "") -> DeviceView:
        if not find(self.memory.fleet, device, "device").key.startswith(key):
            raise StateError(f"{device} has another key")
        return await self._change(device, status="approved")

    async def reject(self, device: str, reason: str) -> None:
        await self.decommission(device, reason)

    async def quarantine(self, device: str, reason: str) -> DeviceView:
        return await self._change(device, status="quarantined", reason=reason)

    async def release(self, device: str) -> DeviceView:
        return await self._change(device, status="approved", reason="")

    async def decommission(self, device: str, reason: str) -> None:
        find(self.memory.fleet, device, "device")
        del self.memory.fleet[device]

    async def rekey(self, device: str, key: str = "") -> DeviceView:
        known = find(self.memory.fleet, device, "device")
        if not known.knocks:
            raise StateError(f"{device}: no other key asks for this name")
        return await self._change(device, key=known.knocks, knocks="")

    async def label(self, device: str, labels: Mapping[str, str | None]) -> DeviceView:
        before = find(self.memory.fleet, device, "device").labels
        after = {name: value for name, value in {**before, **labels}.items() if value is not None}
        return await self._change(device, labels=after)

    async def drain(self, device: str, reason: str) -> DeviceView:
        return await self._change(device, drained=True)

    async def resume(self, device: str) -> DeviceView:
        return await self._change(device, drained=False)

    async def ping(self, device: str) -> PingView:
        find(self.memory.fleet, device, "device")
        return PingView(device=device, seconds=0.25, session=3)

    async def probe(self, device: str) -> DeviceView:
        return find(self.memory.fleet, device, "device")

    async def logs(self, device: str, lines: int = 50) -> LogView:
        find(self.memory.fleet, device, "device")
        return LogView(device=device, lines=("one", "\x1b[31mtwo")[-lines:])

    async def _change(self, device: str, **changes: object) -> DeviceView:
        self.memory.fleet[device] = msgspec.structs.replace(
            find(self.memory.fleet, device, "device"), **changes
        )
        return self.memory.fleet[device]


def memory_facts(device: DeviceView) -> dict[str, query.Value | None]:
    labels: dict[str, query.Value | None] = {f"label.{k}": v for k, v in device.labels.items()}
    return labels | {"name": device.id, "status": device.status, "storage_kb": device.storage_bytes / 1024}


class MemoryGroups:
    def __init__(self, memory: "MemoryOperations") -> None:
        self.memory = memory

    async def create(self, name: str, where: str) -> GroupView:
        text = query.text_of(query.parse(where))
        self.memory.questions[name] = GroupView(name=name, query=text, created_s=1.7e9)
        return await self.show(name)

    async def list(self) -> tuple[GroupView, ...]:
        return tuple([await self.show(name) for name in sorted(self.memory.questions)])

    async def show(self, name: str) -> GroupView:
        group = find(self.memory.questions, name, "group")
        devices = tuple(one.id for one in await self.memory.devices.list("", group.query))
        return msgspec.structs.replace(group, count=len(devices), devices=devices)

    async def delete(self, name: str) -> None:
        find(self.memory.questions, name, "group")
        del self.memory.questions[name]


class MemoryShadows:
    def __init__(self, memory: "MemoryOperations") -> None:
        self.memory = memory
        self.wishes: dict[str, Wishes] = {}

    async def show(self, device: str) -> ShadowView:
        find(self.memory.fleet, device, "device")
        desired = Desired(settings=self.wishes.get(device, Wishes()))
        return shadow_view(device, Shadow(version=int(device in self.wishes), desired=desired))

    async def change(self, device: str, settings: Mapping[str, bool | float | None]) -> ShadowView:
        find(self.memory.fleet, device, "device")
        self.wishes[device] = changed(self.wishes.get(device, Wishes()), settings)
        return await self.show(device)


class MemoryRollouts:
    def __init__(self) -> None:
        self.running: dict[str, Running] = {}
        self.now_s = 1.7e9

    async def create(self, wanted: RolloutRequest) -> RolloutView:
        if wanted.name in self.running:
            raise StateError(f"rollout {wanted.name}: exists already")
        spec = Spec(
            cargo=Cargo(model=wanted.model, version=2), query="ready", who=wanted.group, plan=plan_of(wanted)
        )
        rollout = deciding.Rollout(name=wanted.name, since_s=1.7e9)
        self.running[wanted.name] = Running(spec=spec, rollout=rollout, created_s=1.7e9)
        return self._on(wanted.name, deciding.Tick(now_s=1.7e9, members=("camera", "gateway")))

    async def list(self) -> tuple[RolloutView, ...]:
        return tuple(view(one, parts=False) for one in self.running.values())

    async def show(self, name: str) -> RolloutView:
        running = find(self.running, name, "rollout")
        for device in list(running.rollout.parts):
            self._on(name, deciding.Told(device=device, now_s=1.7e9, outcome="done", evaluation=(9, 10)))
        for _ in range(2):
            self.now_s += 60.0
            self._on(name, deciding.Tick(now_s=self.now_s, members=("camera", "gateway")))
        return view(running, parts=True)

    async def pause(self, name: str) -> RolloutView:
        return self._on(name, deciding.Pause(now_s=1.7e9))

    async def resume(self, name: str) -> RolloutView:
        return self._on(name, deciding.Resume(now_s=1.7e9))

    async def cancel(self, name: str) -> RolloutView:
        return self._on(name, deciding.Cancel(now_s=1.7e9))

    async def rollback(self, name: str, reason: str) -> RolloutView:
        return self._on(name, deciding.GoBack(now_s=1.7e9, reason=reason))

    def _on(self, name: str, event: deciding.Event) -> RolloutView:
        running = find(self.running, name, "rollout")
        running.rollout, _ = deciding.step(running.spec.plan, running.rollout, event)
        return view(running, parts=False)


class MemoryEvents:
    async def after(self, number: int, device: str) -> tuple[EventView, ...]:
        return tuple(one for one in EVENTS if one.number > number and device in ("", one.device))

    async def last(self, count: int, device: str) -> tuple[EventView, ...]:
        return (await self.after(0, device))[-count:]


class MemoryAudits:
    def __init__(self) -> None:
        self.entries: list[AuditRow] = []

    async def note(self, entry: AuditRow) -> None:
        self.entries.append(replace(entry, number=len(self.entries) + 1))

    async def after(self, number: int) -> tuple[AuditView, ...]:
        found = [one for one in self.entries if one.number > number]
        return tuple(msgspec.convert(one, AuditView, from_attributes=True) for one in found)

    async def last(self, count: int) -> tuple[AuditView, ...]:
        return (await self.after(0))[-count:]


EVENTS = (
    EventView(number=1, at_s=1.7e9, device="camera", name="appeared", text="pending"),
    EventView(
        number=2, at_s=1.7e9, device="gateway", name="training_failed", code="E_DATA", text="\x1b[31mx"
    ),
)


class MemoryJobs:
    def __init__(self, memory: "MemoryOperations") -> None:
        self.memory = memory

    async def create(self, yaml_text: str, base_dir: str) -> JobView:
        if self.memory.disk_full:
            raise DiskError("disk full")
        spec = parse_job(yaml_text, "job")
        structures = (StructureView(id="mlp-hidden4", family="mlp", parameters=12, devices=2),)
        job = JobView(
            name=spec.name,
            state="running",
            rounds_done=0,
            rounds_total=spec.rounds.count,
            created_s=1.7e9,
            structures=structures,
        )
        self.memory.trainings[spec.name] = job
        self.memory.base_dirs[spec.name] = base_dir
        return job

    async def check(self, yaml_text: str, base_dir: str) -> JobSpec:
        spec = parse_job(yaml_text, "job")
        if spec.name in self.memory.trainings:
            raise ConfigError("job", [f"name: a job {spec.name} exists already"])
        return spec

    async def list(self) -> tuple[JobSummary, ...]:
        return tuple(summary(job) for job in self.memory.trainings.values())

    async def show(self, name: str) -> JobView:
        self.memory.trainings[name] = self.memory.look(find(self.memory.trainings, name, "job"))
        return self.memory.trainings[name]

    async def pause(self, name: str) -> JobView:
        return self._state(name, "running", "paused")

    async def resume(self, name: str) -> JobView:
        return self._state(name, "paused", "running")

    async def abort(self, name: str) -> JobView:
        return self._state(name, find(self.memory.trainings, name, "job").state, "aborted")

    async def delete(self, name: str) -> None:
        if find(self.memory.trainings, name, "job").state == "running":
            raise StateError(f"job {name} is running")
        del self.memory.trainings[name]

    def _state(self, name: str, before: str, after: JobState) -> JobView:
        job = find(self.memory.trainings, name, "job")
        if job.state != before:
            raise StateError(f"job {name} is {job.state}")
        self.memory.trainings[name] = msgspec.structs.replace(job, state=after)
        return self.memory.trainings[name]


class MemoryPlans:
    def __init__(self, memory: "MemoryOperations") -> None:
        self.memory = memory

    async def show(self, job_name: str | None, yaml_text: str | None) -> PlanView:
        if yaml_text is not None:
            name = parse_job(yaml_text, "job").name
        else:
            name = find(self.memory.trainings, job_name or next(iter(self.memory.trainings), ""), "job").name
        assignment = AssignmentView(
            device="gateway",
            profile="gateway",
            tier="full",
            structure="mlp-hidden4",
            variant_bytes=900,
            budget_bytes=65_536,
            density=0.05,
            why="the largest that fits",
            link="link of 64 kbit/s measured: 0.40 % instead of 1.00 %",
        )
        if not self.memory.fits:
            why = "no usable local data"
            assignment = msgspec.structs.replace(assignment, structure="", why=why, link="")
        structures = (StructureView(id="mlp-hidden4", family="mlp", parameters=12, devices=1),)
        return PlanView(
            job=name, assignments=(assignment,), structures=structures, dry_run=yaml_text is not None
        )


class MemoryModels:
    def __init__(self, memory: "MemoryOperations") -> None:
        self.memory = memory

    async def list(self) -> tuple[VersionView, ...]:
        return (VERSIONS[0],)

    async def log(self, model: str) -> tuple[VersionView, ...]:
        return find({"digits": tuple(VERSIONS)}, model, "model")

    async def version(self, model: str, ref: str) -> VersionView:
        rows = await self.log(model)
        known = {str(row.version): row for row in rows} | {"latest": rows[0], "stable": rows[1]}
        return find(known, ref, "version")

    async def ensemble(self, model: str, ref: str) -> EnsembleView:
        await self.version(model, ref)
        return EnsembleView(method="uniform", members=("mlp-hidden4",), weights=((1.0, 1.0, 1.0, 1.0),))

    async def weights(self, model: str, ref: str, structure: str) -> tuple[Structure, DataContract, bytes]:
        row = await self.version(model, ref)
        find(row.digests, structure, "structure")
        if row.version == 1:  # a version whose weights are not what its digest says
            return STRUCTURE, DATA, to_bytes(-WEIGHTS)
        return STRUCTURE, DATA, to_bytes(WEIGHTS)

    async def sizes(self, model: str, ref: str, structure: str) -> SizesView:
        row = await self.version(model, ref)
        find(row.digests, structure, "structure")
        return SizesView(
            structure=structure, parameters=12, keyframe_bytes=900, delta_bytes=100, tensors=TENSORS
        )


class MemoryVariants:
    def __init__(self, memory: "MemoryOperations") -> None:
        self.memory = memory

    async def commit(self, model: str, ref: str, manifest: VariantManifest, file: bytes) -> VariantView:
        row = await self.memory.models.version(model, ref)
        if sha256(file).hexdigest() != manifest.file:
            raise DigestError("the file is not the one that its manifest names")
        made = VariantView(
            model=model,
            version=row.version,
            parent=row.id,
            id=version_id(manifest),
            parent_structure=manifest.parent_structure,
            structure=manifest.structure.id,
            family=manifest.structure.family,
            params=manifest.structure.params,
            parameters=manifest.structure.parameters,
            bytes=manifest.size,
            budget_bytes=manifest.budget_bytes,
            file=manifest.file,
            digest=manifest.digest,
            method=manifest.method,
            why=manifest.why,
            divergence=manifest.divergence,
            agreement=manifest.agreement,
            accuracy=manifest.accuracy,
            seed=manifest.seed,
            created_s=1.7e9,
        )
        self.memory.committed[made.id] = (made, file)
        return made

    async def list(self, model: str, ref: str) -> tuple[VariantView, ...]:
        row = await self.memory.models.version(model, ref)
        made = [one for one, _ in self.memory.committed.values() if one.version == row.version]
        return tuple(sorted(made, key=lambda one: one.bytes))

    async def show(self, model: str, prefix: str) -> VariantDetail:
        await self.memory.models.log(model)
        made, _ = self._committed(prefix)
        return VariantDetail(variant=made, structure=STRUCTURE, data=DATA, tensors=TENSORS)

    async def file(self, model: str, prefix: str) -> bytes:
        await self.memory.models.log(model)
        return self._committed(prefix)[1]

    def _committed(self, prefix: str) -> tuple[VariantView, bytes]:
        return find(
            {sha[: len(prefix)]: made for sha, made in self.memory.committed.items()}, prefix, "variant"
        )


TENSORS = (
    TensorView(name="header", shape=(), weights=0, kind="header", bytes=40, distinct=0),
    TensorView(name="0.weight", shape=(4, 2), weights=8, kind="codebook", bytes=800, distinct=4),
    TensorView(name="0.bias", shape=(4,), weights=4, kind="half", bytes=60, distinct=4),
)


def a_version(number: int, tags: tuple[str, ...] = ()) -> VersionView:
    return VersionView(
        model="digits",
        version=number,
        id=f"{number:064x}",
        parent=f"{number - 1:064x}",
        created_s=1.7e9,
        round=number,
        updates=2,
        digests={"mlp-hidden4": digest(WEIGHTS).hex()},
        bytes={"mlp-hidden4": 900},
        ensemble="uniform",
        guard="",
        tags=tags,
    )


VERSIONS = [a_version(2), a_version(1, ("stable",))]


def find(known: dict[str, Found], name: str, what: str) -> Found:
    if name == "boom":
        raise RuntimeError("a fault that nobody foresaw")
    if name == "faulty":
        raise ConfigError("job.yaml", ["name: must match ^[a-z]", "rounds.count: must be >= 1 (got 0)"])
    if name not in known:
        raise NotFoundError(f"{what} {name}: not known")
    return known[name]


def summary(job: JobView) -> JobSummary:
    return msgspec.convert(job, JobSummary, from_attributes=True)


def next_round(job: JobView) -> JobView:
    """Publish one round more at every look, until the job is finished."""
    done = job.rounds_done + 1
    view = RoundView(round=done, state="published", invited=2, updates=2, seconds=1.5, up_bytes=1000)
    state: JobState = "finished" if done == job.rounds_total else "running"
    return msgspec.structs.replace(
        job,
        rounds=(*job.rounds, view),
        rounds_done=done,
        state=state,
        updates=job.updates + view.updates,
        up_bytes=job.up_bytes + view.up_bytes,
        down_bytes=job.down_bytes + view.down_bytes,
    )


@contextmanager
def served(operations: Operations | MemoryOperations, path: Path, group: str | None = None) -> Iterator[None]:
    """Serve in a thread of its own; the socket is bound when the block begins and gone when it has ended."""
    loop = asyncio.new_event_loop()
    started = threading.Event()
    holder: list[asyncio.Task[None]] = []

    async def program() -> None:
        task = asyncio.create_task(serve_uds(make_app(cast("Operations", operations)), path, group))
        holder.append(task)
        # `serve_uds` binds before it first waits: one turn of the loop and clients can connect
        await asyncio.sleep(0)
        started.set()
        await asyncio.gather(task, return_exceptions=True)

    thread = threading.Thread(target=loop.run_until_complete, args=(program(),))
    thread.start()
    started.wait(10)
    try:
        yield
    finally:
        loop.call_soon_threadsafe(holder[0].cancel)
        thread.join(10)
        loop.close()
