"""The same federated work through LiberatAI, Flower and NVIDIA FLARE, one after another on this machine.

Every device has the same samples in every system, and all train a network of 101 770 values (784-128-10) for
the same rounds: the others in numpy from the same weights, LiberatAI by its own trainer. Flower runs as its
deployment runtime (SuperLink, SuperNodes, plain TCP), NVFLARE as its proof of concept (mutual TLS), LiberatAI
over Mosquitto with mutual TLS and its default settings. A relay counts all bytes between devices and server.

Flower and NVFLARE live in environments of their own below --environments; what is missing is installed, and
where that fails the system is skipped with a line. The last line is JSON:

    {"systems": {name: {orchestration_s, bytes_up, bytes_down, idle_rss_mb, packages, accuracy, ...}},
     "ratios": {name: {...}}}

`orchestration_s` is the median over the rounds after the first of what a round takes beside its longest local
training; `bytes_up` and `bytes_down` are per round and device. `ratios` are LiberatAI's over the other's.
`--accidents` ends a device, and LiberatAI's coordinator, with SIGKILL in the middle of a round.
"""

import argparse
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers import flower, nvflare, ours
from benchmarks.peers.measure import Found
from benchmarks.peers.work import INPUTS

SYSTEMS = ("liberatai", "flower", "nvflare")
PACKAGES = {"flower": ["flwr>=1.40", "numpy"], "nvflare": ["nvflare>=2.8", "numpy"]}
TEST_SHARE = 0.2
SLOW_S = 12.0
"""Training of a peer in a run with an accident, so that there is a middle to hit."""


class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The module's text as it is, and every default."""


def parsed() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers", description=__doc__, formatter_class=_Help
    )
    parser.add_argument("--data", type=Path, help=".npz of 28x28 images; default: digits of scikit-learn")
    parser.add_argument("--samples", type=int, default=6_000, help="of --data")
    parser.add_argument("--alpha", type=float, default=1.0, help="label skew of the devices (Dirichlet)")
    parser.add_argument("--devices", type=int, default=4, help="in every system")
    parser.add_argument("--rounds", type=int, default=20, help="in every system")
    parser.add_argument("--epochs", type=int, default=2, help="local ones")
    parser.add_argument("--seed", type=int, default=0, help="of samples, weights and training")
    parser.add_argument("--idle-s", type=float, default=60.0, help="for how long idle devices are watched")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS), help="to run")
    parser.add_argument("--accidents", action="store_true", help="see above; some minutes more")
    parser.add_argument("--environments", type=Path, default=Path(".cache/peers"), help="of the others")
    parser.add_argument("--quick", action="store_true", help="five rounds, idle for 20 s")
    parser.add_argument(
        "--picture", type=Path, default=Path(".cache/peers/peers.png"), help="accuracy by bytes"
    )
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.idle_s = min(options.rounds, 5), min(options.idle_s, 20.0)
    return options


def samples(options: argparse.Namespace) -> tuple[Any, Any]:
    """Return inputs in 0 … 1, shape (n, 784), and labels."""
    if options.data is None:
        from sklearn.datasets import load_digits  # noqa: PLC0415 - only where it is asked for

        pixels, labels = load_digits(return_X_y=True)
        larger = np.kron(pixels.reshape(-1, 8, 8) / 16, np.ones((3, 3)))
        return np.pad(larger, ((0, 0), (2, 2), (2, 2))).reshape(-1, INPUTS).astype("f4"), labels
    with np.load(options.data, allow_pickle=False) as file:
        x, y = file["x"], file["y"]
    rows = np.random.default_rng(options.seed).permutation(len(y))[: options.samples]
    x = x[rows].reshape(len(rows), -1).astype("f4")
    if x.shape[1] != INPUTS:
        raise SystemExit(f"{options.data}: samples of {x.shape[1]} values, wanted {INPUTS}")
    return x / max(float(x.max()), 1e-9), y[rows].astype(np.int64)


def prepare(options: argparse.Namespace, folder: Path, **more: Any) -> dict[str, Any]:
    """Write the work to an empty folder; return its settings."""
    x, y = samples(options)
    random = np.random.default_rng(options.seed)
    lot = random.permutation(len(y))
    test, rest = np.split(lot, [int(TEST_SHARE * len(y))])
    shares = random.dirichlet(np.full(options.devices, options.alpha), 10)
    owner = np.array([random.choice(options.devices, p=shares[label]) for label in y[rest]])
    owner[: 10 * options.devices] = np.arange(10 * options.devices) % options.devices  # nobody has nothing
    np.savez(folder / "test.npz", x=x[test], y=y[test])
    for device in range(options.devices):
        rows = rest[owner == device]
        np.savez(folder / f"device-{device}.npz", x=x[rows], y=y[rows])
    given = {
        "devices": options.devices,
        "rounds": options.rounds,
        "seed": options.seed,
        "epochs": options.epochs,
    }
    given |= {"batch_size": 32, "learning_rate": 0.05, "slow_s": 0.0, "accident_s": 1.0, **more}
    (folder / "work.json").write_text(json.dumps(given))
    return given


def environment(name: str, where: Path) -> Path:
    """Return a peer's environment, made and filled if it is not there.

    Raises:
        RuntimeError: it cannot be installed; the text says why.
    """
    path = (where / name).absolute()
    done = path / "installed"
    if done.exists():
        return path
    print(f"{name}: installing {' '.join(PACKAGES[name])} in {path}", file=sys.stderr, flush=True)
    shutil.rmtree(path, ignore_errors=True)
    venv.create(path, with_pip=True)
    command: list[str | Path] = [
        path / "bin" / "python",
        "-m",
        "pip",
        "install",
        "-q",
        "--disable-pip-version-check",
    ]
    told = subprocess.run(
        [*command, *PACKAGES[name]], capture_output=True, text=True, check=False, timeout=900
    )
    if told.returncode:
        raise RuntimeError(told.stderr.strip().splitlines()[-1] if told.stderr.strip() else "pip failed")
    done.touch()
    return path


def in_folder(call: Callable[[Path], Any]) -> Any:
    """Call with a folder that is removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="peers-") as folder:
        return call(Path(folder))


def measured(name: str, options: argparse.Namespace) -> Found:
    """Run one system.

    Raises:
        RuntimeError: it cannot be installed, or does not do the work.
        TimeoutError: something did not come in time.
    """

    def work(folder: Path) -> Found:
        given = prepare(options, folder)
        if name == "liberatai":
            return ours.run(folder, given, options.idle_s)[0]
        if name == "flower":
            return flower.run(environment(name, options.environments), folder, given, options.idle_s)
        return nvflare.run(environment(name, options.environments), folder, given, options.idle_s)

    found: Found = in_folder(work)
    if options.accidents and name != "nvflare":
        accidents(name, options, found)
    return found


def accidents(name: str, options: argparse.Namespace, found: Found) -> None:
    """Kill a device in the middle of a round; with LiberatAI also the coordinator."""
    short = argparse.Namespace(**{**vars(options), "rounds": 3})
    if name == "flower":
        killed = in_folder(
            lambda folder: flower.run(
                environment(name, options.environments),
                folder,
                prepare(short, folder, slow_s=SLOW_S),
                0.0,
                kill=True,
            )
        )
        found.killed_s = killed.round_s[1] - killed.training_s[1] - found.orchestration_s
        return
    longer = {"epochs": 60 * options.epochs}
    calm, digests = in_folder(lambda folder: ours.run(folder, prepare(short, folder, **longer), 0.0))
    killed, _ = in_folder(lambda folder: ours.run(folder, prepare(short, folder, **longer), 0.0, "device"))
    found.killed_s = killed.round_s[1] - calm.round_s[1]
    _, again = in_folder(lambda folder: ours.run(folder, prepare(short, folder, **longer), 0.0, "server"))
    same = "the same weights, byte for byte" if again == digests else "OTHER WEIGHTS"
    found.notes.append(f"coordinator killed in the middle of a round and started again: {same}")
    found.server_killed_same = again == digests


def told(found: Found, options: argparse.Namespace) -> dict[str, Any]:
    """Return a system's figures."""
    per = options.rounds * options.devices
    figures = {
        "orchestration_s": found.orchestration_s,
        "bytes_up": found.up / per,
        "bytes_down": found.down / per,
        "accuracy": found.accuracy[-1],
        "accuracies": found.accuracy,
        "idle_rss_mb": found.idle_rss_mb,
        "idle_pss_mb": found.idle_pss_mb,
        "idle_mb_day": None if found.idle_bytes_day is None else found.idle_bytes_day / 1e6,
        "packages": found.packages,
        "installed_mb": found.installed_mb,
        "wall_s": found.wall_s,
        "device_killed_extra_s": found.killed_s,
        "server_killed_same": found.server_killed_same,
        "notes": found.notes,
    }
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in figures.items()}


def ratios(systems: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return LiberatAI's figures over those of the others."""
    own = systems.get("liberatai")
    if own is None:
        return {}
    names = (
        "orchestration_s",
        "bytes_up",
        "bytes_down",
        "idle_rss_mb",
        "idle_mb_day",
        "packages",
        "installed_mb",
    )
    return {
        other: {
            **{name: round(own[name] / row[name], 5) for name in names if own[name] and row[name]},
            "accuracy_pt": round(100 * (own["accuracy"] - row["accuracy"]), 2),
        }
        for other, row in systems.items()
        if other != "liberatai"
    }


def table(systems: dict[str, dict[str, Any]]) -> None:
    """Print the figures side by side."""
    rows = (
        ("seconds a round beside training", "orchestration_s", 1, "8.3f"),
        ("kB up per round and device", "bytes_up", 1e3, "8.1f"),
        ("kB down per round and device", "bytes_down", 1e3, "8.1f"),
        ("accuracy, %", "accuracy", 0.01, "8.1f"),
        ("idle memory of a device, MB", "idle_rss_mb", 1, "8.1f"),
        ("the same, shared pages divided", "idle_pss_mb", 1, "8.1f"),
        ("idle MB a day", "idle_mb_day", 1, "8.2f"),
        ("packages on a device", "packages", 1, "8.0f"),
        ("installed, MB", "installed_mb", 1, "8.1f"),
        ("job from start to end, s", "wall_s", 1, "8.1f"),
        ("a device killed: seconds more", "device_killed_extra_s", 1, "8.1f"),
    )
    print(f"{'':34}", *(f"{name:>10}" for name in systems))
    for text, key, unit, form in rows:
        values = [one[key] for one in systems.values()]
        print(f"{text:34}", *(f"{'-':>10}" if v is None else f"{format(v / unit, form):>10}" for v in values))
    for name, one in systems.items():
        for note in one["notes"]:
            print(f"{name}: {note}")


def picture(systems: dict[str, dict[str, Any]], path: Path, devices: int) -> None:
    """Draw accuracy by megabytes."""
    import matplotlib as mpl  # noqa: PLC0415 - only where a picture is wanted

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, one in systems.items():
        each = (one["bytes_up"] + one["bytes_down"]) * devices / 1e6
        axes.plot(
            [each * (number + 1) for number in range(len(one["accuracies"]))],
            one["accuracies"],
            "o-",
            label=name,
        )
    axes.set(xscale="log", xlabel="MB between all devices and the server", ylabel="accuracy")
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> int:
    """Run the systems and tell."""
    options = parsed()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what was started ends with us
    systems = {}
    for name in options.systems:
        try:
            found = measured(name, options)
        except (RuntimeError, TimeoutError, subprocess.SubprocessError) as error:
            print(f"{name}: skipped: {error}", file=sys.stderr, flush=True)
            continue
        systems[name] = told(found, options)
        print(f"{name}: done in {found.wall_s:.0f} s", file=sys.stderr, flush=True)
    if not systems:
        return 1
    table(systems)
    picture(systems, options.picture, options.devices)
    setting = {key: getattr(options, key) for key in ("devices", "rounds", "epochs", "seed", "alpha")}
    data = options.data.stem if options.data else "digits"
    print(
        json.dumps({"name": "peers", "data": data, **setting, "systems": systems, "ratios": ratios(systems)})
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
