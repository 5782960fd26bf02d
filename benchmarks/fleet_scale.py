"""The real coordinator with ten thousand devices: how long it is silent, and what it takes for everything.

    python -m benchmarks.fleet_scale --devices 10000 --invited 1000 --seed 0 [--rounds R] [--link broker]

The coordinator is a process of its own, as `wiring` builds it: real ledger on a disk, real frames and
signatures. The devices are simulated in this process (`fleet_devices`): they sign what they say before the
clock starts, so that their work counts nowhere. Between the two is a plain socket that follows MQTT's rules
(`fleet_link`), or with `--link broker` a real Mosquitto. Steps, and what the last line says of them:

- `join_s`: all devices introduce themselves until the coordinator counts all of them as online.
- `list_s`: the command `liberatai devices list`, from its start to its last line (median of three).
- a job in which every round invites `--invited` devices: `updates_per_cpu_s`, durable and receipted updates
  per second of the coordinator's processor time (median round); `receipt_p99_s`, since all devices of the
  round sent at once; `close_s`, last update sent to version published; `finish_s`, last version published to
  the last of all devices told; then `rss_mb` and `ledger_mb`, after `rounds` rounds. `--long` runs 200.
- a job that invites all devices: all but one answer, the coordinator is killed and started again, and the
  devices, which missed their receipts, send again. `recover_first_s` and `recover_s`: start of the process to
  the first and to the last receipt. `abort_s`: the job is aborted, all devices are told.
- `stall_ms_max`, `stall_ms_p99`: silences of the event loop over all of this, by a 5 ms ticker in it;
  `stall_busy_ms_max`: the most that its thread computed without a pause, which other load does not change.
"""

import argparse
import asyncio
import json
import os
import platform
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Protocol

import msgspec
import numpy as np

from benchmarks.fleet_coordinator import Silence
from benchmarks.fleet_devices import Devices
from benchmarks.fleet_link import Exchange
from liberatai_coordinator.brokers.start import RunningBroker, start_broker
from liberatai_coordinator.client.client import Client
from liberatai_core.contract.messages import Cancel, Receipt, Task
from liberatai_core.errors import LiberataiError
from liberatai_core.link.link import Connected, Received
from liberatai_core.link.mqtt import MqttLink, MqttSettings
from liberatai_core.structure import DataContract

ROOT: Final = Path(__file__).resolve().parent.parent
FLEET: Final = "scale"
DATA: Final = DataContract(input_shape=(1, 16, 16), classes=10)
LIMIT_S: Final = 900.0
"""Longest wait for one step: far beyond every figure that was ever seen."""
PACE: Final = 500
"""Updates on their way through a broker: a real one drops what its queue does not take."""
SENDERS: Final = 20
TELEMETRY_S: Final = 60.0
"""As agents have it without settings."""
REPEAT_S: Final = 5.0

JOB: Final = """
name: {name}
data: {{input_shape: [1, 16, 16], classes: 10}}
structures: [{{family: mlp, params: {{hidden: {hidden}}}}}]
rounds:
  {{count: {rounds}, target: {target}, overselect: 1.0, min_devices: {target}, quorum: 1.0, deadline_s: 7200}}
sparsify: {{up_density: 0.2, trained_share: 1.0}}
seed: {seed}
"""


class Wire(Protocol):
    """Where devices hand in what they say."""

    connected: asyncio.Event

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Take one message."""

    async def all_taken(self) -> None:
        """Wait until everything was taken: by the coordinator, or at least by the broker."""

    async def close(self) -> None:
        """Stop."""


class BrokerWire:
    """A connection to a real broker that speaks for all devices."""

    def __init__(self, settings: MqttSettings, devices: Devices) -> None:
        self.connected = asyncio.Event()
        self._link, self._devices = MqttLink(settings), devices
        self._queue: asyncio.Queue[tuple[str, bytes, bool]] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []

    async def open(self) -> None:
        """Connect and subscribe to what is said to devices."""
        root = f"lai/v1/{FLEET}"
        await self._link.subscribe(f"{root}/dn/+/+", f"{root}/pub/head/+", f"{root}/pub/b/+/+")
        await self._link.open()
        self._tasks = [asyncio.create_task(self._hear())]
        self._tasks += [asyncio.create_task(self._say()) for _ in range(SENDERS)]
        await self.connected.wait()

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Take one message."""
        self._queue.put_nowait((topic, payload, retain))

    async def all_taken(self) -> None:
        """Wait until the broker has acknowledged everything."""
        await self._queue.join()

    async def close(self) -> None:
        """Stop."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._link.close()

    async def _hear(self) -> None:
        async for event in self._link.events():
            if isinstance(event, Received):
                self._devices.receive(event.topic, event.payload)
                self._link.ack(event.token)
            elif isinstance(event, Connected):
                self.connected.set()

    async def _say(self) -> None:
        while True:
            topic, payload, retain = await self._queue.get()
            await self._link.publish(topic, payload, retain=retain)
            self._queue.task_done()


class Coordinator:
    """The coordinator's process and the ways to it."""

    def __init__(self, folder: Path, broker: RunningBroker | None, password: str) -> None:
        self.folder, self._broker = folder, broker
        self.state = folder / "state"
        self.exchange = folder / "exchange.sock"
        self._control, self._log = folder / "control.sock", folder / "coordinator.log"
        settings: dict[str, Any] = {"fleet": FLEET, "state_dir": str(self.state), "enrolment": "open"}
        self.state.mkdir(parents=True)
        if broker is not None:
            (folder / "password").write_text(password + "\n")
            settings |= {"broker": broker.url, "username": "coordinator"}
            settings["password_file"] = str(folder / "password")
        self._settings = folder / "coordinator.yaml"
        self._settings.write_text(json.dumps(settings))
        self.client = Client(self.state / "api.sock", timeout_s=LIMIT_S)
        self.silences: dict[str, Silence] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._server: asyncio.Server | None = None
        self._asked: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Queue()
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def start(self) -> float:
        """Start the process; returns when that was. `ready` waits until it answers."""
        if self._server is None:
            self._server = await asyncio.start_unix_server(self._met, str(self._control), limit=2**24)
        command = [sys.executable, "-m", "benchmarks.fleet_coordinator", "--settings", str(self._settings)]
        command += ["--control", str(self._control)]
        if self._broker is None:
            command += ["--exchange", str(self.exchange)]
        started = time.monotonic()
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(  # noqa: ASYNC220 - it takes a millisecond
                command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        return started

    async def ready(self) -> dict[str, Any]:
        """Wait until the API answers; returns what it says of itself."""
        self._streams = await asyncio.wait_for(self._asked.get(), LIMIT_S)
        while True:
            self._require_alive()
            try:
                return await asyncio.to_thread(self.client.health)
            except LiberataiError:
                await asyncio.sleep(0.02)

    def kill(self) -> None:
        """End the process as a crash does."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._streams = None

    async def stop(self) -> None:
        """End everything."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                await asyncio.to_thread(self._process.wait, 60)
            except subprocess.TimeoutExpired:
                self.kill()
        if self._server is not None:
            self._server.close()

    def cpu_s(self) -> float:
        """Return the processor time of all threads of the process (see clock_getcpuclockid(3))."""
        assert self._process is not None
        return time.clock_gettime((~self._process.pid << 3) | 2)

    def memory_mb(self) -> dict[str, float]:
        """Return resident memory now and at most."""
        assert self._process is not None
        lines = Path(f"/proc/{self._process.pid}/status").read_text().splitlines()
        found = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith(("VmRSS", "VmHWM"))}
        names = {"rss_mb": "VmRSS", "rss_peak_mb": "VmHWM"}
        return {name: round(int(found[key]) / 1024, 1) for name, key in names.items()}

    def ledger_mb(self) -> float:
        """Return what the ledger takes on the disk, its log included."""
        return round(sum(path.stat().st_size for path in self.state.glob("ledger.db*")) / 1e6, 2)

    async def note(self, step: str) -> None:
        """Note the silences of the loop since the last call under the name of a step."""
        assert self._streams is not None
        reader, writer = self._streams
        writer.write(b"\n")
        found = msgspec.json.decode(await reader.readline(), type=Silence, strict=False)
        self.silences[step] = self.silences.get(step, Silence()).joined(found)

    def _met(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._asked.put_nowait((reader, writer))

    def _require_alive(self) -> None:
        if self._process is not None and self._process.poll() is not None:
            tail = self._log.read_text(errors="replace").splitlines()[-15:]
            raise SystemExit("the coordinator has ended; its log ends:\n" + "\n".join(tail))


class Scale:
    """One run."""

    def __init__(self, given: argparse.Namespace, coordinator: Coordinator, devices: Devices) -> None:
        self.given, self.coordinator, self.devices = given, coordinator, devices
        self.wire: Wire
        self.found: dict[str, Any] = {}

    async def run(self, open_wire: Callable[[], Awaitable[Wire]]) -> None:
        """Run all steps; `found` has the figures."""
        self.wire = await open_wire()
        started = await self.coordinator.start()
        health = await self.coordinator.ready()
        self.found["start_s"] = time.monotonic() - started
        self.devices.trust(bytes.fromhex(health["public_key"]))
        await self.coordinator.note("start")
        await self.join()
        living = asyncio.create_task(self.live())
        try:
            await self._steps()
        finally:
            living.cancel()

    async def _steps(self) -> None:
        await self.list_devices()
        await self.rounds()
        self.found |= self.coordinator.memory_mb() | {"ledger_mb": self.coordinator.ledger_mb()}
        await self.recover()
        await self.abort()

    async def join(self) -> None:
        """Let all devices appear."""
        frames = self.devices.introductions()
        started, computed = time.monotonic(), self.coordinator.cpu_s()
        for topic, frame in frames:
            self.wire.publish(topic, frame, retain=True)
        await self.wire.all_taken()
        while (await self._health())["devices_online"] < self.given.devices:  # noqa: ASYNC110 - elsewhere
            await asyncio.sleep(0.1)
        self.found["join_s"] = time.monotonic() - started
        self.found["join_cpu_s"] = self.coordinator.cpu_s() - computed
        await self._done("join")

    async def live(self) -> None:
        """Let every device give a sign of life once in a telemetry interval."""
        devices = list(self.devices.all.values())
        pause_s = self.devices.telemetry_s / len(devices)
        due = time.monotonic()
        while True:
            for device in devices:
                due += pause_s
                if due > time.monotonic():
                    await asyncio.sleep(max(0.1, due - time.monotonic()))
                if self.wire.connected.is_set():
                    self.wire.publish(*self.devices.telemetry(device))

    async def list_devices(self) -> None:
        """Run the command that lists all devices."""
        command = [sys.executable, "-P", "-m", "liberatai_coordinator", "devices", "list"]
        environment = os.environ | {"LIBERATAI_SOCKET": str(self.coordinator.state / "api.sock")}
        seconds = []
        for _ in range(3):
            started = time.monotonic()
            process = await asyncio.create_subprocess_exec(
                *command, stdout=subprocess.PIPE, env=environment, limit=2**26
            )
            shown, _ = await process.communicate()
            seconds.append(time.monotonic() - started)
            lines = shown.decode().splitlines()
            if process.returncode or sum(line.lstrip().startswith("d") for line in lines) < len(
                self.devices.all
            ):
                raise SystemExit(f"devices list: {len(lines)} lines, exit code {process.returncode}")
        self.found["list_s"] = statistics.median(seconds)
        await self._done("list")

    async def rounds(self) -> None:
        """Run a job to its end."""
        given, name = self.given, "rounds"
        self.devices.reset()
        started = time.monotonic()
        await self._create(name, given.rounds, given.invited)
        per_cpu, closes, opens, receipts = [], [], [], []
        for number in range(1, given.rounds + 1):
            await self._hear(Task, given.invited)
            opens.append(self.devices.last_s[Task] - started)
            self.devices.reset()
            frames = [self.devices.answer(task) for task in self.devices.tasks_of(name, number)]
            assert len(frames) == given.invited
            await self._done("open")
            rate, late = await self._send(frames[:-1])
            per_cpu.append(rate)
            receipts += late
            await self._done("updates")
            started = time.monotonic()
            self.devices.reset()
            self.wire.publish(*frames[-1])
            await self._head(name, number, "running")
            published = self.devices.heads[name, number, "running"]
            closes.append(published - started)
            started = published
            await self._done("close")
            self._show(f"round {number}: {per_cpu[-1]:.0f} updates/CPU s, closed in {closes[-1]:.2f} s")
        await self._hear(Cancel, given.devices)
        self.found["finish_s"] = self.devices.last_s[Cancel] - started
        await self._done("finish")
        self._require_counted(name)
        self.found |= {
            "updates_per_cpu_s": statistics.median(per_cpu),
            "receipt_p99_s": float(np.percentile(receipts, 99)),
            "open_s": statistics.median(opens),
            "close_s": statistics.median(closes),
            "close_s_max": max(closes),
        }

    async def recover(self) -> None:
        """Kill the coordinator while an update of every device but one is pending, and start it again."""
        given = self.given
        self.devices.reset()
        started = time.monotonic()
        await self._create("pending", 1, given.devices)
        await self._hear(Task, given.devices)
        self.found["open_all_s"] = self.devices.last_s[Task] - started
        self.devices.reset()
        frames = [self.devices.answer(task) for task in self.devices.tasks_of("pending", 1)][:-1]
        await self._done("open all")
        self.found["updates_per_cpu_s_all"], _ = await self._send(frames)
        await self._done("updates of all")
        self.coordinator.kill()
        self.wire.connected.clear()
        started = await self.coordinator.start()
        ready = asyncio.create_task(self.coordinator.ready())
        if isinstance(self.wire, BrokerWire):
            await ready  # a device sends when it hears that the coordinator is there
        came = await self._repeat(frames)
        self.found["recover_cpu_s"] = self.coordinator.cpu_s()
        self.found["recover_first_s"], self.found["recover_s"] = min(came) - started, max(came) - started
        await ready
        await self._done("recover")

    async def abort(self) -> None:
        """Abort the job that all devices take part in."""
        self.devices.reset()
        started = time.monotonic()
        await asyncio.to_thread(self.coordinator.client.jobs.abort, "pending")
        await self._hear(Cancel, self.given.devices)
        self.found["abort_s"] = self.devices.last_s[Cancel] - started
        await self._done("abort")

    # --- parts of it --------------------------------------------------------------------------

    async def _create(self, name: str, rounds: int, target: int) -> None:
        given = self.given
        text = JOB.format(name=name, rounds=rounds, target=target, hidden=given.hidden, seed=given.seed)
        await asyncio.to_thread(self.coordinator.client.jobs.create, text, str(self.coordinator.folder))

    async def _send(self, frames: list[tuple[str, bytes]]) -> tuple[float, list[float]]:
        """Send updates at once; returns receipts per second of processor time, and how long each took."""
        self.devices.receipts.clear()
        started, computed = time.monotonic(), self.coordinator.cpu_s()
        await self._deliver(frames)
        computed = self.coordinator.cpu_s() - computed
        self.devices.read()
        told = [told[0] for told in self.devices.receipts.values()]
        refused = [receipt for _, receipt in told if not receipt.accepted or receipt.code]
        if refused or len(told) != len(frames):
            raise SystemExit(f"{len(told)} receipts for {len(frames)} updates; {refused[:3]}")
        return len(frames) / computed, [came_s - started for came_s, _ in told]

    async def _repeat(self, frames: list[tuple[str, bytes]]) -> list[float]:
        """Send stored updates until every device has its receipt; returns when these came.

        As an agent does, a device that is told to try again later waits for 5 s.
        """
        came: list[float] = []
        while frames:
            self.devices.reset()
            self.devices.receipts.clear()
            await self._deliver(frames)
            self.devices.read()
            told = {
                receipt.device: (at, receipt) for one in self.devices.receipts.values() for at, receipt in one
            }
            wrong = [one for _, one in told.values() if one.code != "E_DUP" and not one.retry]
            if wrong:
                raise SystemExit(f"{len(wrong)} stored updates are refused: {wrong[:3]}")
            came += [at for at, receipt in told.values() if receipt.accepted]
            busy = {device for device, (_, receipt) in told.items() if not receipt.accepted}
            frames = [frame for frame in frames if frame[0].split("/")[4] in busy]
            if frames:
                self._show(f"recover: {len(frames)} are told to try again")
                await asyncio.sleep(REPEAT_S)
        return came

    async def _deliver(self, frames: list[tuple[str, bytes]]) -> None:
        """Send updates, and wait for as many receipts."""
        pace = PACE if isinstance(self.wire, BrokerWire) else len(frames)
        for number in range(0, len(frames), pace):
            part = frames[number : number + pace]
            for topic, frame in part:
                self.wire.publish(topic, frame)
            await self._hear(Receipt, number + len(part))

    def _require_counted(self, name: str) -> None:
        for version in self.coordinator.client.models.log(name):
            if version.version and version.updates != self.given.invited:
                raise SystemExit(f"version {version.version} counts {version.updates} updates")

    async def _hear(self, kind: type[Task | Receipt | Cancel], count: int) -> None:
        what = f"{count} {kind.__name__}"
        await self.devices.until(lambda: self.devices.heard[kind] >= count, LIMIT_S, what)

    async def _head(self, job: str, version: int, state: str) -> None:
        wanted = (job, version, state)
        await self.devices.until(lambda: wanted in self.devices.heads, LIMIT_S, f"head {wanted}")

    async def _health(self) -> dict[str, Any]:
        return await asyncio.to_thread(self.coordinator.client.health)

    async def _done(self, step: str) -> None:
        await self.coordinator.note(step)
        if step not in {"open", "updates", "close"}:
            self._show(f"{step}: {self.coordinator.silences[step].max_ms:.0f} ms silent at most")

    def _show(self, text: str) -> None:
        print(f"  {text}", file=sys.stderr, flush=True)


async def measure(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run everything in a folder; returns the figures."""
    devices = Devices(given.devices, given.seed, FLEET, DATA, telemetry_s=TELEMETRY_S)
    broker, password = None, "benchmark-only"
    if given.link == "broker":
        broker = start_broker("mosquitto", folder / "broker", {"coordinator": password}, FLEET)
        settings = folder / "broker" / "mosquitto.conf"
        # All devices appear within a second here: what waits for the coordinator must not be dropped.
        text = settings.read_text().replace("max_queued_messages 1000", "max_queued_messages 0")
        settings.write_text(text.replace("max_queued_bytes 67108864", "max_queued_bytes 0"))
        broker.restart()
    coordinator = Coordinator(folder / "coordinator", broker, password)

    async def open_wire() -> Wire:
        if broker is None:
            exchange = Exchange(devices.receive)
            await exchange.open(coordinator.exchange)
            return exchange
        settings = MqttSettings.from_url(broker.url, client_id="devices", tls=None)
        wire = BrokerWire(replace(settings, username="coordinator", password=password), devices)
        await wire.open()
        return wire

    scale = Scale(given, coordinator, devices)
    try:
        await scale.run(open_wire)
    finally:
        await coordinator.stop()
        if hasattr(scale, "wire"):
            await scale.wire.close()
        if broker is not None:
            broker.stop()
    return scale.found | _silences(coordinator.silences) | _about(given, devices, broker)


def _silences(steps: dict[str, Silence]) -> dict[str, Any]:
    total = Silence()
    for silence in steps.values():
        total = total.joined(silence)
    return {
        "stall_ms_p99": total.percentile_ms(0.99),
        "stall_ms_max": total.max_ms,
        "stall_busy_ms_max": total.busy_ms_max,
        "stalls_ms": {step: [round(one.max_ms), round(one.busy_ms_max)] for step, one in steps.items()},
    }


def _about(given: argparse.Namespace, devices: Devices, broker: RunningBroker | None) -> dict[str, Any]:
    return {
        "devices": given.devices,
        "invited": given.invited,
        "rounds": given.rounds,
        "update_bytes": round(statistics.mean(devices.bytes_of_updates)),
        "link": given.link,
        "broker": f"{broker.kind} {broker.version}" if broker else "",
        "seed": given.seed,
        "processors": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "sqlite": sqlite3.sqlite_version,
        "machine": platform.machine(),
    }


def main() -> int:
    """Run, print a table and one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, default=10_000)
    parser.add_argument("--invited", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--long", action="store_true", help="200 rounds")
    parser.add_argument("--hidden", type=int, default=120, help="size of the model; 120: updates of 4.8 kB")
    parser.add_argument("--link", choices=["memory", "broker"], default="memory")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="500 devices, 100 invited, 2 rounds")
    parser.add_argument("--folder", type=Path, help="for all files, kept [default: a temporary one]")
    given = parser.parse_args()
    if given.quick:
        given.devices, given.invited, given.rounds = 500, 100, 2
    if given.long:
        given.rounds = 200
    with tempfile.TemporaryDirectory(prefix="liberatai-scale-") as temporary:
        result = {"benchmark": "fleet_scale"} | asyncio.run(measure(given, given.folder or Path(temporary)))
    result = {name: round(value, 3) if isinstance(value, float) else value for name, value in result.items()}
    for name, value in result.items():
        print(f"{name:>22}  {value}")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
