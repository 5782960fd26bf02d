"""Devices without torch: memory, heads on a frozen backbone, numpy, mixed fleets, the head in closed form.

`python -m benchmarks.light_devices --data FILE.npz --seed N [--quick]`: FILE has x, y and, for natural
devices, device and test. The last line is JSON: rss_peak_mb {ort, numpy}, closed_form_rel_error, accuracy
{full, head, numpy, mixed, full_half}, bytes_per_round_head, speed_ratio (numpy against torch, one thread).

- full: all devices train the whole network with torch; numpy: the same with numpy alone.
- full_half: only every other device, the whole network; mixed: the other half trains the head beside it.
- head: all devices train heads only, on the backbone that full_half left.
- rss_peak_mb: a real agent with its training process (`liberatai-agent run` against a real broker), 10
  rounds, every memory page counted once; ort: a head with onnxruntime, numpy: the whole network.
"""

import argparse
import json
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.simulation import Population, Simulation
from liberatai_coordinator.config import Aggregate, Head, JobSpec, Rounds, Sparsify, StructureChoice
from liberatai_coordinator.local import run as run_fleet
from liberatai_core.aggregator import ridge
from liberatai_core.contract.messages import Training
from liberatai_core.learning import head_training
from liberatai_core.learning.dataset import load_npz
from liberatai_core.learning.families import initial_weights, structure_of
from liberatai_core.learning.training import TrainSettings, train
from liberatai_core.profile import Trainer
from liberatai_core.structure import DataContract, Structure
from liberatai_core.weights import Vector

MOST = 12
"""Devices of a simulated fleet: those with the most samples."""
NETWORKS: dict[int, tuple[str, dict[str, Any]]] = {
    1: ("mlp", {"hidden": 64}),
    2: ("cnn1d", {"width": 8}),
    3: ("ds_cnn", {"width": 16}),
}
"""By axes of a sample."""
REFRESH = 2


def population(path: Path, seed: int, devices: int = MOST) -> Population:
    """Return natural devices where the file knows them, else ones drawn with label skew 0.5."""
    samples = load_npz(path)
    if samples.y is None:
        raise SystemExit("the file needs labels y")
    random = np.random.default_rng(seed)
    x, y, owner = samples.x, samples.y, samples.device
    if x.ndim == 3 and x.shape[1] > x.shape[2]:
        x = np.ascontiguousarray(np.moveaxis(x, -1, 1))  # signals come as (samples, channels)
    if len(x.shape) == 3 and x.shape[1] > 16:
        x = x[:, None]
    data = DataContract(input_shape=x.shape[1:], classes=max(int(y.max()) + 1, 2))
    held = samples.test if samples.test is not None and samples.test.any() else random.random(len(y)) < 0.2
    if owner is None:
        shares = random.dirichlet([0.5] * devices, data.classes)
        owner = np.array([random.choice(devices, p=shares[label]) for label in y])
    counts = {int(one): int((~held & (owner == one)).sum()) for one in np.unique(owner)}
    chosen = sorted(counts, key=lambda one: (-counts[one], one))[:devices]
    parts = [(x[~held & (owner == one)], y[~held & (owner == one)]) for one in chosen]
    return Population(
        data=data, devices=[part for part in parts if len(part[1]) >= 8], test=(x[held], y[held])
    )


def a_job(
    name: str, people: Population, choices: Sequence[StructureChoice], rounds: int, seed: int
) -> JobSpec:
    """Return a job of so many rounds."""
    return JobSpec(
        name=name,
        data=people.data,
        structures=tuple(choices),
        rounds=Rounds(count=rounds, overselect=1.0),
        training=Training(epochs=2, learning_rate=0.05),
        sparsify=Sparsify(up_density=0.3, down_density=0.5, trained_share=1.0),
        aggregate=Aggregate(ensemble="uniform"),
        head=Head(refresh_rounds=REFRESH),
        seed=seed,
    )


def played(
    spec: JobSpec, people: Population, owners: Sequence[int], runtime: Trainer = "torch"
) -> tuple[dict[str, float], dict[int, float], dict[str, Any]]:
    """Return accuracy by structure, bytes per round and device of each structure, and the last views."""
    with tempfile.TemporaryDirectory(prefix="light-") as folder:
        simulation = Simulation(
            spec, people, Path(folder), evaluate_every=spec.rounds.count, structures=owners, runtime=runtime
        )
        try:
            *_, last = simulation.run()
            traffic = {
                place: float(
                    np.mean(
                        [
                            (device.traffic.up + device.traffic.down) / spec.rounds.count
                            for device, own in zip(simulation.devices.values(), owners, strict=True)
                            if own == place
                        ]
                    )
                )
                for place in sorted(set(owners))
            }
            views = {sid: one.view for sid, one in simulation.versions.now.members.items()}
            return last.accuracy, traffic, views
        finally:
            simulation.close()


def heads_only(
    people: Population, choice: StructureChoice, backbone: Vector, rounds: int, seed: int
) -> tuple[float, float]:
    """Return accuracy and bytes per round and device of a job of heads alone, on a given backbone."""
    spec = a_job("heads", people, [choice], rounds, seed)
    with tempfile.TemporaryDirectory(prefix="light-") as folder:
        simulation = Simulation(
            spec,
            people,
            Path(folder),
            evaluate_every=rounds,
            structures=[0] * len(people.devices),
            start=backbone,
        )
        try:
            first = None
            for end in simulation.run():
                if first is None:
                    first = end.traffic.up + end.traffic.down
                last = end
            later = last.traffic.up + last.traffic.down - (first or 0)
            per_round = later / max(rounds - 1, 1) / len(people.devices)
            return next(iter(last.accuracy.values())), per_round
        finally:
            simulation.close()


def closed_form(people: Population, structure: Structure, weights: Any) -> tuple[float, float]:
    """Return the relative error of the federated head against the central one, and its accuracy."""
    x = np.concatenate([part[0] for part in people.devices])
    y = np.concatenate([part[1] for part in people.devices])
    features = head_training.features(structure, people.data, weights, x)
    every = features.floats()
    ends = np.cumsum([len(part[1]) for part in people.devices])[:-1]
    parts = [
        ridge.sums(f, labels, people.data.classes, least=1)
        for f, labels in zip(np.split(every, ends), np.split(y, ends), strict=True)
    ]
    central = np.concatenate([every, np.ones((len(y), 1), np.float32)], axis=1).astype(np.float64)
    strength = 1e-3
    size = every.shape[1]
    penalty = np.sqrt(strength * len(y)) * np.eye(size, size + 1)
    target = np.concatenate([np.eye(people.data.classes)[y], np.zeros((size, people.data.classes))])
    wanted = np.linalg.lstsq(np.concatenate([central, penalty]), target, rcond=None)[0]
    found, biases = ridge.solved(ridge.total(parts), strength)
    error = float(np.abs(np.vstack([found.T, biases]) - wanted).max() / np.abs(wanted).max())
    test = head_training.features(structure, people.data, weights, people.test[0]).floats()
    right = float(((test @ found.T + biases).argmax(axis=1) == people.test[1]).mean())
    return error, right


def speed_ratio(people: Population, structure: Structure) -> float:
    """Return samples per second of numpy over those of torch, one thread, the best of three."""
    x, y = people.devices[0]
    weights = initial_weights(structure, people.data, 0)
    best: dict[Trainer, float] = {}
    runtimes: tuple[Trainer, ...] = ("torch", "numpy") * 3
    how = TrainSettings(epochs=2)
    for runtime in runtimes:
        started = time.perf_counter()
        train(structure, people.data, weights, x[:512], y[:512], how, 0, runtime=runtime)
        best[runtime] = min(best.get(runtime, 1e9), time.perf_counter() - started)
    return best["torch"] / best["numpy"]


# --- memory of a real agent --------------------------------------------------------------------------

JOB_TEXT = """
name: light
data: {{input_shape: {shape}, classes: {classes}}}
structures: [{{family: {family}, params: {params}}}]
rounds: {{count: {rounds}, deadline_s: 120}}
training: {{epochs: 2}}
sparsify: {{trained_share: 1.0}}
"""
PROFILE = """
id: light-board
description: a board with little memory
arch: aarch64
cores: 1
cpu_share: 1.0
memory_mb: 120
storage: {model_kb: 2048}
net: {up_mbit: 20, down_mbit: 25}
gflops: 50
"""


def rss_peak_mb(people: Population, family: str, params: dict[str, Any], rounds: int) -> float:
    """Return the most memory, MB, that an agent and its training took together, pages counted once."""
    with tempfile.TemporaryDirectory(prefix="light-") as folder:
        where = Path(folder)
        (where / "board.yaml").write_text(PROFILE)
        text = JOB_TEXT.format(
            shape=list(people.data.input_shape),
            classes=people.data.classes,
            family=family,
            params=json.dumps(params),
            rounds=rounds,
        )
        (where / "job.yaml").write_text(text)
        x, y = people.devices[0]
        np.savez(where / "private.npz", x=x, y=y)
        stop, peak = threading.Event(), [0.0]
        watching = threading.Thread(target=_watch, args=(stop, peak))
        watching.start()
        try:
            run_fleet(
                where / "job.yaml",
                {"board": where / "private.npz"},
                profiles={"board": where / "board.yaml"},
                quiet=True,
            )
        finally:
            stop.set()
            watching.join()
        return peak[0]


def _watch(stop: threading.Event, peak: list[float]) -> None:
    while not stop.wait(0.05):
        peak[0] = max(peak[0], _agent_mb())


def _agent_mb() -> float:
    """Return the memory of the agent's processes now: what is their own, and once what they share."""
    own, shared = 0, 0
    for process in psutil.Process().children(recursive=True):
        try:
            words = process.cmdline()
            if not any("liberatai_agent" in word for word in words) or any("bench" in word for word in words):
                continue
            found = process.memory_full_info()
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
        own += found.uss
        shared = max(shared, found.rss - found.uss)
    return (own + shared) / 1e6


def main() -> int:
    """Print one line per step on stderr, and JSON on the last line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="six rounds instead of twenty, fewer samples")
    parser.add_argument("--no-memory", action="store_true", help="do not start real agents")
    args = parser.parse_args()
    rounds = 6 if args.quick else 20
    people = population(args.data, args.seed, 6 if args.quick else MOST)
    family, params = NETWORKS[len(people.data.input_shape)]
    structure = structure_of(family, params, people.data)
    whole = StructureChoice(family=family, params=params)
    head = StructureChoice(family=family, params={**params, "train": "head"}, density=0.25)
    everyone = [0] * len(people.devices)
    half = Population(data=people.data, devices=people.devices[::2], test=people.test)
    accuracy: dict[str, float] = {}

    def said(name: str, value: float) -> None:
        accuracy[name] = round(value, 4)
        sys.stderr.write(f"{name}: {value:.2%}\n")

    found, _, _ = played(a_job("full", people, [whole], rounds, args.seed), people, everyone)
    said("full", found[structure.id])
    found, _, _ = played(a_job("numpy", people, [whole], rounds, args.seed), people, everyone, "numpy")
    said("numpy", found[structure.id])
    found, _, views = played(a_job("half", people, [whole], rounds, args.seed), half, [0] * len(half.devices))
    said("full_half", found[structure.id])
    owners = [place % 2 for place in range(len(people.devices))]
    found, _, _ = played(a_job("mixed", people, [whole, head], rounds, args.seed), people, owners)
    said("mixed", found[structure.id])
    right, per_round = heads_only(people, head, views[structure.id], rounds, args.seed)
    said("head", right)
    error, right = closed_form(people, structure, views[structure.id])
    said("closed_form", right)
    report: dict[str, Any] = {
        "data": args.data.name,
        "seed": args.seed,
        "quick": args.quick,
        "network": structure.id,
        "parameters": structure.parameters,
        "devices": len(people.devices),
        "rounds": rounds,
        "accuracy": accuracy,
        "closed_form_rel_error": error,
        "bytes_per_round_head": round(per_round),
        "speed_ratio": round(speed_ratio(people, structure), 2),
    }
    if not args.no_memory:
        report["rss_peak_mb"] = {
            "ort": round(rss_peak_mb(people, family, head.params, 10), 1),
            "numpy": round(rss_peak_mb(people, family, params, 10), 1),
        }
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
