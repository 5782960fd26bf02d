"""The API says what the operations say, with stable codes, on a socket that only its owner can open."""

import asyncio
import grp
import inspect
import json
import os
import signal
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import httpx
import msgspec
import pytest
from tests.unit.coordinator.api_kit import DATA, JOB, STRUCTURE, VERSIONS, WEIGHTS, MemoryOperations, served

from liberatai_coordinator.api.answers import MAX_BODY_BYTES, PART, STATUS, problem
from liberatai_coordinator.api.devices import DeviceOperations
from liberatai_coordinator.api.groups import GroupOperations
from liberatai_coordinator.api.jobs import JobOperations
from liberatai_coordinator.api.journal import AuditOperations, EventOperations
from liberatai_coordinator.api.listener import serve_uds
from liberatai_coordinator.api.models import ModelOperations
from liberatai_coordinator.api.operations import Operations
from liberatai_coordinator.api.plans import PlanOperations
from liberatai_coordinator.api.rollouts import RolloutOperations
from liberatai_coordinator.api.routes import make_app
from liberatai_coordinator.api.shadows import ShadowOperations
from liberatai_coordinator.api.variants import VariantOperations
from liberatai_coordinator.client.client import Client, CoordinatorError, error_of
from liberatai_coordinator.client.wire import RolloutPlan, RolloutRequest
from liberatai_core.errors import (
    BY_CODE,
    ConfigError,
    DigestError,
    DiskError,
    LiberataiError,
    LinkError,
    LockedError,
    NotFoundError,
    SchemaError,
    StateError,
)
from liberatai_core.files import closed_to


@pytest.fixture
def operations() -> MemoryOperations:
    return MemoryOperations()


@pytest.fixture
def path(tmp_path: Path, operations: MemoryOperations) -> Iterator[Path]:
    with served(operations, tmp_path / "api.sock"):
        yield tmp_path / "api.sock"


@pytest.fixture
def client(path: Path) -> Iterator[Client]:
    with Client(path, timeout_s=10) as made:
        yield made


@pytest.fixture
def http(path: Path) -> Iterator[httpx.Client]:
    with httpx.Client(
        transport=httpx.HTTPTransport(uds=str(path), verify=False), base_url="http://x"
    ) as made:
        yield made


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """One server for all requests that change nothing."""
    path = tmp_path_factory.mktemp("api") / "api.sock"
    transport = httpx.HTTPTransport(uds=str(path), verify=False)
    with served(MemoryOperations(), path), httpx.Client(transport=transport, base_url="http://x") as made:
        yield made


@pytest.mark.parametrize(
    "noun",
    [
        DeviceOperations,
        JobOperations,
        PlanOperations,
        ModelOperations,
        VariantOperations,
        GroupOperations,
        EventOperations,
        AuditOperations,
        ShadowOperations,
        RolloutOperations,
    ],
)
def test_the_memory_operations_are_operations(operations: MemoryOperations, noun: type) -> None:
    real = {
        name: work
        for name, work in vars(noun).items()
        if inspect.iscoroutinefunction(work) and not name.startswith("_")
    }
    name = noun.__name__.removesuffix("Operations").lower()
    kept = vars(type(getattr(operations, name if name == "audit" else f"{name}s")))
    for name, work in real.items():
        assert inspect.signature(kept[name]) == inspect.signature(work)


# --- what comes back -----------------------------------------------------------------------------


def test_devices_are_shown_and_let_in_and_shut_out(client: Client) -> None:
    assert [device.id for device in client.devices.list()] == ["camera", "gateway"]
    assert client.devices.show("camera").status == "pending"
    assert client.devices.approve("camera").status == "approved"
    shut_out = client.devices.quarantine("camera", "sends nonsense")
    assert (shut_out.status, shut_out.reason) == ("quarantined", "sends nonsense")
    assert client.devices.show("camera") == shut_out
    assert client.devices.release("camera").status == "approved"


def test_devices_are_labelled_chosen_drained_and_removed(client: Client) -> None:
    assert client.devices.label("camera", {"site": "yard", "floor": "2"}).labels == {
        "site": "yard",
        "floor": "2",
    }
    assert client.devices.label("camera", {"floor": None}).labels == {"site": "yard"}
    assert [one.id for one in client.devices.list("site=hall")] == ["gateway"]
    assert [one.id for one in client.devices.list(query="storage_kb >= 64 and not label.site == 'hall'")] == [
        "camera"
    ]
    assert client.groups.create("yard", 'label.site == "yard"').devices == ("camera",)
    assert [one.id for one in client.devices.list(group="yard")] == ["camera"]
    assert [(one.name, one.count) for one in client.groups.list()] == [("yard", 1)]
    assert client.devices.drain("camera", "new fans").drained
    assert not client.devices.resume("camera").drained
    with pytest.raises(StateError, match="no other key"):
        client.devices.rekey("gateway")
    assert client.devices.rekey("camera", "4455").key == "44556677"
    with pytest.raises(StateError, match="another key"):
        client.devices.approve("gateway", "ffff")
    client.devices.decommission("camera", "stolen")
    with pytest.raises(NotFoundError):
        client.devices.show("camera")
    client.groups.delete("yard")
    with pytest.raises(NotFoundError):
        client.devices.list(group="yard")
    with pytest.raises(ConfigError, match="did you mean"):
        client.devices.list(query="ram_md > 3")


def test_devices_are_asked_and_wished_something(client: Client) -> None:
    assert client.devices.ping("gateway").session == 3
    assert client.devices.logs("gateway", 1).lines == ("\x1b[31mtwo",)
    assert client.devices.probe("gateway").id == "gateway"
    shadow = client.shadows.change("gateway", {"pause": True, "telemetry_s": 300})
    assert shadow.desired == {"pause": True, "telemetry_s": 300.0}
    assert (shadow.state, shadow.differs) == ("not heard", ("pause", "telemetry_s"))
    assert client.shadows.change("gateway", {"pause": None}).desired == {"telemetry_s": 300.0}
    with pytest.raises(ConfigError, match="may not be wished"):
        client.shadows.change("gateway", {"data": 1.0})


def test_a_rollout_is_begun_watched_and_taken_back(client: Client) -> None:
    plan = RolloutPlan(stages=(0.5, 1.0), soak_s=1.0)
    made = client.rollouts.create(RolloutRequest(name="r", model="digits", plan=plan))
    assert (made.state, made.counts, made.what) == ("running", {"offered": 1}, "digits:2")
    with pytest.raises(StateError):
        client.rollouts.create(RolloutRequest(name="r", model="digits"))
    with pytest.raises(ConfigError, match="stages"):
        client.rollouts.create(RolloutRequest(name="s", model="digits", plan=RolloutPlan(stages=())))
    assert client.rollouts.pause("r").state == "paused"
    assert client.rollouts.resume("r").state == "running"
    shown = client.rollouts.show("r")
    assert (shown.stage, shown.accuracy, shown.parts[0].evaluation) == (2, 0.9, (9, 10))
    assert client.rollouts.rollback("r", "people complain").reason == "people complain"
    assert [one.name for one in client.rollouts.list()] == ["r"]
    assert client.rollouts.cancel("r").state == "cancelled"


def test_every_change_has_its_line_and_no_question_has_one(
    client: Client, operations: MemoryOperations
) -> None:
    client.devices.list()
    client.devices.drain("gateway", "new fans")
    with pytest.raises(NotFoundError):
        client.devices.drain("nobody", "")
    client.jobs.create(JOB, ".")
    client.plan("digits")
    client.jobs.abort("digits")
    client.jobs.delete("digits")
    told = [(one.action, one.target, one.code) for one in client.audit.after(0)]
    assert told == [
        ("devices drain", "gateway", ""),
        ("devices drain", "nobody", "E_NOT_FOUND"),
        ("jobs create", "digits", ""),
        ("jobs abort", "digits", ""),
        ("jobs delete", "digits", ""),
    ]
    first, *_ = client.audit.last(5)
    assert (first.actor, first.role, first.detail) == ("local", "admin", '{"reason":"new fans"}')
    assert [one.number for one in client.audit.last(2)] == [4, 5]


def test_events_are_told_from_a_number_on(client: Client) -> None:
    assert [one.number for one in client.events.last(1)] == [2]
    assert [one.number for one in client.events.after(0, "camera")] == [1]


def test_a_long_list_comes_in_parts_and_whole(client: Client, operations: MemoryOperations) -> None:
    one = operations.fleet["camera"]
    for count in (0, 1, PART, 2 * PART + 1):
        names = [f"camera-{number:05d}" for number in range(count)]
        operations.fleet = {name: msgspec.structs.replace(one, id=name) for name in names}
        assert [device.id for device in client.devices.list()] == names


def test_a_job_is_created_paused_resumed_and_aborted(
    client: Client, operations: MemoryOperations, tmp_path: Path
) -> None:
    job = client.jobs.create(JOB, tmp_path)
    assert (job.name, job.state, job.rounds_total) == ("digits", "running", 3)
    assert operations.base_dirs == {"digits": str(tmp_path)}
    assert client.jobs.pause("digits").state == "paused"
    assert client.jobs.resume("digits").state == "running"
    assert client.jobs.abort("digits").state == "aborted"
    (listed,) = client.jobs.list()
    assert (listed.name, listed.state) == ("digits", "aborted")


def test_a_plan_is_of_a_job_of_the_newest_or_of_a_description(client: Client) -> None:
    assert client.plan(yaml_text=JOB).dry_run
    client.jobs.create(JOB, "/")
    assert not client.plan("digits").dry_run
    assert client.plan().job == "digits"
    with pytest.raises(SchemaError, match="not both"):
        client.plan("digits", JOB)


def test_models_versions_and_ensembles_come_back_whole(client: Client) -> None:
    assert client.models.list() == (VERSIONS[0],)
    assert client.models.log("digits") == tuple(VERSIONS)
    assert client.models.version("digits") == VERSIONS[0]
    assert client.models.version("digits", "stable") == client.models.version("digits", "1") == VERSIONS[1]
    assert client.models.ensemble("digits").members == ("mlp-hidden4",)
    assert client.health() == {"ok": True, "epoch": 3}


def test_weights_come_back_bit_for_bit_with_their_structure(client: Client) -> None:
    assert client.models.weights("digits", "latest", "mlp-hidden4") == (STRUCTURE, DATA, WEIGHTS.tobytes())


def test_weights_that_were_damaged_on_the_way_are_refused(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = client.send
    monkeypatch.setattr(client, "send", lambda *arguments: real(*arguments)[:-1] + b"\x00")
    with pytest.raises(DigestError, match="damaged on the way"):
        client.models.weights("digits", "latest", "mlp-hidden4")


# --- errors --------------------------------------------------------------------------------------


def test_an_error_is_the_same_on_both_sides(client: Client, operations: MemoryOperations) -> None:
    with pytest.raises(NotFoundError, match="device nobody: not known"):
        client.devices.show("nobody")
    with pytest.raises(ConfigError) as caught:
        client.jobs.show("faulty")
    assert caught.value.where == "job.yaml"
    assert caught.value.faults == ["name: must match ^[a-z]", "rounds.count: must be >= 1 (got 0)"]
    client.jobs.create(JOB, "/")
    with pytest.raises(StateError, match="job digits is running"):
        client.jobs.resume("digits")
    operations.disk_full = True
    with pytest.raises(DiskError):
        client.jobs.create(JOB, "/")


def test_a_fault_that_nobody_foresaw_says_so_without_its_details(client: Client) -> None:
    with pytest.raises(CoordinatorError, match=r"failed \(RuntimeError\); its log") as caught:
        client.jobs.show("boom")
    assert caught.value.code == "E_INTERNAL"
    assert "foresaw" not in str(caught.value)
    assert client.health()["ok"]


def test_every_code_survives_the_way_from_error_to_error() -> None:
    for code, kind in BY_CODE.items():
        if kind is LiberataiError:
            continue
        error = kind("where", ["fault"]) if issubclass(kind, ConfigError) else kind("what, where, what to do")
        content = msgspec.json.encode(problem(error))
        back = error_of(STATUS.get(code, 500), content)
        assert type(back) is kind
        assert str(back) == str(error)


@pytest.mark.parametrize(
    ("method", "url", "body", "status", "code"),
    [
        ("GET", "/v1/devices/nobody", None, 404, "E_NOT_FOUND"),
        ("GET", "/v1/nothing", None, 404, "E_NOT_FOUND"),
        ("DELETE", "/v1/devices/camera", None, 405, "E_SCHEMA"),
        ("GET", "/v1/jobs/faulty", None, 422, "E_CONFIG"),
        ("POST", "/v1/jobs", b"{", 422, "E_SCHEMA"),
        ("POST", "/v1/jobs", b'{"yaml": "x"}', 422, "E_SCHEMA"),
        ("POST", "/v1/jobs", b'{"yaml": "x", "base_dir": "/", "more": 1}', 422, "E_SCHEMA"),
        ("POST", "/v1/jobs", b'{"yaml": "name: x", "base_dir": "/"}', 422, "E_CONFIG"),
        ("POST", "/v1/devices/camera/quarantine", b'{"reason": 5}', 422, "E_SCHEMA"),
        ("POST", "/v1/jobs", b" " * (MAX_BODY_BYTES + 1), 413, "E_SIZE"),
        ("GET", "/v1/models/digits/versions/99", None, 404, "E_NOT_FOUND"),
        ("GET", "/v1/models/digits/versions/1/structures/cnn/weights", None, 404, "E_NOT_FOUND"),
    ],
)
def test_a_refusal_has_a_status_and_a_code(
    unchanged: httpx.Client, method: str, url: str, body: bytes | None, status: int, code: str
) -> None:
    response = unchanged.request(method, url, content=body)
    assert (response.status_code, response.json()["code"]) == (status, code)


def test_wrong_states_conflict_and_a_full_disk_is_unavailable(
    http: httpx.Client, operations: MemoryOperations
) -> None:
    body = json.dumps({"yaml": JOB, "base_dir": "/"})
    assert http.post("/v1/jobs", content=body).status_code == 201
    assert http.post("/v1/jobs/digits/resume").status_code == 409
    operations.disk_full = True
    assert http.post("/v1/jobs", content=body).status_code == 503


def test_no_coordinator_is_a_link_error_that_says_what_to_do(tmp_path: Path) -> None:
    missing = tmp_path / "none.sock"
    with (
        Client(missing) as client,
        pytest.raises(LinkError, match=f"no coordinator at {missing}: start one with"),
    ):
        client.health()
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(missing))
    dead.close()
    with Client(missing) as client, pytest.raises(LinkError, match="no coordinator at"):
        client.health()


def test_an_answer_that_is_no_view_is_a_schema_error(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "send", lambda *_: b'{"id": 7}')
    with pytest.raises(SchemaError, match="another release"):
        client.devices.show("camera")


# --- OpenAPI -------------------------------------------------------------------------------------


def test_the_description_names_every_route_and_resolves(unchanged: httpx.Client) -> None:
    described = unchanged.get("/openapi.json").json()
    assert "/v1/devices/{name}/approve" in described["paths"]
    schemas = described["components"]["schemas"]
    assert {"DeviceView", "JobView", "Problem", "JobRequest"} <= set(schemas)
    assert {"LocalView", "CentralView", "ScoreView", "WorstView", "ContributionView"} <= set(schemas)
    text = json.dumps(described)
    used = {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert used <= set(schemas)
    assert schemas["DeviceView"]["properties"]["id"] == {"type": "string"}


# --- the socket ----------------------------------------------------------------------------------


def test_only_the_owner_can_open_the_socket_and_it_is_gone_afterwards(tmp_path: Path) -> None:
    path = tmp_path / "api.sock"
    with served(MemoryOperations(), path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        with Client(path) as client:
            assert client.health()["ok"]
    assert not path.exists()


def test_a_group_can_open_the_socket_if_the_settings_name_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "api.sock"
    own = grp.getgrgid(os.getgid()).gr_name
    tmp_path.chmod(0o710)
    with served(MemoryOperations(), path, own):
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
        assert path.stat().st_gid == os.getgid()
        with Client(path) as client:
            assert client.health()["ok"]
    tmp_path.chmod(0o700)
    assert closed_to(path, os.getgid()) == next(
        (one for one in reversed(path.parents) if not one.stat().st_mode & 0o011), tmp_path
    )
    with served(MemoryOperations(), path, own):
        assert "cannot enter" in caplog.text
    app = make_app(cast("Operations", MemoryOperations()))
    with pytest.raises(ConfigError, match=r"no group 'no-such-group' on this machine.*groupadd"):
        asyncio.run(serve_uds(app, path, "no-such-group"))
    assert not path.exists()


def test_a_stale_socket_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "api.sock"
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(path))
    stale.close()
    with served(MemoryOperations(), path), Client(path) as client:
        assert client.health()["ok"]


def test_a_socket_in_use_is_not_taken_away(path: Path, client: Client) -> None:
    with pytest.raises(LockedError, match="another coordinator answers"):
        asyncio.run(serve_uds(make_app(cast("Operations", MemoryOperations())), path))
    assert client.health()["ok"]


def test_a_file_that_is_no_socket_and_a_path_that_is_too_long_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "precious.txt"
    file.write_text("data")
    app = make_app(cast("Operations", MemoryOperations()))
    with pytest.raises(ConfigError, match="is no socket"):
        asyncio.run(serve_uds(app, file))
    assert file.read_text() == "data"
    with pytest.raises(ConfigError, match="longer than 107 bytes"):
        asyncio.run(serve_uds(app, tmp_path / ("x" * 120)))
    with pytest.raises(ConfigError, match="No such file"):
        asyncio.run(serve_uds(app, tmp_path / "none" / "api.sock"))


def test_serving_leaves_the_signals_alone_and_stops_when_cancelled(tmp_path: Path) -> None:
    assert threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)

    async def scenario() -> tuple[object, object]:
        task = asyncio.create_task(
            serve_uds(make_app(cast("Operations", MemoryOperations())), tmp_path / "api.sock")
        )
        await asyncio.sleep(0)
        with Client(tmp_path / "api.sock", timeout_s=10) as client:
            assert (await asyncio.to_thread(client.health))["ok"]
        during = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return during

    runner = asyncio.new_event_loop()  # `asyncio.run` has a SIGINT handler of its own
    assert runner.run_until_complete(scenario()) == before
    runner.close()
