"""The plan gives every device the first structure that fits, and says why."""

from typing import Any

import msgspec
import pytest

from liberatai_coordinator.config import parse_job
from liberatai_coordinator.plan import Candidate, assign, make_plan
from liberatai_core.contract.messages import Capability
from liberatai_core.structure import DataContract

JOB = parse_job(
    """
name: digits
data: {input_shape: [1, 8, 8], classes: 10}
structures: [{family: cnn, params: {width: 32}}, {family: mlp}]
rounds: {deadline_s: 60}
""",
    "job.yaml",
)
LARGE = Candidate(
    id="cnn-width32",
    family="cnn",
    density=0.05,
    parameters=100_000,
    smallest_bytes=9000,
    macs=1_000_000,
    activation_bytes=50_000,
)
SMALL = Candidate(
    id="mlp",
    family="mlp",
    density=0.05,
    parameters=10_000,
    smallest_bytes=900,
    macs=10_000,
    activation_bytes=1000,
)


def device(name: str = "d0", **changes: Any) -> Capability:
    whole = Capability(
        device=name,
        public_key=b"k" * 32,
        session=1,
        agent_version="0",
        tier="full",
        memory_bytes=2**30,
        storage_bytes=200_000,
        gflops=10.0,
        samples=100,
    )
    return msgspec.structs.replace(whole, **changes)


def test_a_roomy_device_gets_the_most_wanted_structure() -> None:
    given = assign(JOB, [LARGE, SMALL], device())
    assert given.structure == "cnn-width32"
    assert given.density == JOB.sparsify.up_density
    assert "fits" in given.why


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"storage_bytes": 50_000}, "storage"),
        ({"memory_bytes": 341 * 2**20}, "memory"),
        ({"gflops": 1.0, "samples": 2000}, "deadline"),
        ({"families": ("mlp",)}, "does not have the family cnn"),
    ],
)
def test_a_limit_leads_to_the_smaller_structure_and_is_named(changes: dict[str, Any], reason: str) -> None:
    given = assign(JOB, [LARGE, SMALL], device(**changes))
    assert given.structure == "mlp"
    assert given.why.startswith("cnn-width32: ")
    assert reason in given.why


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"tier": "observe"}, "cannot train"),
        ({"samples": 0}, "no usable local data"),
        ({"data": DataContract(input_shape=(3, 8, 8), classes=10)}, "shape"),
        ({"data": DataContract(input_shape=(1, 8, 8), classes=11)}, "classes"),
        ({"storage_bytes": 100}, "nothing fits"),
    ],
)
def test_a_device_that_cannot_take_part_is_told_why(changes: dict[str, Any], reason: str) -> None:
    given = assign(JOB, [LARGE, SMALL], device(**changes))
    assert given.structure == ""
    assert reason in given.why


def test_a_slow_link_lowers_the_density_and_says_so() -> None:
    given = assign(JOB, [LARGE, SMALL], device(up_bits_s=2000.0))
    assert given.structure == "cnn-width32"
    assert 0 < given.density < JOB.sparsify.up_density
    assert "kbit/s" in given.why


def test_the_tightest_storage_sizes_the_shared_keyframe() -> None:
    made = make_plan(
        JOB,
        [LARGE, SMALL],
        [device("b", storage_bytes=1_000_000), device("a", storage_bytes=105_000)],
    )
    assert made.keyframe_bytes == {"cnn-width32": 105_000 - 12 * 6250}
    assert list(made.assignments) == ["a", "b"]


def test_bits_cap_the_keyframe_where_storage_is_plenty() -> None:
    made = make_plan(JOB, [LARGE, SMALL], [device("a", storage_bytes=10_000_000)])
    assert made.keyframe_bytes == {"cnn-width32": 100_000 * 4 // 8 + 512}
