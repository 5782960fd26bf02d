"""A profile states the limits of one class of hardware, with a unit in every name."""

from pathlib import Path
from typing import Any

import pytest

from liberatai_core.errors import ConfigError
from liberatai_core.profile import form_of, is_assumed, numbers, parse_profile, source_of

TEXT = """
id: raspberry-pi-4
description: Raspberry Pi 4 Model B, 2 GB
arch: aarch64
cores: 4
cpu_share: 2
memory_mb: 512
gflops: 6.5
storage: {model_kb: 256, kind: microsd}
net: {up_mbit: 5, down_mbit: 20}
source: {cores: data sheet}
"""


def test_a_profile_is_read_and_its_limits_are_bytes() -> None:
    profile = parse_profile(TEXT, "p.yaml")
    assert profile.storage_bytes == 256 * 1024
    assert profile.memory_bytes == 512 * 1024 * 1024
    assert (profile.net.rtt_ms, profile.net.assumed) == (20.0, True)


def test_a_fraction_of_a_kibibyte_is_rounded_down() -> None:
    assert parse_profile(TEXT.replace("model_kb: 256", "model_kb: 0.9995"), "p.yaml").storage_bytes == 1023


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("model_kb: 256", "model_kb: 0", "storage.model_kb: must be > 0"),
        ("model_kb: 256", "model_kb: 1e308", "storage.model_kb: must be > 0 and <= 1000000000000"),
        ("model_kb: 256", "model_kb: .nan", "storage.model_kb: must be finite"),
        ("memory_mb: 512", "memory_mb: -1", "memory_mb: must be > 0"),
        ("memory_mb: 512", "memory_mb: .inf", "memory_mb: must be finite"),
        ("memory_mb: 512", "memory: 512", "memory: unknown key"),
        ("cores: 4", "cores: 0", "cores: must be a whole number >= 1"),
        ("cores: 4", "cores: 3.5", "cores: must be a whole number >= 1"),
        ("arch: aarch64", "arch: arm", "arch: must be one of aarch64, armv7l, x86_64"),
        ("id: raspberry-pi-4", "id: ../pi", "id: must be text like"),
        ("id: raspberry-pi-4", 'id: "pi\\n"', "id: must be text like"),
        ("kind: microsd", "kind: floppy", "storage.kind: must be one of"),
        ("up_mbit: 5, ", "", "net.up_mbit: missing"),
        ("source: {cores: data sheet}", "source: {core: data sheet}", "source, assumed: core: no number"),
        ("source: {cores: data sheet}", "assumed: [net.up]", "source, assumed: net.up: no number"),
        ("down_mbit: 20}", "down_mbit: 20, loss_percent: 100}", "net.loss_percent: must be >= 0 and < 100"),
    ],
)
def test_a_wrong_limit_is_refused_and_named(old: str, new: str, fault: str) -> None:
    assert old in TEXT
    with pytest.raises(ConfigError) as caught:
        parse_profile(TEXT.replace(old, new), "p.yaml")
    assert any(line.startswith(fault) for line in caught.value.faults)


def test_every_number_says_whether_it_was_measured_and_where_it_comes_from() -> None:
    profile = parse_profile(
        TEXT.replace("}\nsource", ", assumed: false}\nassumed: [gflops]\nsource"), "p.yaml"
    )
    assert dict(numbers(profile))["storage.model_kb"] == 256
    assert is_assumed(profile, "gflops")
    assert not is_assumed(profile, "net.up_mbit")
    assert (source_of(profile, "cores"), source_of(profile, "gflops")) == ("data sheet", "")


SHIPPED = sorted((Path(__file__).parents[3] / "device_profiles").glob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_profile_is_valid_and_named_like_its_file(path: Any) -> None:
    assert parse_profile(path.read_text(encoding="utf-8"), path.name).id == path.stem


@pytest.mark.parametrize(
    ("tier", "runtimes", "form"),
    [
        ("full", ("torch", "onnxruntime"), "liberatai"),
        ("full", ("torch",), "liberatai"),
        ("head", ("onnxruntime",), "onnx-int8"),
        ("observe", ("torch", "onnxruntime"), "onnx-int8"),
        ("observe", ("torch",), "liberatai"),
        ("observe", (), "liberatai"),
    ],
)
def test_who_trains_gets_the_compressed_file_and_who_only_computes_int8_where_something_runs_it(
    tier: Any, runtimes: Any, form: str
) -> None:
    assert form_of(tier, runtimes) == form
