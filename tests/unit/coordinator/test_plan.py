"""The plan gives every device the first structure that fits, and says why."""

import dataclasses
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest

from liberatai_coordinator.config import JobSpec, Rounds, Sparsify, parse_job
from liberatai_coordinator.fleet.plan import (
    EFFICIENCY,
    LINK_SHARE,
    MIN_DENSITY,
    OVERHEAD_BYTES,
    Candidate,
    assign,
    by_link,
    chain_bytes,
    density,
    make_plan,
    share,
    spacing_s,
    unfit,
    update_bytes,
    warmed,
)
from liberatai_core.contract.messages import Capability
from liberatai_core.learning.dataset import _prepared
from liberatai_core.sparsifier import top_k
from liberatai_core.sparsifier.methods import METHODS
from liberatai_core.structure import DataContract, Structure, Tensor

JOB_TEXT = """
name: digits
data: {input_shape: [1, 8, 8], classes: 10}
structures: [{family: cnn, params: {width: 32}}, {family: mlp}]
rounds: {deadline_s: 60}
"""
JOB = parse_job(JOB_TEXT, "job.yaml")
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
        data=JOB.data,
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
    assert given.density == LARGE.density
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


BOARD: dict[str, Any] = {"memory_bytes": 100 * 2**20, "runtimes": ("numpy",)}


def test_a_board_without_torch_trains_with_numpy() -> None:
    given = assign(JOB, [LARGE, SMALL], device(**BOARD))
    assert (given.structure, given.tier) == ("cnn-width32", "numpy")
    assert "torch is not installed" in given.why
    assert "fits with numpy" in given.why
    small = assign(JOB, [LARGE, SMALL], device(**{**BOARD, "memory_bytes": 50 * 2**20}))
    assert (small.structure, small.tier) == ("mlp", "numpy")


HEAD = dataclasses.replace(LARGE, id="cnn-trainhead-width32", trained=1000, head=True)


def test_what_cannot_train_a_network_trains_its_head() -> None:
    slow = {**BOARD, "gflops": 0.1}
    given = assign(JOB, [LARGE, HEAD], device(**slow))
    assert (given.structure, given.tier) == (HEAD.id, "head")
    assert "deadline" in given.why
    small = assign(JOB, [LARGE, SMALL, HEAD], device(**{**BOARD, "tier": "head", "memory_bytes": 47 * 2**20}))
    assert (small.structure, small.tier) == (HEAD.id, "head")
    assert "it trains heads only" in small.why
    assert not assign(JOB, [HEAD], device(runtimes=("torch",))).structure, "of an earlier release"
    assert not assign(JOB, [HEAD], device(**BOARD), too_heavy=[(HEAD.id, "head")]).structure
    tiny = assign(JOB, [HEAD], device(**{**BOARD, "tier": "head", "memory_bytes": 40 * 2**20}))
    assert "training a head takes" in tiny.why


def test_torch_that_is_installed_and_too_large_is_not_used() -> None:
    given = assign(JOB, [LARGE, SMALL], device(memory_bytes=300 * 2**20, runtimes=("torch", "numpy")))
    assert (given.structure, given.tier) == ("cnn-width32", "numpy")
    assert "training with torch takes 34" in given.why


def test_what_a_device_ran_out_of_memory_with_is_not_given_again() -> None:
    both = device(runtimes=("torch", "numpy"))
    tried: list[tuple[str, str]] = []
    while (given := assign(JOB, [LARGE, SMALL], both, too_heavy=tried)).structure:
        tried.append((given.structure, given.tier))
    assert tried == [("cnn-width32", "full"), ("cnn-width32", "numpy"), ("mlp", "full"), ("mlp", "numpy")]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"tier": "observe"}, "cannot train"),
        ({"samples": 0}, "no usable local data"),
        ({"data": None}, "no usable local data"),
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
    assert 0 < given.density < LARGE.density
    assert "kbit/s" in given.link


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


# --- links ---------------------------------------------------------------------------------------

MILLIONS = Candidate(
    id="cnn-width64",
    family="cnn",
    density=0.01,
    parameters=1_600_000,
    smallest_bytes=100_000,
    macs=1_000_000,
    activation_bytes=50_000,
)


def upload_s(candidate: Candidate, share: float, bits_s: float) -> float:
    return 8 * (update_bytes(candidate.parameters, share) + OVERHEAD_BYTES) / bits_s


def test_a_measured_slow_link_is_explained_in_words() -> None:
    share, words = density(JOB, MILLIONS, device(up_bits_s=16e3, link_measured=True))
    assert 0.004 < share < 0.006
    assert words == (
        f"link of 16 kbit/s measured: {100 * share:.2f} % instead of 1.00 % of the parameters per round, "
        "about 6 s per update; the rest follows in later rounds"
    )


@pytest.mark.parametrize("bits_s", [5e3, 10e3, 16e3, 25e3])
def test_a_slow_link_is_used_fully_but_for_no_longer_than_its_share_of_the_deadline(bits_s: float) -> None:
    share, _ = density(JOB, MILLIONS, device(up_bits_s=bits_s))
    allowed = JOB.rounds.deadline_s * LINK_SHARE
    assert 0.99 * allowed < upload_s(MILLIONS, share, bits_s) <= allowed * 1.001


def test_faster_links_send_more_up_to_what_the_job_wants() -> None:
    shares = [density(JOB, MILLIONS, device(up_bits_s=bits_s))[0] for bits_s in (3e3, 6e3, 1e4, 1e6, 1e9)]
    assert shares == sorted(shares)
    assert shares[-2:] == [0.01, 0.01]


def test_a_link_that_nobody_knows_changes_nothing() -> None:
    share, words = density(JOB, MILLIONS, device())
    assert share == MILLIONS.density
    assert "not measured" in words


def test_download_and_training_take_from_the_time_of_the_upload() -> None:
    slow = device(up_bits_s=16e3, down_bits_s=60e3, gflops=None)
    alone, _ = density(JOB, MILLIONS, slow, download_bytes=0)
    after_download, _ = density(JOB, MILLIONS, slow, download_bytes=330_000)
    assert 0 < after_download < alone
    nothing, why = density(JOB, MILLIONS, slow, download_bytes=400_000)
    assert nothing == 0.0
    assert "to download take about 53 s" in why
    assert "60 s deadline" in why
    training = device(up_bits_s=16e3, down_bits_s=60e3, gflops=10.0, samples=1800)
    assert density(JOB, MILLIONS, training, download_bytes=330_000)[0] == 0.0
    assert density(JOB, MILLIONS, training, download_bytes=0)[0] > 0.0


@pytest.mark.parametrize(
    "changes", [{"up_bits_s": 0.0}, {"up_bits_s": 2e3}, {"up_bits_s": 1e6, "down_bits_s": 0.0}]
)
def test_a_hopeless_link_is_told_why_and_gets_no_task(changes: dict[str, Any]) -> None:
    share, words = density(JOB, MILLIONS, device(**changes))
    assert share == 0.0
    assert "needed" in words or "to download" in words


def test_where_a_large_structure_is_too_much_for_the_link_a_small_one_is_given() -> None:
    poor = device(up_bits_s=2500.0, storage_bytes=10**7)
    given = assign(JOB, [MILLIONS, LARGE], poor)
    assert given.structure == "cnn-width32"
    assert given.why.startswith("cnn-width64: link of 2.5 kbit/s by its profile: ")
    alone = assign(JOB, [MILLIONS], poor)
    assert (alone.structure, alone.density) == ("", 0.0)
    assert "at least 0.05 %" in alone.why


def test_a_job_that_wants_less_than_the_least_density_gets_it() -> None:
    modest = replace(MILLIONS, density=MIN_DENSITY / 5)
    assert density(JOB, modest, device(up_bits_s=64e3))[0] == modest.density


def test_a_quota_is_spread_over_the_rounds_of_a_day() -> None:
    day = device(metered=True, day_quota_bytes=50 * 2**20)
    share, words = density(JOB, MILLIONS, day)
    rounds = 86_400 / JOB.rounds.deadline_s
    down = update_bytes(MILLIONS.parameters, MILLIONS.density) + OVERHEAD_BYTES
    spent = rounds * (down + update_bytes(MILLIONS.parameters, share) + OVERHEAD_BYTES)
    assert 0.98 * day.day_quota_bytes < spent < 1.0001 * day.day_quota_bytes
    assert words.startswith("quota of 50 MiB per day: ")
    more, _ = density(JOB, MILLIONS, day, round_s=2 * JOB.rounds.deadline_s)
    assert more > share
    none, why = density(JOB, MILLIONS, device(day_quota_bytes=2**20))
    assert none == 0.0
    assert "quota of 1 MiB per day" in why


def test_a_quota_smaller_than_the_keyframe_excludes_the_structure() -> None:
    given = assign(JOB, [MILLIONS], device(day_quota_bytes=200_000, storage_bytes=10**7))
    assert given.structure == ""
    assert "day's quota" in given.why


def test_metered_without_a_quota_is_no_limit() -> None:
    assert density(JOB, MILLIONS, device(metered=True, up_bits_s=1e9))[0] == MILLIONS.density


def test_the_density_of_the_downlink_counts_for_the_download() -> None:
    slow = device(up_bits_s=100e3, down_bits_s=20e3)
    usual, _ = density(JOB, MILLIONS, slow)
    dense_down, _ = density(JOB, replace(MILLIONS, down_density=0.1), slow)
    assert usual > 0 == dense_down


def test_an_assignment_follows_its_devices_link_and_keeps_the_rest() -> None:
    given = assign(JOB, [LARGE, SMALL], device(up_bits_s=1e6))
    slower = by_link(JOB, [LARGE, SMALL], given, device(up_bits_s=2000.0, link_measured=True))
    assert (slower.structure, slower.why) == (given.structure, given.why)
    assert slower.density < given.density
    assert slower.link.startswith("link of 2 kbit/s measured")
    assert by_link(JOB, [LARGE, SMALL], given, None) is given
    nothing = assign(JOB, [LARGE], device(samples=0))
    assert by_link(JOB, [LARGE], nothing, device()) is nothing


@pytest.mark.parametrize("share", [0.3, 0.1, 0.01, 0.001])
def test_the_estimated_length_is_near_that_of_the_codec(share: float) -> None:
    """Estimated from the entropy; checked against real streams of random ternary updates."""
    structure = Structure(family="mlp", params={}, tensors=(Tensor(name="w", shape=(200_000,)),))
    difference = np.random.default_rng(0).normal(size=200_000).astype(np.float32)
    _, body = top_k.sparsify(top_k.init(200_000), difference, structure, share)
    assert 0.7 < len(body) / update_bytes(200_000, share) < 1.4


def by(method: str) -> JobSpec:
    return msgspec.structs.replace(JOB, sparsify=msgspec.structs.replace(JOB.sparsify, method=method))


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_is_priced_as_its_streams_are_long(method: str) -> None:
    structure = Structure(family="mlp", params={}, tensors=(Tensor(name="w", shape=(50_000,)),))
    difference = np.random.default_rng(0).normal(size=50_000).astype(np.float32)
    _, body = METHODS[method].sparsify(top_k.init(50_000), difference, structure, 0.05)
    assert 0.7 < len(body) / update_bytes(50_000, 0.05, method) < 1.4


def test_a_whole_model_takes_what_it_takes_or_the_device_no_part() -> None:
    """Plain averaging does not get by with fewer parameters on a slow link."""
    seconds = 8 * (4 * LARGE.parameters + OVERHEAD_BYTES) / (JOB.rounds.deadline_s * LINK_SHARE)
    assert density(by("dense"), LARGE, device(up_bits_s=seconds * 1.01))[0] == LARGE.density
    share, words = density(by("dense"), LARGE, device(up_bits_s=seconds * 0.99))
    assert share == 0.0
    assert "391 KiB" in words
    assert density(by("topk"), LARGE, device(up_bits_s=seconds * 0.99))[0] == LARGE.density


def test_a_whole_model_per_round_must_fit_storage_and_downlink() -> None:
    room = device(storage_bytes=4 * LARGE.parameters + 512)
    assert assign(by("dense"), [LARGE], room).structure == LARGE.id
    less = msgspec.structs.replace(room, storage_bytes=4 * LARGE.parameters)
    given = assign(by("quantile"), [LARGE], less)
    assert given.structure == ""
    assert "storage" in given.why
    assert assign(JOB, [LARGE], less).structure == LARGE.id
    slow = device(up_bits_s=1e6, down_bits_s=8 * 4 * LARGE.parameters / 60)
    assert density(by("quantile"), LARGE, slow)[0] == 0.0
    assert density(by("random_k"), LARGE, slow)[0] == LARGE.density, "its downlink is sparse"


def test_a_link_measured_in_a_bad_hour_does_not_take_the_part_away() -> None:
    """It gets nothing to do now, but what it may do when its link has recovered."""
    poor = device(up_bits_s=2e3, link_measured=True)
    given = assign(JOB, [MILLIONS], msgspec.structs.replace(poor, storage_bytes=10**7))
    assert (given.structure, given.density) == (MILLIONS.id, 0.0)
    assert given.link.startswith("link of 2 kbit/s measured: ")
    assert by_link(JOB, [MILLIONS], given, device(up_bits_s=1e6)).density == MILLIONS.density
    without_room = assign(JOB, [MILLIONS], poor)
    assert without_room.structure == ""


def test_a_quota_is_spread_over_the_participations_that_can_still_come() -> None:
    assert spacing_s(JOB, 10_000) == JOB.rounds.deadline_s
    assert spacing_s(JOB, 10_000, 300.0) == 300.0
    assert spacing_s(JOB, 10, 5.0) == 8640.0, "ten rounds are all that follow"
    day = device(metered=True, day_quota_bytes=2**20)
    assert density(JOB, MILLIONS, day, round_s=60.0)[0] == 0.0
    weekly, daily = (density(JOB, MILLIONS, day, round_s=n * 86_400.0)[0] for n in (7, 1))
    assert weekly == daily > 0, "a day's quota does not last longer than a day"


# --- schedules -----------------------------------------------------------------------------------


def test_densities_start_higher_and_come_down_to_what_the_job_says() -> None:
    job = msgspec.structs.replace(
        JOB, rounds=Rounds(count=20), sparsify=Sparsify(warmup_rounds=4, warmup_factor=16.0)
    )
    wanted = replace(LARGE, density=0.01, down_density=0.02)
    up = [warmed(job, wanted, number).density for number in (1, 2, 3, 4, 5, 20)]
    assert up == pytest.approx([0.16, 0.08, 0.04, 0.02, 0.01, 0.01])
    assert warmed(job, wanted, 1).down_density == pytest.approx(0.32)
    assert warmed(msgspec.structs.replace(job, sparsify=Sparsify()), wanted, 1) == wanted


def test_densities_count_in_what_is_trained() -> None:
    part = replace(LARGE, trained=LARGE.parameters // 10)
    whole_words, part_words = (density(JOB, one, device())[1] for one in (LARGE, part))
    assert part.travelling * 10 == pytest.approx(LARGE.travelling, abs=10)
    assert whole_words != part_words


def test_a_dense_job_reserves_no_more_than_one_merged_delta() -> None:
    """With a density of 0.2 twelve single deltas are longer than the model, and a small device would get none."""
    dense = replace(SMALL, density=0.2)
    assert chain_bytes(JOB, dense) == chain_bytes(JOB, replace(SMALL, density=1.0))
    assert chain_bytes(JOB, dense) < 1.3 * SMALL.parameters
    assert assign(JOB, [dense], device(storage_bytes=17_000)).structure == SMALL.id


@pytest.mark.parametrize("shape", [(1, 8, 8), (8, 8), (8, 8, 1)])
def test_every_shape_that_the_loader_adapts_takes_part(shape: tuple[int, ...]) -> None:
    told = device(data=DataContract(input_shape=shape, classes=10))
    assert assign(JOB, [LARGE, SMALL], told).structure == LARGE.id
    x = np.zeros((3, *shape), np.float32)
    assert _prepared(x, JOB.data, "file").shape == (3, 1, 8, 8)


def test_a_job_that_wants_its_inputs_flat_takes_pictures() -> None:
    flat = msgspec.structs.replace(JOB, data=DataContract(input_shape=(64,), classes=10))
    assert unfit(flat, device(data=DataContract(input_shape=(8, 8), classes=10))) == ""
    assert "shape" in unfit(flat, device(data=DataContract(input_shape=(8, 9), classes=10)))
    assert "shape" in unfit(JOB, device(data=DataContract(input_shape=(64,), classes=10)))


@pytest.mark.parametrize("up", [None, 10.0, 2000.0, 20_000.0, 1e6])
@pytest.mark.parametrize("quota", [0, 200_000, 50 * 2**20])
@pytest.mark.parametrize("method", ["topk", "dense", "quantile"])
def test_the_quick_share_is_the_explained_density(up: float | None, quota: int, method: str) -> None:
    job = parse_job(JOB_TEXT + f"sparsify: {{method: {method}}}\n", "job.yaml")
    told = device(up_bits_s=up, down_bits_s=1e7, day_quota_bytes=quota)
    for round_s in (None, 3600.0):
        assert share(job, LARGE, told, round_s=round_s) == density(job, LARGE, told, round_s=round_s)[0]


def test_a_training_may_take_what_the_page_says_and_a_longer_one_is_refused_with_both_times() -> None:
    """84 s of a deadline of 120 s are 70 %: within the 80 % that docs/operations.md promises."""
    job = parse_job(JOB_TEXT.replace("deadline_s: 60", "deadline_s: 120"), "job.yaml")
    passes = 3 * job.training.epochs * 100
    per_gflops = passes * 2 * LARGE.macs / (1e9 * EFFICIENCY)
    for seconds, given in ((84, True), (95, True), (100, False)):
        found = assign(job, [LARGE], device(samples=100, gflops=per_gflops / seconds, cpu_share=1.0))
        assert (found.structure != "") is given
        if not given:
            told = "training takes about 100 s, more than 80% of the 2 min 00 s deadline"
            assert told in found.why
            assert "longer rounds.deadline_s" in found.why
