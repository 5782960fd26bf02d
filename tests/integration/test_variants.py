"""Variants through the real service, API and command line: made, refused, listed, shown and pulled."""

import hashlib
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest
from tests.unit.coordinator.api_kit import served

from liberatai_coordinator.api.operations import Operations
from liberatai_coordinator.api.web import variants as api
from liberatai_coordinator.cli.app import main
from liberatai_coordinator.cli.kit import budget_of, budget_of_profile
from liberatai_coordinator.client.choice import best_variant
from liberatai_coordinator.client.client import Client
from liberatai_coordinator.client.views import VariantView
from liberatai_coordinator.client.wire import VariantUpload
from liberatai_coordinator.config import CoordinatorConfig, parse_job
from liberatai_coordinator.fleet.devices import Fleet
from liberatai_coordinator.jobs.publisher import Publisher
from liberatai_coordinator.models.members import Public
from liberatai_coordinator.models.versions import Versions
from liberatai_coordinator.pictures import fit_report
from liberatai_coordinator.service import Service
from liberatai_coordinator.store.ledger import Ledger
from liberatai_coordinator.store.manifests import (
    VariantManifest,
    decode_manifest,
    decode_variant,
    encode_manifest,
    version_id,
)
from liberatai_coordinator.store.repository import Repository
from liberatai_core.compressor.artifact import restore
from liberatai_core.compressor.codebook import compress, smallest_bytes
from liberatai_core.contract.frame import Signer
from liberatai_core.contract.topics import Topics
from liberatai_core.errors import (
    BudgetError,
    ConfigError,
    DataError,
    DigestError,
    DiskError,
    LiberataiError,
    NonFiniteError,
    NotFoundError,
    SchemaError,
    StateError,
    StructureError,
    TooLargeError,
)
from liberatai_core.learning import fitting
from liberatai_core.learning.families import structure_of
from liberatai_core.link.memory import MemoryBroker, MemoryLink
from liberatai_core.structure import DataContract, Structure
from liberatai_core.weights import digest, from_bytes

DATA = DataContract(input_shape=(1, 4, 4), classes=3)
LARGE = structure_of("mlp", {"hidden": 32}, DATA)
SMALL = structure_of("mlp", {"hidden": 8}, DATA)
JOB = """
name: tiny
data: {input_shape: [1, 4, 4], classes: 3}
structures: [{family: mlp, params: {hidden: 32}}, {family: mlp, params: {hidden: 8}}]
"""


@contextmanager
def repository(folder: Path) -> Iterator[Service]:
    """A coordinator's service with one version of the model "tiny"; it is not connected to any broker."""
    ledger = Ledger.open(folder)
    try:
        blobs, job = Repository(folder), parse_job(JOB, "job")
        if not ledger.versions.all("tiny"):
            budgets = {LARGE.id: 100_000, SMALL.id: 100_000}
            made = Versions(job=job, ledger=ledger, repository=blobs)
            made.start({LARGE.id: LARGE, SMALL.id: SMALL}, budgets, Public(unlabeled=None, validation=None))
        signer, topics = Signer.from_seed(b"c" * 32, "test"), Topics(fleet="test")
        link = MemoryLink(MemoryBroker(), "co1")
        yield Service(
            config=CoordinatorConfig(fleet="test", state_dir=str(folder)),
            link=link,
            ledger=ledger,
            repository=blobs,
            signer=signer,
            fleet=Fleet(enrolment="open"),
            publisher=Publisher(link=link, signer=signer, topics=topics),
            topics=topics,
        )
    finally:
        ledger.close()


@dataclass
class Place:
    """A served repository."""

    service: Service
    socket: Path
    client: Client


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    socket = tmp_path / "state" / "api.sock"
    monkeypatch.setenv("LIBERATAI_SOCKET", str(socket))
    with (
        repository(tmp_path / "state") as service,
        served(Operations.of(service), socket),
        Client(socket) as client,
    ):
        yield Place(service, socket, client)


def a_variant(client: Client, budget_bytes: int = 900, **changes: Any) -> tuple[VariantManifest, bytes]:
    """The large structure of version 0 in so many bytes."""
    view = client.models.version("tiny")
    structure, data, content = client.models.weights("tiny", "0", LARGE.id)
    file = compress(from_bytes(content), structure, budget_bytes)
    manifest = VariantManifest(
        model="tiny",
        parent=view.id,
        parent_structure=structure.id,
        structure=structure,
        data=data,
        file=hashlib.sha256(file).hexdigest(),
        size=len(file),
        digest=digest(restore(file, structure)).hex(),
        budget_bytes=budget_bytes,
        method="codebook",
        why="the same structure fits",
        divergence=0.25,
        agreement=0.75,
    )
    return msgspec.structs.replace(manifest, **changes), file


def blobs_of(service: Service) -> set[str]:
    return {path.name for path in (service.repository.folder / "blobs" / "sha256").iterdir()}


# --- commit --------------------------------------------------------------------------------------


def test_a_variant_is_listed_described_and_comes_back_to_its_digest(place: Place) -> None:
    manifest, file = a_variant(place.client)
    made = place.client.variants.commit("latest", manifest, file)
    assert made.id == version_id(manifest)
    assert (made.version, made.parent, made.parent_structure) == (0, manifest.parent, LARGE.id)
    assert (made.bytes, made.budget_bytes, made.agreement, made.accuracy) == (len(file), 900, 0.75, None)
    assert place.client.variants.list("tiny") == (made,)
    found = place.client.variants.show("tiny", made.id[:8])
    assert found.variant == made
    assert (found.structure, found.data) == (LARGE, DATA)
    assert sum(tensor.bytes for tensor in found.tensors) == len(file)
    assert sum(tensor.weights for tensor in found.tensors) == LARGE.parameters
    assert place.client.variants.file(found.variant) == file
    assert digest(restore(file, found.structure)).hex() == made.digest


def test_the_same_variant_is_stored_once_and_is_there_after_a_restart(tmp_path: Path) -> None:
    with (
        repository(tmp_path) as service,
        served(Operations.of(service), tmp_path / "api.sock"),
        Client(tmp_path / "api.sock") as client,
    ):
        manifest, file = a_variant(client)
        first = client.variants.commit("0", manifest, file)
        assert client.variants.commit("0", manifest, file) == first
        assert client.variants.list("tiny") == (first,)
    with repository(tmp_path) as service:
        (row,) = service.ledger.versions.variants("tiny")
        assert decode_variant(row.manifest) == manifest
        service.repository.verify(manifest)


def test_a_variant_may_be_a_smaller_member_of_the_family(place: Place) -> None:
    structure, _, content = place.client.models.weights("tiny", "0", SMALL.id)
    file = compress(from_bytes(content), structure, 400)
    manifest, _ = a_variant(
        place.client,
        structure=structure,
        file=hashlib.sha256(file).hexdigest(),
        size=len(file),
        digest=digest(restore(file, structure)).hex(),
    )
    made = place.client.variants.commit("0", manifest, file)
    assert (made.parent_structure, made.structure, made.parameters) == (LARGE.id, SMALL.id, SMALL.parameters)


OTHER = DataContract(input_shape=(1, 4, 4), classes=4)


@pytest.mark.parametrize(
    ("changes", "kind", "says"),
    [
        ({"model": "other"}, NotFoundError, "model other: not known"),
        ({"parent": "0" * 64}, StateError, "fit that version again"),
        ({"parent_structure": "cnn"}, NotFoundError, "no structure 'cnn'"),
        ({"data": OTHER}, DataError, "4 classes"),
        (
            {"structure": msgspec.structs.replace(LARGE, params={"hidden": 8})},
            StructureError,
            "family builds",
        ),
        ({"file": "0" * 64}, DigestError, "damaged on the way"),
        ({"size": 7}, DigestError, "7 bytes"),
        ({"digest": "0" * 64}, DigestError, "decodes to other weights"),
    ],
)
def test_what_a_manifest_claims_is_checked_and_nothing_is_stored_if_it_is_wrong(
    place: Place, changes: dict[str, Any], kind: type[LiberataiError], says: str
) -> None:
    before = blobs_of(place.service)
    manifest, file = a_variant(place.client, **changes)
    with pytest.raises(kind, match=says):
        place.client.variants.commit("0", manifest, file)
    assert place.client.variants.list("tiny") == ()
    assert blobs_of(place.service) == before


def test_a_variant_of_another_model_than_the_one_in_the_address_is_refused(place: Place) -> None:
    manifest, file = a_variant(place.client, model="other")
    status, code = posted(place.socket, msgspec.msgpack.encode(VariantUpload(manifest=manifest, file=file)))
    assert (status, code) == (422, "E_SCHEMA")


def posted(socket: Path, body: bytes) -> tuple[int, str]:
    transport = httpx.HTTPTransport(uds=str(socket), verify=False)
    with httpx.Client(transport=transport, base_url="http://x", timeout=60) as http:
        answer = http.post("/v1/models/tiny/versions/0/variants", content=body)
        return answer.status_code, answer.json().get("code", "")


def test_a_damaged_file_is_refused_whatever_byte_is_wrong(place: Place) -> None:
    manifest, file = a_variant(place.client)
    before = blobs_of(place.service)
    for at in (0, 5, 40, len(file) // 2, len(file) - 1):
        wrong = bytearray(file)
        wrong[at] ^= 0x10
        claimed = msgspec.structs.replace(manifest, file=hashlib.sha256(wrong).hexdigest())
        body = msgspec.msgpack.encode(VariantUpload(manifest=claimed, file=bytes(wrong)))
        status, code = posted(place.socket, body)
        assert status == 422, at
        assert code in {"E_CODEC", "E_DIGEST", "E_BOMB", "E_NONFINITE"}, at
    assert place.client.variants.list("tiny") == ()
    assert blobs_of(place.service) == before


def test_a_body_that_is_no_variant_or_too_long_is_refused(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, file = a_variant(place.client)
    whole = msgspec.msgpack.encode(VariantUpload(manifest=manifest, file=file))
    for body in (b"", b"\xc1", whole[:-1], whole + b"\x00", b"\x91" * 5000, msgspec.json.encode({})):
        assert posted(place.socket, body) == (422, "E_SCHEMA"), body[:20]
    monkeypatch.setattr(api, "MAX_VARIANT_BYTES", 1000)
    assert len(whole) > 1000
    with pytest.raises(TooLargeError):
        place.client.variants.commit("0", manifest, file)


def test_a_manifest_never_has_a_file_over_its_budget_or_a_figure_that_is_no_number() -> None:
    good = VariantManifest(
        model="tiny",
        parent="0" * 64,
        parent_structure=LARGE.id,
        structure=LARGE,
        data=DATA,
        file="1" * 64,
        size=10,
        digest="2" * 64,
        budget_bytes=10,
        method="codebook",
    )
    assert decode_variant(encode_manifest(good)) == good
    with pytest.raises(SchemaError, match="10 bytes are more than its 9"):
        msgspec.structs.replace(good, budget_bytes=9)
    for wrong in (math.nan, math.inf):
        with pytest.raises(NonFiniteError):
            msgspec.structs.replace(good, divergence=wrong)
        raw = {**msgspec.to_builtins(good), "divergence": wrong}
        with pytest.raises(SchemaError):
            decode_variant(msgspec.msgpack.encode(raw))
    with pytest.raises(SchemaError):
        decode_variant(encode_manifest(good) + b"\x00")


def test_a_crash_before_the_row_leaves_no_variant_and_a_second_try_makes_it(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, file = a_variant(place.client)

    def full(_row: object) -> None:
        raise DiskError("disk full")

    with monkeypatch.context() as broken:
        broken.setattr(place.service.ledger.versions, "add_variant", full)
        with pytest.raises(DiskError, match="disk full"):
            place.client.variants.commit("0", manifest, file)
    assert place.client.variants.list("tiny") == ()
    assert place.client.variants.commit("0", manifest, file).id == version_id(manifest)


def test_what_versions_and_variants_name_survives_a_collection_and_nothing_else_does(place: Place) -> None:
    manifest, file = a_variant(place.client)
    made = place.client.variants.commit("0", manifest, file)
    left = place.service.repository.put(b"of nobody")
    ledger = place.service.ledger
    keep = {row.id for row in ledger.versions.all("tiny")} | {
        row.id for row in ledger.versions.variants("tiny")
    }
    for row in ledger.versions.all("tiny"):
        keep |= decode_manifest(row.manifest).blobs
    for variant in ledger.versions.variants("tiny"):
        keep |= decode_variant(variant.manifest).blobs
    assert place.service.repository.collect(keep) == len(b"of nobody")
    assert left not in blobs_of(place.service)
    assert place.client.variants.file(made) == file
    place.service.repository.verify(manifest)


def test_a_damaged_file_in_the_repository_is_found_and_is_the_coordinators_fault(place: Place) -> None:
    manifest, file = a_variant(place.client)
    made = place.client.variants.commit("0", manifest, file)
    place.service.repository.path(manifest.file).write_bytes(file[:-1] + b"\xff\xff")
    with pytest.raises(DigestError, match="is damaged"):
        place.client.variants.file(made)


def test_a_variant_is_found_by_the_beginning_of_its_id_if_only_one_begins_so(place: Place) -> None:
    for budget in (700, 800, 900):
        manifest, file = a_variant(place.client, budget)
        place.client.variants.commit("0", manifest, file)
    ids = [one.id for one in place.client.variants.list("tiny")]
    assert len(set(ids)) == 3
    for one in ids:
        assert place.client.variants.show("tiny", one[:16]).variant.id == one
    with pytest.raises(NotFoundError, match="models show tiny"):
        place.client.variants.show("tiny", "g")
    with pytest.raises(NotFoundError, match="model other: not known"):
        place.client.variants.show("other", ids[0])
    # Sixteen hex digits begin an id: a seventeenth variant would share its first one with another for sure.
    for seed in range(14):
        manifest, file = a_variant(place.client, 900, seed=1 + seed)
        place.client.variants.commit("0", manifest, file)
    firsts = [one.id[0] for one in place.client.variants.list("tiny")]
    doubled = next(first for first in firsts if firsts.count(first) > 1)
    with pytest.raises(SchemaError, match="give more of the id"):
        place.client.variants.show("tiny", doubled)


def test_the_bytes_of_a_versions_files_are_told_per_tensor(place: Place) -> None:
    found = place.client.models.sizes("tiny", "latest", LARGE.id)
    view = place.client.models.version("tiny")
    assert found.keyframe_bytes + found.delta_bytes == view.bytes[LARGE.id]
    assert sum(tensor.bytes for tensor in found.tensors) == found.keyframe_bytes
    shapes = {tensor.name: tensor.shape for tensor in found.tensors if tensor.weights}
    assert shapes == {tensor.name: tensor.shape for tensor in LARGE.tensors}
    with pytest.raises(NotFoundError, match="no structure 'cnn'"):
        place.client.models.sizes("tiny", "latest", "cnn")


# --- choosing and sizes --------------------------------------------------------------------------


def seen(size: int, agreement: float | None = None, accuracy: float | None = None) -> VariantView:
    return VariantView(
        model="tiny",
        version=0,
        parent="0" * 64,
        id=f"{size:064x}",
        parent_structure=LARGE.id,
        structure=LARGE.id,
        family="mlp",
        params={},
        parameters=LARGE.parameters,
        bytes=size,
        budget_bytes=size,
        file="1" * 64,
        digest="2" * 64,
        method="codebook",
        why="",
        divergence=None,
        agreement=agreement,
        accuracy=accuracy,
        seed=0,
        created_s=0.0,
    )


@pytest.mark.parametrize(
    ("variants", "budget", "chosen"),
    [
        ([], 100, None),
        ([seen(101, 0.9)], 100, None),
        ([seen(100, 0.9), seen(90, 0.95)], 100, 90),
        ([seen(100, 0.9, 0.8), seen(90, 0.95, 0.7)], 100, 100),
        ([seen(100, 0.9, 0.8), seen(90, 0.95)], 100, 90),
        ([seen(100), seen(90, 0.95)], 100, 100),
        ([seen(80), seen(90)], 100, 90),
        ([seen(80, 0.9), seen(90, 0.9)], 100, 80),
        ([seen(80, 0.0), seen(101, 1.0)], 100, 80),
    ],
)
def test_the_best_that_fits_is_judged_by_what_was_measured_for_all_of_them(
    variants: list[VariantView], budget: int, chosen: int | None
) -> None:
    best = best_variant(variants, budget)
    assert (None if best is None else best.bytes) == chosen


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("120KB", 120_000),
        ("120 kb", 120_000),
        ("64KiB", 65_536),
        ("1.5MB", 1_500_000),
        ("2MiB", 2 << 20),
        ("900", 900),
        ("900B", 900),
        ("0.5k", 500),
    ],
)
def test_a_size_is_read_as_people_write_it(text: str, size: int) -> None:
    assert budget_of(text, "--budget") == size


@pytest.mark.parametrize(
    "text", ["", "KB", "-1", "0", "0.1B", "1e3", "12XB", "65MiB", "1 000", "٣KB", "1.KB"]
)
def test_what_is_no_size_of_a_model_file_is_a_usage_error(text: str) -> None:
    with pytest.raises(ConfigError, match="--budget"):
        budget_of(text, "--budget")


def test_a_profile_gives_the_storage_that_the_plan_goes_by(tmp_path: Path) -> None:
    assert budget_of_profile("pi-zero-2w") == 2048 * 1024
    with pytest.raises(ConfigError, match="known: .*pi-zero-2w"):
        budget_of_profile("toaster")


# --- the command line, with a fit of a few milliseconds -------------------------------------------


@dataclass
class QuickFit:
    """Compresses without a search, and remembers what it was asked."""

    asked: dict[str, Any] = field(default_factory=dict)
    interrupts: bool = False

    def __call__(
        self,
        structure: Structure,
        data: DataContract,
        weights: Any,
        budgets: Sequence[int],
        x_unlabeled: Any,
        settings: fitting.FitSettings,
        seed: int,
        *,
        test: Any = None,
        on_progress: Callable[[str, int, int], None] | None = None,
        cache: Path | None = None,
    ) -> list[fitting.Variant]:
        self.asked = {
            "budgets": list(budgets),
            "x": x_unlabeled,
            "settings": settings,
            "seed": seed,
            "test": test,
            "on_progress": on_progress,
            "cache": cache,
        }
        if self.interrupts:
            raise KeyboardInterrupt
        if on_progress is not None:
            on_progress("fitting", 1, 1)
        return [
            fitting.Variant(
                structure=structure,
                file=compress(weights, structure, budget),
                budget_bytes=budget,
                divergence=math.nan if x_unlabeled is None else -1e-9 + 100 / budget,
                agreement=math.nan if x_unlabeled is None else 1 - 50 / budget,
                accuracy=None if test is None else 0.9 - 50 / budget,
                method="codebook",
                why="kept mlp-hidden32: a smaller member diverges more",
                seconds=1.5,
            )
            for budget in budgets
        ]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> QuickFit:
    made = QuickFit()
    monkeypatch.setattr(fitting, "fit", made)
    monkeypatch.setattr(fitting, "pareto", lambda variants: list(variants)[:1])
    monkeypatch.setattr(fitting, "accuracy", lambda *_: 0.91)
    return made


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """Inputs with labels that no reader of labels would take, and a labelled file."""
    draw = np.random.default_rng(0)
    x = draw.normal(size=(40, 1, 4, 4)).astype(np.float32)
    np.savez(tmp_path / "poisoned.npz", x=x, y=np.full(40, 77), test=np.arange(40) < 10)
    np.savez(tmp_path / "test.npz", x=x, y=draw.integers(0, 3, 40), test=np.arange(40) < 10)
    return {name: str(tmp_path / f"{name}.npz") for name in ("poisoned", "test")}


def fit_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> fit_report.FitReport:
    assert main(["models", "fit", "tiny", "--structure", LARGE.id, *arguments, "-o", "json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return msgspec.json.decode(out, type=fit_report.FitReport)


def test_fitting_commits_every_variant_and_prints_a_table(
    place: Place, quick: QuickFit, files: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["models", "fit", "tiny", "--structure", LARGE.id, "--budget", "900", "--budget", "0.7KB"]
    assert main([*command, "--unlabeled", files["poisoned"], "--test", files["test"], "--seed", "5"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert quick.asked["budgets"] == [900, 700]
    assert quick.asked["seed"] == 5
    assert len(quick.asked["x"]) == 30  # without what the file marks as test samples
    assert len(quick.asked["test"][0]) == len(quick.asked["test"][1]) == 10
    assert quick.asked["on_progress"] is None  # nobody looks at a screen
    assert quick.asked["cache"] == place.socket.parent / "fit"
    made = place.client.variants.list("tiny")
    assert [one.budget_bytes for one in made] == [700, 900]
    assert all(one.bytes <= one.budget_bytes for one in made)
    assert [one.agreement for one in made] == [1 - 50 / 700, 1 - 50 / 900]
    assert [one.seed for one in made] == [5, 5]
    for one in made:
        assert f"{one.bytes} B" in out
        assert one.id[:12] in out
    assert "92.86%" in out
    assert "accuracy 91.00% on 10 samples" in out
    assert "a smaller member diverges more" in out
    for one in made:
        structure = place.client.variants.show("tiny", one.id).structure
        assert digest(restore(place.client.variants.file(one), structure)).hex() == one.digest


def test_a_dry_run_commits_nothing(
    place: Place, quick: QuickFit, files: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    found = fit_json(capsys, "--budget", "900", "--unlabeled", files["poisoned"], "--dry-run")
    assert found.dry_run
    assert [point.id for point in found.points] == [""]
    assert place.client.variants.list("tiny") == ()


def test_without_inputs_it_says_what_is_lost(
    place: Place, quick: QuickFit, capsys: pytest.CaptureFixture[str]
) -> None:
    found = fit_json(capsys, "--budget", "900", "--no-retrain")
    assert "nothing was retrained" in found.lost
    assert (found.points[0].agreement, found.points[0].divergence, found.points[0].accuracy) == (None,) * 3
    assert quick.asked["settings"].retrain is False
    (made,) = place.client.variants.list("tiny")
    assert (made.agreement, made.divergence) == (None, None)
    assert main(["models", "fit", "tiny", "--structure", LARGE.id, "--budget", "900"]) == 0
    assert "nothing was retrained" in capsys.readouterr().out


def test_a_profile_is_a_budget_and_the_cache_may_lie_elsewhere(
    place: Place, quick: QuickFit, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = fit_json(capsys, "--profile", "pi-zero-2w", "--cache", str(tmp_path / "kept"), "--dry-run")
    assert [point.budget_bytes for point in found.points] == [2048 * 1024]
    assert quick.asked["cache"] == tmp_path / "kept" / "fit"


def test_an_interrupt_commits_nothing_and_exits_with_130(
    place: Place, quick: QuickFit, capsys: pytest.CaptureFixture[str]
) -> None:
    quick.interrupts = True
    assert main(["models", "fit", "tiny", "--structure", LARGE.id, "--budget", "900"]) == 130
    assert place.client.variants.list("tiny") == ()


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["nothing", "--budget", "1KB"], 4, "E_NOT_FOUND"),
        (["tiny", "--budget", "1KB", "--structure", "cnn"], 4, "no structure 'cnn'"),
        (["tiny", "--budget", "1KB"], 2, "--structure: missing"),
        (["tiny", "--structure", "mlp-hidden32"], 2, "give --budget or --profile"),
        (["tiny", "--structure", "mlp-hidden32", "--budget", "much"], 2, "write it like 120KB"),
        (["tiny", "--structure", "mlp-hidden32", "--profile", "toaster"], 2, "no profile 'toaster'"),
        (["tiny", "--structure", "mlp-hidden32", "--budget", "9KB", "--unlabeled", "no.npz"], 1, "E_DATA"),
        (["tiny", "--structure", "mlp-hidden32", "--budget", "30"], 1, "E_BUDGET"),
    ],
)
def test_what_cannot_be_fitted_has_its_code(
    place: Place,
    quick: QuickFit,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    says: str,
) -> None:
    assert main(["models", "fit", *arguments]) == code
    assert says in capsys.readouterr().err
    assert place.client.variants.list("tiny") == ()


def test_a_report_has_the_figures_and_a_picture(
    place: Place,
    quick: QuickFit,
    files: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["models", "fit", "tiny", "--structure", LARGE.id, "--budget", "900", "--budget", "700"]
    command += ["--unlabeled", files["poisoned"], "--report", str(tmp_path / "report")]
    assert main(command) == 0
    assert "fit.png: written" in capsys.readouterr().err
    found = msgspec.json.decode((tmp_path / "report/fit.json").read_bytes(), type=fit_report.FitReport)
    assert [point.id for point in found.points] == [one.id for one in place.client.variants.list("tiny")]
    assert (tmp_path / "report/fit.png").read_bytes().startswith(b"\x89PNG")
    figure = fit_report.draw(found)
    (axes,) = figure.axes
    assert axes.get_xscale() == "log"
    ticks = [label.get_text() for label in axes.get_xticklabels()]
    assert ticks == [f"{point.file_bytes} B, {point.ratio:.0f}x" for point in found.points]
    values = [text.get_text() for text in axes.texts]
    assert values == [f"{point.agreement:.1%}" for point in found.points]


def test_a_report_without_anything_measured_is_figures_only(
    place: Place, quick: QuickFit, tmp_path: Path
) -> None:
    command = ["models", "fit", "tiny", "--structure", LARGE.id, "--budget", "900"]
    assert main([*command, "--report", str(tmp_path)]) == 0
    assert (tmp_path / "fit.json").exists()
    assert not (tmp_path / "fit.png").exists()


def test_a_report_that_cannot_be_written_is_told_before_the_fit(
    place: Place, quick: QuickFit, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    command = ["models", "fit", "tiny", "--structure", LARGE.id, "--budget", "900"]
    assert main([*command, "--report", str(tmp_path / "file" / "report")]) == 1
    assert "E_DISK" in capsys.readouterr().err
    assert quick.asked == {}


def test_on_a_screen_the_work_is_shown(
    place: Place, quick: QuickFit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert main(["models", "fit", "tiny", "--structure", LARGE.id, "--budget", "900", "--dry-run"]) == 0
    assert quick.asked["on_progress"] is not None


# --- pull and show -------------------------------------------------------------------------------


@pytest.fixture
def three(place: Place) -> list[VariantView]:
    """Variants of 700, 800 and 900 bytes; the one in the middle agrees best."""
    for budget, agreement in ((700, 0.7), (800, 0.9), (900, 0.8)):
        manifest, file = a_variant(place.client, budget, agreement=agreement)
        place.client.variants.commit("0", manifest, file)
    return [*place.client.variants.list("tiny")]


def test_the_best_variant_that_fits_is_pulled_and_decodes_to_its_digest(
    place: Place, three: list[VariantView], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "tiny.lam"
    for arguments, wanted in (
        (["--budget", "0.75KB"], three[0]),
        (["--budget", "900"], three[1]),
        (["--profile", "pi-zero-2w"], three[1]),
        (["--variant", three[2].id[:16]], three[2]),
    ):
        assert main(["models", "pull", "tiny", *arguments, "--out", str(out)]) == 0
        said = capsys.readouterr().out
        assert wanted.id[:12] in said
        assert f"agreement {wanted.agreement:.2%}" in said
        assert hashlib.sha256(out.read_bytes()).hexdigest() == wanted.file
        assert digest(restore(out.read_bytes(), LARGE)).hex() == wanted.digest
    assert main(["models", "pull", "tiny", "--budget", "900", "--out", str(out), "-o", "json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["variant"]["id"] == three[1].id
    assert msgspec.convert(told["structure"], Structure) == LARGE
    assert list(tmp_path.glob("*.part")) == []


def test_variants_of_unlike_originals_are_compared_by_accuracy_only(
    place: Place, three: list[VariantView], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    view, out = place.client.models.version("tiny"), tmp_path / "tiny.lam"
    structure, _, content = place.client.models.weights("tiny", "0", SMALL.id)
    file = compress(from_bytes(content), structure, 600)
    other, _ = a_variant(
        place.client,
        600,
        parent_structure=SMALL.id,
        structure=structure,
        file=hashlib.sha256(file).hexdigest(),
        size=len(file),
        digest=digest(restore(file, structure)).hex(),
        agreement=0.99,
    )
    assert other.parent == view.id
    small = place.client.variants.commit("0", other, file)
    pull = ["models", "pull", "tiny", "--budget", "900", "--out", str(out)]
    assert main(pull) == 2
    assert "--structure: missing: variants of" in capsys.readouterr().err
    for sid, wanted in ((SMALL.id, small.id), (LARGE.id, three[1].id)):
        assert main([*pull, "--structure", sid]) == 0
        assert wanted[:12] in capsys.readouterr().out
    assert main([*pull, "--structure", "owl"]) == 2
    assert SMALL.id in capsys.readouterr().err


def test_what_cannot_be_pulled_writes_nothing(
    place: Place, three: list[VariantView], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "tiny.lam"
    for arguments, code, says in (
        (["tiny", "--budget", "100"], 4, f"the smallest has {three[0].bytes} bytes"),
        (["tiny", "--variant", "ffffffffffff0"], 4, "no variant"),
        (["nothing", "--budget", "1KB"], 4, "E_NOT_FOUND"),
        (["tiny"], 2, "give one of"),
        (["tiny", "--budget", "1KB", "--variant", three[0].id], 2, "give one of"),
        (["tiny", "--budget", "100", "--structure", LARGE.id], 4, f"--structure {LARGE.id} --budget 100"),
    ):
        assert main(["models", "pull", *arguments, "--out", str(out)]) == code
        assert says in capsys.readouterr().err
    place.service.repository.path(three[1].file).write_bytes(b"damaged")
    assert main(["models", "pull", "tiny", "--variant", three[1].id, "--out", str(out)]) == 1
    assert "E_DIGEST" in capsys.readouterr().err
    assert not out.exists()
    assert main(["models", "pull", "tiny", "--budget", "700", "--out", str(tmp_path / "no" / "x.lam")]) == 1
    assert "E_DISK" in capsys.readouterr().err


def test_showing_a_version_says_where_the_bytes_go_and_lists_its_variants(
    place: Place, three: list[VariantView], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["models", "show", "tiny"]) == 0
    brief = capsys.readouterr().out
    assert LARGE.tensors[1].name not in brief
    for one in three:
        assert one.id[:12] in brief
    assert f"{LARGE.parameters} weights, keyframe" in brief
    for more in (["--tensors"], ["-o", "wide"]):
        assert main(["models", "show", "tiny", *more]) == 0
        whole = capsys.readouterr().out
        assert all(tensor.name in whole for tensor in LARGE.tensors)
    assert main(["models", "show", "tiny", "-o", "json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["id"] == place.client.models.version("tiny").id
    assert [one["id"] for one in told["variants"]] == [one.id for one in three]
    assert {one["structure"] for one in told["sizes"]} == {LARGE.id, SMALL.id}


def test_showing_a_variant_says_where_its_bytes_go(
    place: Place, three: list[VariantView], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["models", "show", "tiny", "--variant", three[0].id[:12], "--tensors"]) == 0
    out = capsys.readouterr().out
    assert three[0].id in out
    assert "header" in out
    assert all(tensor.name in out for tensor in LARGE.tensors)


# --- end to end, with the real search ------------------------------------------------------------


def test_a_model_is_fitted_committed_pulled_and_restored(
    place: Place, files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    budget = smallest_bytes(LARGE) + 500
    arguments = ["--budget", str(budget), "--unlabeled", files["poisoned"], "--test", files["test"]]
    found = fit_json(capsys, *arguments, "--steps", "5", "--cache", str(tmp_path))
    (point,) = found.points
    assert point.file_bytes <= budget
    assert point.agreement is not None
    assert point.accuracy is not None
    (made,) = place.client.variants.list("tiny")
    assert made.id == point.id
    assert (made.parent, made.parent_structure) == (place.client.models.version("tiny").id, LARGE.id)
    out = tmp_path / "tiny.lam"
    assert main(["models", "pull", "tiny", "--budget", str(budget), "--out", str(out)]) == 0
    detail = place.client.variants.show("tiny", made.id)
    assert digest(restore(out.read_bytes(), detail.structure)).hex() == made.digest


def test_a_budget_below_every_file_says_the_smallest_possible(
    place: Place, files: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["models", "fit", "tiny", "--structure", LARGE.id, "--budget", "10"]
    assert main([*command, "--unlabeled", files["poisoned"]]) == 1
    err = capsys.readouterr().err
    assert BudgetError.code in err
    assert any(character.isdigit() for character in err)
    assert place.client.variants.list("tiny") == ()
