"""The report: every device and round of a recorded run is on the page, with its pictures."""

import base64
import re

import msgspec
import pytest

from liberatai_coordinator.client.views import EnsembleView, LocalView, ScoreView, WorstView
from liberatai_coordinator.pictures import report as reports

STRUCTURES = {"cnn-width16": 9978, "ds_cnn-width32": 6922, "mlp-hidden64": 4874}


@pytest.fixture
def report():
    ids = list(STRUCTURES)
    devices = tuple(
        reports.DeviceLine(
            id=f"dev-{n}",
            profile=("demo-nuc", "demo-pi4", "demo-pi-zero-2w")[n % 3],
            tier="full",
            structure=ids[n % 3],
            variant_bytes=5000 - 1000 * (n % 3),
            budget_bytes=12_000 - 3000 * (n % 3),
            why=f"reason {n}: 4.9 KB keyframe in 11.7 KB storage",
            samples=100 + n,
            class_counts=(10 + n, 0, 3, 40, 1, 2, 0, 20, 14, 10),
            sent_bytes=9000,
            received_bytes=14_000,
        )
        for n in range(8)
    )
    rounds = tuple(
        reports.RoundLine(
            round=n,
            seconds=1.5,
            train_seconds_max=0.9,
            teach_seconds=0.4,
            up_bytes=6000 + n,
            down_bytes=9000 if n > 1 else 48_000,
            accuracy={**{s: 1 - 0.6 / n - 0.01 * p for p, s in enumerate(ids)}, "ensemble": 1 - 0.5 / n},
            updates=8,
            invited=8,
        )
        for n in range(1, 13)
    )
    return reports.Report(
        broker="mosquitto 2.0.18",
        protocol="MQTT 5",
        seed=7,
        devices=devices,
        rounds=rounds,
        dense_bytes=5_600_000,
        total_bytes=184_000,
        final={"cnn-width16": 0.95, "ds_cnn-width32": 0.94, "mlp-hidden64": 0.93, "ensemble": 0.958,
               "best_member": 0.95, "centralised": 0.981},
        orchestration_s_per_round=0.2,
        versions={"liberatai": "0.1.0", "python": "3.11.7"},
        structures=tuple(
            reports.StructureRow(id=s, family=s.split("-")[0], parameters=n, devices=3)
            for s, n in STRUCTURES.items()
        ),
        test_samples=359,
        alpha=0.3,
        baseline_epochs=36,
        baseline_structure="cnn-width16",
        seconds_total=55.2,
        machine="x86_64, 2 cores",
    )  # fmt: skip


def test_page_shows_every_device_round_structure_and_reason(report):
    page = reports.html(report)
    for device in report.devices:
        assert device.id in page
        assert device.why in page
    for row in report.rounds:
        assert f"<td>{row.round}</td>" in page
    for structure in STRUCTURES:
        assert structure in page
    assert "95.8 %" in page
    assert "30 \u00d7 less" in page


def test_page_carries_its_pictures_and_asks_nobody_for_anything(report):
    page = reports.html(report)
    pictures = re.findall(r'<img src="data:image/png;base64,([^"]+)" alt="([^"]+)"', page)
    assert len(pictures) == 2
    for content, text in pictures:
        assert base64.b64decode(content).startswith(b"\x89PNG")
        assert len(text) > 30
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert "<script" not in page


def test_page_shows_what_devices_hold_out_and_who_is_believed(report):
    assert "On the devices themselves" not in reports.html(report)
    assert "Who is believed" not in reports.html(report)
    told = ScoreView(accuracy=0.75, correct=30, total=40, devices=3)
    local = LocalView(
        version=11,
        all=told,
        structures={"cnn-width16": told},
        profiles={"<b>pi</b>": ScoreView(accuracy=0.5, correct=1, total=2, devices=1)},
        worst=WorstView(accuracy=0.25, devices=1, of=2),
    )
    ensemble = EnsembleView(method="label_free", members=("<i>",), weights=((0.125,) * 10,), guard="it stays")
    page = reports.html(msgspec.structs.replace(report, local=local, ensemble=ensemble, merged="mean: 8"))
    section = page.split("On the devices themselves")[1].split("</section>")[0]
    assert re.findall(r'"num">([\d.]+ %)', section) == ["75.0 %", "50.0 %", "75.0 %", "25.0 %"]
    assert "version 11" in section
    assert "&lt;b&gt;pi&lt;/b&gt;" in section
    section = page.split("Who is believed")[1].split("</section>")[0]
    assert section.count(">0.12</td>") == 10
    assert "Guard: it stays." in section
    assert "mean: 8" in section
    assert "<b>pi" not in page
    assert "<i>" not in section


def test_page_escapes_what_devices_say(report):
    first = msgspec.structs.replace(report.devices[0], why="<script>alert(1)</script>")
    page = reports.html(msgspec.structs.replace(report, devices=(first, *report.devices[1:])))
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)" in page


def test_written_record_is_read_back_and_has_the_promised_keys(report, tmp_path):
    page, record = reports.write(report, tmp_path / "out")
    assert reports.read(record.read_bytes()) == report
    raw = msgspec.json.decode(record.read_bytes())
    promised = {"broker", "protocol", "seed", "devices", "rounds", "dense_bytes", "total_bytes", "final",
                "orchestration_s_per_round", "versions"}  # fmt: skip
    assert promised <= raw.keys()
    assert page.stat().st_size > 20_000


def test_page_of_one_round_without_bytes_or_assignment_still_renders(report):
    lonely = msgspec.structs.replace(report.devices[0], structure="", variant_bytes=0, budget_bytes=0)
    short = msgspec.structs.replace(
        report, devices=(lonely,), rounds=report.rounds[:1], total_bytes=0, structures=()
    )
    assert "none" in reports.html(short)
    assert short.ratio == 0.0


def test_record_of_another_form_is_refused():
    with pytest.raises(msgspec.ValidationError):
        reports.read(b'{"broker": "x"}')


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (812, "812 B"), (1024, "1 KiB"), (12_595, "12.3 KiB"), (4_300_000, "4.1 MiB")],
)
def test_sizes_are_readable(count, text):
    assert reports.size(count) == text


def test_colours_differ_and_follow_size(report):
    colours = reports.colours_of(report)
    assert list(colours) == ["cnn-width16", "ds_cnn-width32", "mlp-hidden64"]
    assert len(set(colours.values())) == 3
