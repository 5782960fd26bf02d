"""Devices join with a token, wait for an approval, renew, and come back: a real Mosquitto with mutual TLS."""

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from liberatai_agent.cli import main as agent
from liberatai_agent.config import load_config
from liberatai_coordinator import wiring
from liberatai_coordinator.api.operations import Operations
from liberatai_coordinator.authority.authority import Authority
from liberatai_coordinator.brokers.secure import SecureBroker, start_secure_broker
from liberatai_coordinator.brokers.start import find_mosquitto
from liberatai_coordinator.client.wire import InvitationRequest
from liberatai_coordinator.config import CoordinatorConfig, Joining
from liberatai_coordinator.service import Service
from liberatai_core import certificates, processes
from liberatai_core.certificate_file import read_dates

FLEET = "default"


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecureBroker]:
    if find_mosquitto() is None:
        pytest.skip("mosquitto is not installed: apt install mosquitto")
    running = start_secure_broker(tmp_path_factory.mktemp("broker"))
    yield running
    running.stop()


def settings(broker: SecureBroker, folder: Path, **joining: Any) -> CoordinatorConfig:
    pem = broker.folder / "co1.pem"
    if not pem.exists():
        broker.credential("co1", "coordinator")
    return CoordinatorConfig(
        fleet=FLEET,
        broker=broker.url,
        ca_file=str(broker.ca_file),
        cert_file=str(pem),
        key_file=str(pem),
        state_dir=str(folder / "coordinator"),
        ca_dir=str(broker.authority.folder),
        joining=Joining(broker=broker.url, claim_port=broker.claim_port, **joining),
    )


@contextlib.asynccontextmanager
async def coordinator(config: CoordinatorConfig) -> AsyncIterator[Service]:
    with wiring.build(config) as service:
        await service.restore()
        running = asyncio.create_task(service.run())
        try:
            await until(lambda: service.connected)
            yield service
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)


async def until(condition: Any) -> None:
    async with asyncio.timeout(90):
        while not condition():
            await asyncio.sleep(0.02)


class Device:
    """A device's command line and files in a folder."""

    def __init__(self, folder: Path, name: str) -> None:
        self.name, self.config, self.state = name, folder / name / "agent.yaml", folder / name / "state"

    async def enrol(self, token: str, *more: str) -> int:
        words = ["enrol", token, "--config", str(self.config), "--state-dir", str(self.state)]
        return await asyncio.to_thread(agent, [*words, "--device", self.name, "--timeout", "60", *more])

    @property
    def pem(self) -> Path:
        return self.state / "tls" / "device.pem"

    @property
    def status(self) -> dict[str, Any]:
        with contextlib.suppress(OSError, ValueError):
            found: dict[str, Any] = json.loads((self.state / "status.json").read_text())
            return found
        return {}

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        from liberatai_agent.commands.run import _serve

        logging.getLogger("liberatai_agent").setLevel(logging.INFO)
        task = asyncio.create_task(_serve(load_config(self.config)))
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def invite(service: Service, **wanted: Any) -> str:
    (made,) = await Operations.of(service).invitations.create(InvitationRequest(**wanted))
    assert made.line == f"sudo liberatai-agent enrol {made.token}"
    return made.token


def test_a_device_joins_with_a_token_and_is_online(broker: SecureBroker, tmp_path: Path, capsys: Any) -> None:
    async def scenario() -> None:
        async with coordinator(settings(broker, tmp_path)) as service:
            token = await invite(service, profile="pi4", group="hall")
            device = Device(tmp_path, "dev-a")
            assert await device.enrol(token) == 0
            told = capsys.readouterr().out
            view = await Operations.of(service).devices.show("dev-a")
            assert (view.status, view.labels) == ("approved", {"group": "hall"})
            assert view.key in told
            assert view.certificate_end_s == read_dates(device.pem).end_s
            assert device.pem.stat().st_mode & 0o077 == 0
            config = load_config(device.config)
            assert (config.profile, config.coordinator_key) == ("pi4", service.signer.public_key.hex())
            async with device.running():
                await until(lambda: service.fleet.devices["dev-a"].online)
                await until(lambda: "days left" in device.status.get("certificate", ""))
            (used,) = [
                one for one in await Operations.of(service).invitations.list() if one.device == "dev-a"
            ]
            assert (used.state, used.token) == ("used", "")

    asyncio.run(scenario())


def test_a_pending_device_says_that_it_waits_and_for_whom(
    broker: SecureBroker, tmp_path: Path, capsys: Any
) -> None:
    async def scenario() -> None:
        async with coordinator(settings(broker, tmp_path)) as service:
            device = Device(tmp_path, "dev-b")
            assert await device.enrol(await invite(service, approval="hand"), "--no-wait") == 0
            told = capsys.readouterr()
            view = await Operations.of(service).devices.show("dev-b")
            assert view.status == "pending"
            assert view.key in told.out
            assert f"co1 has to approve dev-b, key {view.key}" in told.err
            assert not device.pem.exists()
            async with device.running():
                await until(lambda: device.status.get("phase") == "pending")
                assert f"co1 has to approve dev-b, key {view.key}" in device.status["reason"]
                assert device.status["key"] == view.key
                await Operations.of(service).devices.approve("dev-b", view.key)
                await until(lambda: service.fleet.devices["dev-b"].online)

    asyncio.run(scenario())


def test_a_device_that_slept_past_the_end_comes_back_with_its_own_key(
    broker: SecureBroker, tmp_path: Path
) -> None:
    async def scenario() -> None:
        day_s = 86_400.0
        async with coordinator(settings(broker, tmp_path, certificate_days=3 / day_s)) as service:
            device = Device(tmp_path, "dev-c")
            assert await device.enrol(await invite(service)) == 0
            before = read_dates(device.pem)
            await until(lambda: time.time() > before.end_s)
        async with coordinator(settings(broker, tmp_path, rejoin_days=1)) as service, device.running():
            await until(lambda: service.fleet.devices["dev-c"].online)
            assert read_dates(device.pem).serial != before.serial

    asyncio.run(scenario())


@pytest.mark.system
def test_beyond_the_grace_only_an_invitation_helps(broker: SecureBroker, tmp_path: Path) -> None:
    async def scenario() -> None:
        short = {"certificate_days": 2 / 86_400, "rejoin_days": 1}
        async with coordinator(settings(broker, tmp_path, **short)) as service:
            device = Device(tmp_path, "dev-d")
            assert await device.enrol(await invite(service)) == 0
            end_s = read_dates(device.pem).end_s
            await until(lambda: time.time() > end_s)
        async with coordinator(settings(broker, tmp_path, rejoin_days=0)) as service:
            async with device.running():
                await until(lambda: device.status.get("phase") == "refused")
                assert "E_EXPIRED" in device.status["reason"]
                assert service.fleet.refusals["dev-d"]["E_EXPIRED"] >= 1
            assert await device.enrol(await invite(service)) == 0
            async with device.running():
                await until(lambda: service.fleet.devices["dev-d"].online)

    asyncio.run(scenario())


def test_a_certificate_is_renewed_over_the_connection_that_stands(
    broker: SecureBroker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with coordinator(settings(broker, tmp_path)) as service:
            device = Device(tmp_path, "dev-e")
            assert await device.enrol(await invite(service)) == 0
            before = read_dates(device.pem)
            monkeypatch.setattr("liberatai_core.certificate_file.RENEW_SHARE", 0.0)  # it is due at once
            async with device.running():
                await until(lambda: service.fleet.devices["dev-e"].online)
                await until(lambda: read_dates(device.pem).serial != before.serial)
                monkeypatch.undo()
                await until(lambda: service.fleet.devices["dev-e"].online)

    asyncio.run(scenario())


@pytest.mark.system
def test_a_new_certificate_that_the_broker_does_not_take_is_set_aside_and_the_old_one_goes_on(
    broker: SecureBroker, tmp_path: Path
) -> None:
    async def scenario() -> None:
        async with coordinator(settings(broker, tmp_path)) as service:
            device = Device(tmp_path, "dev-f")
            assert await device.enrol(await invite(service)) == 0
            before = read_dates(device.pem)
            key = certificates.new_key()
            other = Authority.create(tmp_path / "other", FLEET)
            der = other.issue(key.public_key(), "device", "dev-f", 3600)
            beside = device.pem.with_name("device.next.pem")
            beside.write_bytes(certificates.certificate_pem(der) + certificates.key_pem(key))
            async with device.running():
                await until(
                    lambda: "the broker does not take the new one" in device.status.get("last_error", "")
                )
                await until(lambda: service.fleet.devices["dev-f"].online)
            assert not beside.exists()
            assert read_dates(device.pem) == before

    asyncio.run(scenario())


@pytest.mark.system
def test_the_coordinators_own_certificate_is_renewed(
    broker: SecureBroker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("liberatai_coordinator.intake.enrolment.FIRST_LOOK_S", 0.1)

    async def scenario() -> None:
        config = settings(broker, tmp_path)
        pem = tmp_path / "co1.pem"
        pem.write_bytes(broker.credential("co1", "coordinator", days=400 / 86_400).read_bytes())
        before = read_dates(pem)
        monkeypatch.setattr("liberatai_core.certificate_file.RENEW_SHARE", 0.0)
        config = msgspec.structs.replace(config, cert_file=str(pem), key_file=str(pem))
        async with coordinator(config) as service:
            await until(lambda: read_dates(pem).serial != before.serial)
            monkeypatch.undo()
            await until(lambda: service.connected)

    asyncio.run(scenario())


FAKETIME = next(iter(Path("/usr/lib").glob("*/faketime/libfaketime.so.1")), None)


@pytest.mark.system
@pytest.mark.skipif(FAKETIME is None, reason="libfaketime is not installed: apt install faketime")
@pytest.mark.parametrize("days", [-3650, 3650])
def test_a_device_whose_clock_is_ten_years_off_connects_and_is_renewed(
    broker: SecureBroker, tmp_path: Path, days: int
) -> None:
    """The broker's certificate is not valid at that time, nor is its own: only the authority counts."""

    async def scenario() -> None:
        async with coordinator(settings(broker, tmp_path)) as service:
            name = f"clock-{abs(days)}-{days > 0}".lower()
            device = Device(tmp_path, name)
            assert await device.enrol(await invite(service)) == 0
            environment = processes.environment() | {
                "LD_PRELOAD": str(FAKETIME),
                "FAKETIME": f"{days:+d}d",
                "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            }
            command = processes.command("liberatai_agent", "run", "--config", str(device.config))
            log = (tmp_path / "agent.log").open("wb")
            child = await asyncio.create_subprocess_exec(*command, env=environment, stdout=log, stderr=log)
            try:
                await until(lambda: service.fleet.devices[name].online)
                await until(lambda: "clock cannot be right" in device.status.get("certificate", ""))
            finally:
                child.terminate()
                await child.wait()

    asyncio.run(scenario())
