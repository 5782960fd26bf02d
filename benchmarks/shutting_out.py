"""How long a connected device goes on after it was shut out: of rounds, of the coordinator, of the broker.

A Mosquitto with mutual TLS and a coordinator run on this machine; devices connect, and one after the other is
quarantined or decommissioned by the API's own operation. Measured from there:

- invited_s: it is not in the list of those that rounds invite;
- coordinator_s: the coordinator refuses what it signs;
- broker_s: the broker refuses its next word (access list), the baseline is the same word just before;
- reconnect_s: a new connection is refused (revoked certificate; decommissioned devices only).

`python -m benchmarks.shutting_out --quick`; one JSON object on the last line.
"""

import argparse
import asyncio
import contextlib
import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from liberatai_coordinator.api.operations import Operations
from liberatai_coordinator.brokers.secure import SecureBroker, start_secure_broker
from liberatai_coordinator.config import CoordinatorConfig
from liberatai_coordinator.control.broker_lists import BrokerLists
from liberatai_coordinator.service import Service
from liberatai_coordinator.wiring import build
from liberatai_core.contract.frame import Signer, seal
from liberatai_core.contract.messages import Capability, Report, State
from liberatai_core.contract.topics import Topics
from liberatai_core.errors import LiberataiError, LinkError
from liberatai_core.link.link import Connected, Disconnected
from liberatai_core.link.mqtt import MqttLink, MqttSettings, TlsSettings

FLEET = "default"
TOPICS = Topics(fleet=FLEET)
LONGEST_S = 60.0


class Device:
    """A device with a certificate and a key of its own."""

    def __init__(self, broker: SecureBroker, name: str) -> None:
        self.name, self.broker, self.pem = name, broker, broker.credential(name)
        self.signer = Signer.from_seed(name.encode().ljust(32, b"-"), FLEET)
        self.link = self.new_link()
        self.state: Connected | Disconnected | None = None
        self.listening = asyncio.create_task(self.listen())

    def new_link(self) -> MqttLink:
        """Return a link that is not open yet."""
        tls = TlsSettings(ca_file=self.broker.ca_file, cert_file=self.pem, key_file=self.pem)
        settings = MqttSettings.from_url(self.broker.url, client_id=self.name, tls=tls)
        return MqttLink(replace(settings, protocol="5", reconnect_cap_s=0.1, spread_s=0.01))

    async def listen(self) -> None:
        """Note whether there is a connection."""
        async for event in self.link.events():
            if isinstance(event, Connected | Disconnected):
                self.state = event

    async def introduce(self) -> None:
        """Connect and say who is there."""
        await self.link.open()
        await until(lambda: isinstance(self.state, Connected))
        caps = Capability(
            device=self.name,
            public_key=self.signer.public_key,
            session=1,
            agent_version="benchmark",
            tier="full",
            samples=1,
        )
        await self.link.publish(TOPICS.up(self.name, "caps"), seal(caps, self.signer), retain=True)
        state = State(device=self.name, state="online", session=1)
        await self.link.publish(TOPICS.up(self.name, "state"), seal(state, self.signer), retain=True)

    async def speak(self) -> bool:
        """Whether the broker takes a word."""
        report = Report(device=self.name, session=1, phase="idle")
        try:
            await self.link.publish(TOPICS.up(self.name, "rep"), seal(report, self.signer))
        except LinkError:
            return False
        return True

    async def close(self) -> None:
        """Let go of the connection."""
        with contextlib.suppress(LiberataiError):
            await self.link.close()
        self.listening.cancel()


async def until(condition: Any) -> None:
    """Wait until a condition holds."""
    async with asyncio.timeout(LONGEST_S):
        while not condition():  # noqa: ASYNC110 - what is looked at has no event
            await asyncio.sleep(0.002)


async def shut_out(service: Service, device: Device, how: str) -> dict[str, float]:
    """Shut one device out; return the seconds until each part of it holds."""
    began = time.perf_counter()
    assert await device.speak()
    found = {"word_s": time.perf_counter() - began}
    began = time.perf_counter()
    await getattr(Operations.of(service).devices, how)(device.name, "benchmark")
    await until(lambda: device.name not in service.fleet.ready_names)
    found["invited_s"] = time.perf_counter() - began
    with contextlib.suppress(LiberataiError):
        service.fleet.buried.require_alive(device.signer.public_key)
        service.fleet.admit(device.name)
        raise SystemExit(f"{device.name} is still let in")
    found["coordinator_s"] = time.perf_counter() - began
    while await device.speak():  # noqa: ASYNC110 - the broker says it when it is asked
        await asyncio.sleep(0.005)
    found["broker_s"] = time.perf_counter() - began
    if how == "decommission":
        await device.close()
        while True:
            device.link, device.state = device.new_link(), None
            device.listening = asyncio.create_task(device.listen())
            await device.link.open()
            await until(lambda: device.state is not None)
            if isinstance(device.state, Disconnected):
                break
            await device.close()
        found["reconnect_s"] = time.perf_counter() - began
    await device.close()
    return found


async def measure(folder: Path, count: int) -> dict[str, Any]:
    """Start broker and coordinator, and shut devices out."""
    broker = start_secure_broker(folder / "broker")
    pem = str(broker.credential("co1", "coordinator"))
    config = CoordinatorConfig(
        fleet=FLEET,
        broker=broker.url,
        ca_file=str(broker.ca_file),
        cert_file=pem,
        key_file=pem,
        state_dir=str(folder / "state"),
        enrolment="open",
        ca_dir=str(broker.authority.folder),
        broker_dir=str(broker.files),
    )
    try:
        with build(config) as service:
            lists = service.doors.broker
            assert isinstance(lists, BrokerLists)
            service.doors.broker = replace(lists, written=broker.reload)
            await service.restore()
            running = asyncio.create_task(service.run())
            try:
                return await _all(service, broker, count)
            finally:
                running.cancel()
                await asyncio.gather(running, return_exceptions=True)
    finally:
        broker.stop()


async def _all(service: Service, broker: SecureBroker, count: int) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for how in ("quarantine", "decommission"):
        devices = [Device(broker, f"{how[:4]}-{number}") for number in range(count)]
        for device in devices:
            await device.introduce()
        await until(lambda devices=devices: {d.name for d in devices} <= service.fleet.ready_names)
        rows = [await shut_out(service, device, how) for device in devices]
        await service.doors.settled()
        result[how] = {
            key: {"median": statistics.median(r[key] for r in rows), "max": max(r[key] for r in rows)}
            for key in rows[0]
        }
    return result


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", type=int, default=20, help="devices that are shut out each way")
    parser.add_argument("--quick", action="store_true", help="three of them")
    args = parser.parse_args()
    count = 3 if args.quick else args.devices
    with tempfile.TemporaryDirectory() as folder:
        result = asyncio.run(measure(Path(folder), count))
    for how, figures in result.items():
        for name, figure in figures.items():
            print(f"{how:13} {name:14} median {figure['median']:.3f} s, longest {figure['max']:.3f} s")
    print(json.dumps({"benchmark": "shutting_out", "devices": count, **result}))


if __name__ == "__main__":
    main()
