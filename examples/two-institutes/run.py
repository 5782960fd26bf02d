"""Two institutes train apart on data that neither may show, and merge what they made.

Each has a broker, a coordinator and three devices of its own. North has only the digits 0-4, south only 5-9.
A registry carries their models from one to the other; no sample goes that way.
"""

import argparse
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np

from liberatai_coordinator.cli.app import main as liberatai
from liberatai_coordinator.demo.digits import Samples, load
from liberatai_coordinator.local import LocalDevice, LocalFleet, wait
from liberatai_coordinator.repository import tensors
from liberatai_coordinator.repository.store import Store
from liberatai_core.errors import LiberataiError
from liberatai_core.learning.training import log_probabilities
from liberatai_core.model import load as load_model

HERE = Path(__file__).parent
HAS = {"north": range(5), "south": range(5, 10)}
DEVICES = 3
COLOURS = {"north": "#0072b2", "south": "#d55e00", "merged": "#009e73"}  # apart for any colour vision


def deal(samples: Samples, folder: Path, seed: int) -> Samples:
    """Write every file: three devices per institute, and what both may see. Returns the test set.

    Both may see 300 digits without labels, which teach, and 300 with labels, which judge the merge. 400 others
    are the test set: no file has them.
    """
    rng = np.random.default_rng(seed)
    test, unlabeled, held_out, private = np.split(rng.permutation(len(samples)), [400, 700, 1000])
    np.savez(folder / "unlabeled.npz", x=samples.x[unlabeled])
    np.savez(folder / "held-out.npz", x=samples.x[held_out], y=samples.y[held_out])
    for name, digits in HAS.items():
        own = private[np.isin(samples.y[private], digits)]
        for number, rows in enumerate(np.array_split(own, DEVICES), start=1):
            np.savez(folder / f"{name}-{number}.npz", x=samples.x[rows], y=samples.y[rows])
    return samples.pick(test)


def train(name: str, folder: Path) -> Path:
    """Run one institute's fleet until its job is finished; returns its model repository."""
    devices = [
        LocalDevice(id=f"{name}-{number}", data=folder / f"{name}-{number}.npz")
        for number in range(1, DEVICES + 1)
    ]
    said = 0

    def say(job) -> None:
        nonlocal said
        done = [one for one in job.rounds if one.state == "published"]
        if len(done) > said:
            said = len(done)
            print(f"{name}: round {said} of {job.rounds_total}, {done[-1].updates} updates", flush=True)

    with LocalFleet(folder / name, devices, fleet=name) as fleet:
        fleet.client.jobs.create((HERE / f"{name}.yaml").read_text(), str(folder))
        wait(fleet, "digits", say)
        return fleet.folders.coordinator_state / "models"


def command(who: str, store: Path, *words: str) -> None:
    """Run `liberatai models …` as this institute would."""
    print(f"\n{who}$ liberatai models {' '.join(words)}", flush=True)
    if code := liberatai(["models", "--store", str(store), *words]):
        sys.exit(code)


@contextmanager
def registry(folder: Path) -> Iterator[str]:
    """Run Debian's docker-registry on a free port of this machine; yields its address."""
    program = shutil.which("docker-registry")
    if program is None:
        sys.exit("no registry here: apt-get install docker-registry, or give one with --registry HOST:PORT")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = {
        "version": "0.1",
        "storage": {"filesystem": {"rootdirectory": str(folder / "registry")}},
        "http": {"addr": f"127.0.0.1:{port}"},
    }
    (folder / "registry.yml").write_text(json.dumps(settings))  # JSON is YAML
    with (folder / "registry.log").open("wb") as log:
        running = subprocess.Popen([program, "serve", str(folder / "registry.yml")], stdout=log, stderr=log)
    try:
        until = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                if running.poll() is not None or time.monotonic() > until:
                    sys.exit(
                        f"docker-registry does not answer: {(folder / 'registry.log').read_text()[-500:]}"
                    )
                time.sleep(0.05)
        yield f"127.0.0.1:{port}"
    finally:
        running.terminate()
        running.wait()


def exchange(north: Path, south: Path, there: str, folder: Path) -> None:
    """Let both trust and fetch one another's model, merge, and fetch the merge."""
    stores = {"north": north, "south": south}
    keys = {name: Store(store).trusted()[0].key for name, store in stores.items()}
    for name, other in (("north", "south"), ("south", "north")):
        command(name, stores[name], "trust", other, keys[other], "--model", "digits")
    for name, store in stores.items():
        command(name, store, "push", "digits", f"{there}/institutes/digits:{name}")
    command("north", north, "fetch", f"{there}/institutes/digits:south")
    judged = ["--held-out", str(folder / "held-out.npz"), "--unlabeled", str(folder / "unlabeled.npz")]
    command("north", north, "merge", "digits", "digits:south", *judged, "--branch", "merged")
    command("north", north, "push", "digits:merged", f"{there}/institutes/digits:merged")
    command("south", south, "fetch", f"{there}/institutes/digits:merged")
    command("south", south, "log", "digits:merged", "--graph", "-n", "4")
    command("south", south, "pull", "digits:merged", "--budget", "12KB", "--out", str(folder / "pulled"))


def right(store: Path, ref: str, test: Samples) -> np.ndarray:
    """Return which digits of the test set the best structure of a commit gets right."""
    repository = Store(store)
    commit = repository.read(repository.find(ref)).commit
    said = [
        log_probabilities(structure, commit.data, weights, test.x).argmax(1) == test.y
        for structure, weights in tensors.members(repository, commit).values()
    ]
    return max(said, key=np.sum)


def draw(found: dict[str, np.ndarray], test: Samples, path: Path) -> None:
    """Draw what share of each digit the three models get right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 4), layout="constrained")
    width = 0.27
    for place, (name, hits) in enumerate(found.items()):
        per_digit = [100 * hits[test.y == digit].mean() for digit in range(10)]
        label = f"{name}: {hits.mean():.1%} of all"
        axes.bar(np.arange(10) + (place - 1) * width, per_digit, width, color=COLOURS[name], label=label)
    axes.axvline(4.5, color="#57606a", linewidth=1, linestyle=":")
    axes.set(xlabel="digit (north's devices have 0-4, south's 5-9)", ylabel="right in % of the test set")
    axes.set_ylim(0, 104)
    axes.set_xticks(range(10))
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Two institutes, one model.", epilog="Example: python run.py"
    )
    parser.add_argument(
        "--registry", metavar="HOST:PORT", help="an OCI registry [default: docker-registry, started here]"
    )
    parser.add_argument(
        "--picture", type=Path, default=Path("two-institutes.png"), help="PNG to write [%(default)s]"
    )
    parser.add_argument("--seed", type=int, default=1, help="of how the digits are dealt [%(default)s]")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="liberatai-") as temporary:
        folder = Path(temporary)
        test = deal(load(), folder, given.seed)
        with registry(folder) if given.registry is None else nullcontext(given.registry) as there:
            print("north and south: a broker, a coordinator and 3 devices each …", flush=True)
            with ThreadPoolExecutor(2) as pool:
                north, south = pool.map(lambda name: train(name, folder), HAS)
            exchange(north, south, there, folder)
        found = {
            "north": right(north, "digits", test),
            "south": right(south, "digits", test),
            "merged": right(south, "digits:merged", test),
        }
        pulled = load_model(folder / "pulled" / "model.lam").predict(test.x).labels == test.y
    draw(found, test, given.picture)
    shares = ", ".join(f"{name} {hits.mean():.1%}" for name, hits in found.items())
    print(f"\n{len(test)} digits of all ten kinds that no device had: {shares} right ({given.picture})")
    print(f"pulled for a device with 12 KB to spare: {pulled.mean():.1%} right")
    if found["merged"].mean() <= max(found["north"].mean(), found["south"].mean()):
        sys.exit("the merge is no better than what it was made of")


if __name__ == "__main__":
    try:
        main()
    except LiberataiError as error:
        sys.exit(f"{error.code}: {error}")
