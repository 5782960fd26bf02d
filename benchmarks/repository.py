"""The model repository: what it costs, what a kill leaves, what merging and going on from a commit gain.

    python -m benchmarks.repository [--quick] [--seed N] [--runs N] [--only PART …]

Parts: commit (60 MB against `cp`, `sync`, `sha256sum`), delta (second commit with 1 % changed coordinates),
log (10 000 commits), kills (kill -9 at random moments of commit, tag, gc, push), writers (8 processes, 50
tags each), hostile (files that are no models), push (300 MB, cut ten times), finetune (rounds to the same
accuracy), merge (two halves).
"""

import argparse
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from liberatai_coordinator.repository import care, imports, merge, signing, tensors, trust
from liberatai_coordinator.repository.commits import Commit, index_of, manifest_of
from liberatai_coordinator.repository.descriptors import (
    INDEX,
    MANIFEST,
    SIGNATURE,
    Index,
    describe,
    digest_of,
    encode,
)
from liberatai_coordinator.repository.files import About, commit_weights
from liberatai_coordinator.repository.names import parse_place
from liberatai_coordinator.repository.remote import transfer
from liberatai_coordinator.repository.remote.registry import Registry
from liberatai_coordinator.repository.store import Loaded, Store
from liberatai_core.errors import LiberataiError
from liberatai_core.learning.families import initial_weights, structure_of
from liberatai_core.learning.training import TrainSettings, log_probabilities, train
from liberatai_core.structure import DataContract, Structure, Tensor
from liberatai_core.weights import Vector

Result = dict[str, Any]
COMMITS: Final = 10_000
TURNED: Final = 15
"""Degrees. From 30 on a model that is sure of upright digits takes longer than a new one."""


def shape(values: int) -> Structure:
    """Return a structure of about so many values."""
    return Structure("tensors", {}, (Tensor("w", (max(values // 1000, 1), 1000)),))


def add(
    store: Store, structure: Structure, weights: Vector, *parents: Loaded, branch: str | None = "latest"
) -> Loaded:
    """Commit weights."""
    variant = tensors.variant_of(structure, weights)
    before = parents[0].commit.variants[0] if parents else None
    draft = Commit(
        model="big",
        kind="import",
        parents=tuple(one.digest for one in parents),
        time=len(parents),
        variants=(variant,),
    )
    layers = {variant.name: tensors.layers_for(store, structure, weights, before)}
    return store.write(draft, layers, branch=branch, force=True)


def stored_bytes(folder: Path) -> int:
    """Return the bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def commit(folder: Path, seed: int, quick: bool) -> Result:
    """Commit and read back a model, against what the shell takes for a copy, a sync and a hash."""
    structure = shape(1_500_000 if quick else 15_000_000)
    random = np.random.default_rng(seed)
    ratios, seconds = [], []
    for turn in range(3 if quick else 5):
        weights = random.normal(size=structure.parameters).astype(np.float32)
        plain = folder / "plain"
        plain.write_bytes(weights.tobytes())
        os.sync()
        started = time.perf_counter()
        line = f"cp {plain} {folder}/copy{turn} && sync {folder}/copy{turn} && sha256sum {folder}/copy{turn}"
        subprocess.run(line, shell=True, check=True, capture_output=True)  # noqa: S602 - our own names
        base = time.perf_counter() - started
        store = Store(folder / f"commit{turn}")
        started = time.perf_counter()
        made = add(store, structure, weights)
        back = tensors.read(store, made.commit.variants[0])
        seconds.append(time.perf_counter() - started)
        ratios.append(seconds[-1] / base)
        assert np.array_equal(back, weights)
    return {"commit_ratio": float(np.median(ratios)), "commit_seconds": float(np.median(seconds))}


def delta(folder: Path, seed: int, quick: bool) -> Result:
    """Commit the same model again with one per cent of its coordinates changed."""
    structure = shape(1_500_000 if quick else 15_000_000)
    random = np.random.default_rng(seed)
    weights = (0.05 * random.normal(size=structure.parameters)).astype(np.float32)
    store = Store(folder / "delta")
    first = add(store, structure, weights)
    changed = weights.copy()
    places = random.choice(weights.size, weights.size // 100, replace=False)
    changed[places] += (0.005 * random.normal(size=places.size)).astype(np.float32)
    before = stored_bytes(store.folder)
    made = add(store, structure, changed, first)
    assert np.array_equal(tensors.read(store, made.commit.variants[0]), changed)
    return {"delta_bytes_share": (stored_bytes(store.folder) - before) / weights.nbytes}


def log(folder: Path, seed: int, quick: bool) -> Result:
    """List a long history by the command, and in this process."""
    count = COMMITS // 20 if quick else COMMITS
    structure = shape(1000)
    store = Store(folder / "log")
    random = np.random.default_rng(seed)
    os.environ["LIBERATAI_STORE"] = str(store.folder)
    with without_sync():
        made = add(store, structure, random.normal(size=structure.parameters).astype(np.float32))
        newest = _history(store, made, count)
    Store(store.folder).set_ref("big", "latest", newest, kind="branch", force=True)
    started = time.perf_counter()
    entries = list(Store(store.folder).log([newest]))
    cold = time.perf_counter() - started
    started = time.perf_counter()
    entries = list(Store(store.folder).log([newest]))
    inside = time.perf_counter() - started
    assert len(entries) == count
    times = []
    for _ in range(3):
        started = time.perf_counter()
        command = [sys.executable, "-m", "liberatai_coordinator", "models", "log", "big"]
        subprocess.run(command, check=True, capture_output=True)
        times.append(time.perf_counter() - started)
    return {
        "log_seconds_10k": inside,
        "log_seconds_all_verified": cold,
        "log_command_seconds": min(times),
        "log_commits": count,
    }


def _history(store: Store, first: Loaded, count: int) -> str:
    """Write so many commits after one another, a few hundred at a time; returns the newest one's digest."""
    key, parent = trust.own_key(store.folder), first.digest
    blobs: dict[str, bytes] = {}
    beside: dict[Path, bytes] = {}
    (store.folder / "referrers").mkdir(exist_ok=True)
    for number in range(1, count):
        record = Commit(
            model="big",
            kind="round",
            parents=(parent,),
            time=number,
            number=number,
            variants=first.commit.variants,
        )
        own, config = manifest_of(record, ())
        index = index_of(record, own)
        described = describe(index, INDEX)
        signed, parts = signing.signature_manifest(signing.sign(key, described.digest, "big"), described)
        blobs |= {digest_of(one): one for one in (own, config, index, signed, *parts)}
        note = msgspec.structs.replace(describe(signed, MANIFEST), artifact_type=SIGNATURE)
        beside[store.folder / "referrers" / described.sha] = encode(
            Index(schema_version=2, manifests=(note,))
        )
        parent = described.digest
        if number % 400 == 0 or number == count - 1:
            store.layout.put_named(blobs, beside)
            blobs, beside = {}, {}
    return parent


@contextmanager
def without_sync() -> Iterator[None]:
    """Build what is only measured later without waiting for the disk."""
    real, os.fsync = os.fsync, lambda _handle: None  # type: ignore[assignment]
    try:
        yield
    finally:
        os.fsync = real


# --- kills ----------------------------------------------------------------------------------------


def worker(folder: Path, seed: int, place: str) -> None:
    """Commit, tag, collect and push for ever; every name that was promised is told before the next step."""
    store = Store(folder)
    structure = shape(20_000)
    random = np.random.default_rng(seed)
    told = (folder / "told").open("a", buffering=1)
    made = store.read(store.find("big"))
    number = len(store.names("big"))
    while True:
        weights = tensors.read(store, made.commit.variants[0]).copy()
        weights[random.integers(weights.size, size=50)] += 1
        made = add(store, structure, weights, made)
        told.write(f"latest {made.digest}\n")
        number += 1
        tag = f"t{seed}-{number}"
        store.set_ref("big", tag, made.digest, kind="tag", force=True)
        told.write(f"{tag} {made.digest}\n")
        if number % 3 == 0:
            care.gc(store, lambda _entry, age: age < 5)
        if number % 4 == 0 and place:
            where = parse_place(place)
            with Registry(where.host, where.name) as registry:
                transfer.push(store, made.digest, where, registry, force=True)
            told.write(f"pushed {made.digest}\n")


def kills(folder: Path, seed: int, runs: int) -> Result:
    """Kill a process that writes at random moments; then look for names that are lost or broken."""
    random = np.random.default_rng(seed)
    store = Store(folder / "kills")
    structure = shape(20_000)
    add(store, structure, random.normal(size=structure.parameters).astype(np.float32))
    context = multiprocessing.get_context("fork")
    broken = lost = 0
    with registry(folder) as host:
        place = f"{host}/lab/big:v1" if host else ""
        for run in range(runs):
            process = context.Process(target=worker, args=(store.folder, run, place))
            process.start()
            time.sleep(float(random.uniform(0.02, 0.6)))
            os.kill(process.pid or 0, signal.SIGKILL)
            process.join()
            again = Store(store.folder)
            promised: dict[str, str] = {}
            pushed = ""
            for line in (
                (store.folder / "told").read_text().splitlines() if (store.folder / "told").exists() else []
            ):
                name, _, digest = line.partition(" ")
                if len(digest) == 71:
                    promised[name] = digest
                    pushed = digest if name == "pushed" else pushed
            named = {one.tag: one.digest for one in again.names("big")}
            for name, digest in promised.items():
                if name not in ("latest", "pushed") and named.get(name) != digest:
                    lost += 1
            if "latest" in promised and not again.is_ancestor(promised["latest"], named["latest"]):
                lost += 1
            faults = [
                fault for digest in set(named.values()) for fault in care.verify(again, digest, parents=False)
            ]
            broken += len(faults)
            if pushed and run % 20 == 0:
                broken += _broken_there(folder, store, place)
            if run % 10 == 9:  # old names go, so that every look stays short
                for tag in sorted(set(named) - {"latest"})[:-5]:
                    again.remove_ref("big", tag)
                (store.folder / "told").unlink()
    return {"crash_runs": runs, "broken_refs": broken + lost}


def _broken_there(folder: Path, store: Store, place: str) -> int:
    """Return whether what a killed push left at the registry cannot be read."""
    other = Store(folder / f"fetched{time.monotonic_ns()}")
    trust.trust(other.folder, "them", signing.public_key(trust.own_key(store.folder)), ("*",))
    where = parse_place(place)
    try:
        with Registry(where.host, where.name) as registry_:
            found = transfer.fetch(other, where, registry_)
        return len(care.verify(other, found.loaded.digest, parents=False))
    except LiberataiError as error:
        print(f"  the registry: {error.code} {error}")
        return 1
    finally:
        shutil.rmtree(other.folder)


def _tagger(folder: Path, number: int, count: int) -> None:
    store = Store(folder)
    digest = store.find("big")
    for tag in range(count):
        store.set_ref("big", f"w{number}-{tag}", digest, kind="tag")


def writers(folder: Path, seed: int, quick: bool) -> Result:
    """Let eight processes tag at once."""
    store = Store(folder / "writers")
    structure = shape(1000)
    add(store, structure, np.random.default_rng(seed).normal(size=structure.parameters).astype(np.float32))
    count = 10 if quick else 50
    context = multiprocessing.get_context("fork")
    started = time.perf_counter()
    processes = [context.Process(target=_tagger, args=(store.folder, number, count)) for number in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    tags = [one for one in store.names("big") if one.kind == "tag"]
    return {"lost_tags": 8 * count - len(tags), "tag_seconds": (time.perf_counter() - started) / (8 * count)}


def hostile(folder: Path) -> Result:
    """Commit what must be refused."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tests.unit.coordinator.hostile_models import HOSTILE  # noqa: PLC0415

    store = Store(folder / "hostile")
    before = sorted(store.layout.blobs())
    refused = 0
    for name, content, code in HOSTILE.values():
        path = folder / name
        path.write_bytes(content)
        try:
            imports.load(path)
        except LiberataiError as error:
            refused += error.code == code
        path.unlink()
    assert sorted(store.layout.blobs()) == before
    return {"hostile_imports": len(HOSTILE), "hostile_refused": refused}


# --- the registry ---------------------------------------------------------------------------------


@contextmanager
def registry(folder: Path) -> Iterator[str]:
    """Run Debian's docker-registry; yields its address, "" where it is not installed."""
    if shutil.which("docker-registry") is None:
        print("docker-registry is not installed: pushes are left out")
        yield ""
        return
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    config = folder / "registry.yml"
    config.write_text(
        f"version: 0.1\nstorage: {{filesystem: {{rootdirectory: {folder}/registry}}}}\n"
        f"http: {{addr: '127.0.0.1:{port}'}}\nlog: {{level: error, accesslog: {{disabled: true}}}}\n"
    )
    command = ["docker-registry", "serve", str(config)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        for _ in range(600):
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                time.sleep(0.05)
        try:
            yield f"127.0.0.1:{port}"
        finally:
            process.terminate()


class Cutter:
    """A TCP relay that breaks connections after so many bytes upward, and counts them."""

    def __init__(self, port: int, cuts: list[int]) -> None:
        """Relay to a port of this machine; `cuts`: total bytes at which connections break."""
        self._target, self._cuts = port, cuts
        self.sent = 0
        self._lock = threading.Lock()
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            near, _ = self._server.accept()
            far = socket.create_connection(("127.0.0.1", self._target))
            threading.Thread(target=self._pump, args=(near, far, True), daemon=True).start()
            threading.Thread(target=self._pump, args=(far, near, False), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, up: bool) -> None:
        try:
            while part := source.recv(65_536):
                if up:
                    with self._lock:
                        self.sent += len(part)
                        cut = bool(self._cuts) and self.sent >= self._cuts[0]
                        if cut:
                            self._cuts.pop(0)
                    if cut:
                        for end in (source, sink):
                            end.shutdown(socket.SHUT_RDWR)
                        return
                sink.sendall(part)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            return


PUSH: Final = """
import json, sys
from pathlib import Path
from liberatai_coordinator.repository.names import parse_place
from liberatai_coordinator.repository.remote import transfer
from liberatai_coordinator.repository.remote.registry import Registry
from liberatai_coordinator.repository.store import Store

def peak():  # not getrusage: a child of a large process inherits its peak there
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))

before = peak()
store, where = Store(Path(sys.argv[1])), parse_place(sys.argv[2])
with Registry(where.host, where.name) as there:
    transfer.push(store, store.find("big"), where, there)
print(json.dumps({"rss_mb": peak(), "before_mb": before}))
"""
"""A push in a process of its own."""


def push(folder: Path, seed: int, quick: bool) -> Result:
    """Push a large model through a link that breaks ten times."""
    values = 7_500_000 if quick else 75_000_000
    structure = shape(values)
    store = Store(folder / "push")
    made = add(store, structure, np.random.default_rng(seed).standard_normal(values, np.float32))
    size = stored_bytes(store.folder)
    with registry(folder) as host:
        if not host:
            return {"push_rss_mb": None}
        cutter = Cutter(int(host.rpartition(":")[2]), [size * turn // 11 for turn in range(1, 11)])
        command = [sys.executable, "-c", PUSH, str(store.folder), f"127.0.0.1:{cutter.port}/lab/big:v1"]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        told = json.loads(done.stdout.splitlines()[-1])
        where = parse_place(f"{host}/lab/big:v1")
        with Registry(where.host, where.name) as there:
            assert there.has_manifest("v1") == made.digest
    return {
        "push_rss_mb": told["rss_mb"],
        "push_sent_ratio": cutter.sent / size,
        "push_megabytes": size / 1e6,
        "push_rss_before_mb": told["before_mb"],
    }


# --- learning -------------------------------------------------------------------------------------


def digits() -> tuple[Any, Any, DataContract]:
    """Return UCI's digits."""
    from sklearn.datasets import load_digits  # noqa: PLC0415

    found = load_digits()
    data = DataContract(input_shape=(1, 8, 8), classes=10)
    return (found.images / 16).astype(np.float32)[:, None], found.target.astype(np.int64), data


def finetune(seed: int, quick: bool) -> Result:
    """Count rounds of four devices to the same accuracy, from a commit and from scratch: turned digits."""
    from scipy.ndimage import rotate  # noqa: PLC0415

    x, y, data = digits()
    random = np.random.default_rng(seed)
    order = random.permutation(len(y))
    x, y = x[order], y[order]
    turned = np.stack([rotate(one[0], TURNED, reshape=False, order=1) for one in x])[:, None]
    structure = structure_of("cnn", {"width": 16}, data)
    scratch = initial_weights(structure, data, seed)
    before = train(structure, data, scratch, x[:900], y[:900], TrainSettings(epochs=10), seed).weights
    parts = np.array_split(np.arange(900, 1400), 4)
    goal = 0.8 if quick else 0.9

    def rounds(weights: Vector) -> int:
        for number in range(1, 61):
            made = [
                train(
                    structure, data, weights, turned[part], y[part], TrainSettings(epochs=1), seed + number
                ).weights
                for part in parts
            ]
            weights = np.mean(made, axis=0).astype(np.float32)
            said = log_probabilities(structure, data, weights, turned[1400:])
            if float(np.mean(said.argmax(1) == y[1400:])) >= goal:
                return number
        return 60

    fresh, gone_on = rounds(scratch), rounds(before)
    return {
        "finetune_rounds_ratio": gone_on / fresh,
        "finetune_rounds": [gone_on, fresh],
        "finetune_goal": goal,
    }


def merging(folder: Path, seed: int) -> Result:
    """Merge two halves that were trained apart, and compare with the better one and with trained together."""
    x, y, data = digits()
    random = np.random.default_rng(seed)
    order = random.permutation(len(y))
    x, y = x[order], y[order]
    test, held, inputs, rest = np.split(np.arange(len(y)), [400, 700, 1000])
    structure = structure_of("cnn", {"width": 16}, data)
    start = initial_weights(structure, data, seed)
    settings = TrainSettings(epochs=12)

    def accuracy(weights: Vector) -> float:
        said = log_probabilities(structure, data, weights, x[test])
        return float(np.mean(said.argmax(1) == y[test]))

    together = accuracy(train(structure, data, start, x[rest], y[rest], settings, seed).weights)
    shares = random.dirichlet([0.3, 0.3], 10)
    first = np.array([random.choice(2, p=shares[label]) for label in y[rest]]) == 0
    result: Result = {"merge_together": together}
    for name, mine in (("dirichlet", first), ("classes", y[rest] < 5)):
        store = Store(folder / f"merge-{name}")
        about = About(model="digits", data=data)
        base = commit_weights(store, structure, start, about, [], branch=None, kind="import")
        made, reached = [], []
        for part in (rest[mine], rest[~mine]):
            weights = train(structure, data, start, x[part], y[part], settings, seed).weights
            reached.append(accuracy(weights))
            made.append(
                commit_weights(store, structure, weights, about, [base.digest], branch=None, kind="finetune")
            )
        both = merge.merge(store, *made, held_out=(x[held], y[held]), unlabeled=x[inputs], seed=seed)
        ((_, weights),) = both.members.values()
        gain = accuracy(weights) - max(reached)
        result[f"merge_{name}"] = {"parents": reached, "merged": accuracy(weights), "gain_pt": 100 * gain}
    gains = [result[f"merge_{name}"]["gain_pt"] for name in ("dirichlet", "classes")]
    return result | {"merge_gain_pt": min(gains)}


def main() -> None:
    """Run the parts and print a line for each, and one JSON object at the end."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--runs", type=int, help="kills [default: 300; quick: 10]")
    parser.add_argument("--only", nargs="*", help="parts to run [default: all]")
    given = parser.parse_args()
    runs = given.runs or (10 if given.quick else 300)
    folder = Path(tempfile.mkdtemp(prefix="repository-"))
    parts: dict[str, Callable[[], Result]] = {
        "commit": lambda: commit(folder, given.seed, given.quick),
        "delta": lambda: delta(folder, given.seed, given.quick),
        "log": lambda: log(folder, given.seed, given.quick),
        "push": lambda: push(folder, given.seed, given.quick),
        "writers": lambda: writers(folder, given.seed, given.quick),
        "hostile": lambda: hostile(folder),
        "kills": lambda: kills(folder, given.seed, runs),
        "finetune": lambda: finetune(given.seed, given.quick),
        "merge": lambda: merging(folder, given.seed),
    }
    result: Result = {"benchmark": "repository", "seed": given.seed, "quick": given.quick}
    try:
        for name, part in parts.items():
            if given.only and name not in given.only:
                continue
            started = time.perf_counter()
            found = part()
            print(f"{name:<9} {time.perf_counter() - started:6.1f} s  {found}", flush=True)
            result |= found
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
