"""The training process: the same bytes every time, every fault with its code, killable at any moment."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from liberatai_agent.children.messages import Answer, Done, Failed, File, Work
from liberatai_agent.children.trainer import Trainer, TrainerDiedError
from liberatai_agent.children.trainer_child import Memory, base_weights, holdout, work
from liberatai_agent.events import Returned, TrainingResult
from liberatai_core.compressor.artifact import restore
from liberatai_core.compressor.codebook import compress
from liberatai_core.contract.messages import Training, weights_name, work_seed
from liberatai_core.errors import DataError, DigestError, MemoryLimitError, TaskLimitError
from liberatai_core.learning.families import initial_weights, structure_of
from liberatai_core.sparsifier import methods, random_k, top_k
from liberatai_core.structure import DataContract
from liberatai_core.weights import Vector, digest

DATA = DataContract(input_shape=(6,), classes=3)
Chain = tuple[list[File], list[Vector]]
STRUCTURE = structure_of("mlp", {"hidden": 8}, DATA)


@pytest.fixture
def chain(tmp_path: Path) -> Chain:
    """A keyframe and two deltas on disk, with the weights after each step."""
    artifact = compress(initial_weights(STRUCTURE, DATA, 1), STRUCTURE, 4096)
    weights = [restore(artifact, STRUCTURE)]
    files = [tmp_path / "keyframe"]
    files[0].write_bytes(artifact)
    random = np.random.default_rng(5)
    for number in (1, 2):
        difference = random.normal(0, 0.1, STRUCTURE.parameters).astype(np.float32)
        _, body = top_k.sparsify(top_k.init(STRUCTURE.parameters), difference, STRUCTURE, 0.3)
        files.append(tmp_path / f"delta{number}")
        files[-1].write_bytes(body)
        weights.append(weights[-1] + top_k.densify(body, STRUCTURE))
    steps = [File(path=str(f), digest=weights_name(digest(w))) for f, w in zip(files, weights, strict=True)]
    return steps, weights


@pytest.fixture
def data(tmp_path: Path) -> Path:
    random = np.random.default_rng(7)
    y = np.arange(100) % 3
    x = random.normal(0, 1, (100, 6)).astype(np.float32) + y[:, None]
    np.savez(tmp_path / "data.npz", x=x, y=y)
    return tmp_path / "data.npz"


def a_work(chain: Chain, data: Path, **changes: Any) -> Work:
    steps, _ = chain
    fields: dict[str, Any] = {
        "device": "dev",
        "job": "job",
        "round": 3,
        "structure": STRUCTURE,
        "data": DATA,
        "training": Training(epochs=2),
        "seed": 11,
        "density": 0.3,
        "path": tuple(steps),
        "data_path": str(data),
    }
    return Work(**(fields | changes))


def done(answer: Answer) -> TrainingResult:
    assert isinstance(answer, Done), answer
    return answer.result


def given_back(body: bytes, number: int = 2) -> Returned:
    return Returned(update_id=b"u" * 16, round=number, body=body)


def rest(result: TrainingResult) -> Vector:
    return top_k.state_from_bytes(result.residual, STRUCTURE.parameters).residual


def total(result: TrainingResult) -> Vector:
    """Return what is sent and what is left over."""
    return top_k.densify(result.body, STRUCTURE) + rest(result)


def failed(answer: Answer) -> Failed:
    assert isinstance(answer, Failed), answer
    return answer


def test_the_chain_leads_to_the_base_and_the_next_delta_needs_no_keyframe(chain: Chain, data: Path) -> None:
    steps, weights = chain
    memory = Memory()
    first = a_work(chain, data, path=tuple(steps[:2]))
    assert np.array_equal(base_weights(first, memory), weights[1])
    Path(steps[0].path).unlink()
    Path(steps[1].path).unlink()
    assert np.array_equal(base_weights(a_work(chain, data), memory), weights[2])


def test_files_that_lead_elsewhere_are_refused(chain: Chain, data: Path) -> None:
    steps, weights = chain
    answer = failed(work(a_work(([steps[0], steps[2]], []), data), Memory()))
    assert (answer.code, weights_name(digest(weights[2])).hex() in answer.text) == ("E_DIGEST", True)
    twice = failed(work(a_work(([steps[0], steps[1], steps[1]], []), data), Memory()))
    assert twice.code == "E_DIGEST"
    assert failed(work(a_work(([], []), data), Memory())).code == "E_DIGEST"


def test_weights_that_were_refused_are_not_the_start_of_the_next_round(chain: Chain, data: Path) -> None:
    steps, weights = chain
    memory = Memory()
    with pytest.raises(DigestError):
        base_weights(a_work(([steps[0], steps[2]], []), data), memory)
    assert np.array_equal(base_weights(a_work(chain, data), memory), weights[2])


@pytest.mark.parametrize("damaged", [0, 1, 2])
def test_a_file_that_is_missing_or_damaged_is_a_wrong_digest(chain: Chain, data: Path, damaged: int) -> None:
    """Whatever the decoder says: the bytes were right when they were stored, so they are fetched again."""
    path = Path(chain[0][damaged].path)
    with path.open("r+b") as file:
        file.truncate(20)
    assert failed(work(a_work(chain, data), Memory())).code == "E_DIGEST"
    path.unlink()
    assert failed(work(a_work(chain, data), Memory())).code == "E_DIGEST"


def test_equal_work_gives_equal_bytes_and_other_devices_others(chain: Chain, data: Path) -> None:
    first = done(work(a_work(chain, data), Memory()))
    again = done(work(a_work(chain, data), Memory()))
    assert (first.body, first.residual, first.loss) == (again.body, again.residual, again.loss)
    other = done(work(a_work(chain, data, device="other"), Memory()))
    assert other.body != first.body


def test_what_is_sent_and_what_is_left_over_are_the_whole_difference(chain: Chain, data: Path) -> None:
    whole = done(work(a_work(chain, data, density=1.0), Memory()))
    part = done(work(a_work(chain, data, density=0.1), Memory()))
    state = top_k.state_from_bytes(part.residual, STRUCTURE.parameters)
    total = top_k.densify(part.body, STRUCTURE) + state.residual
    full = (
        top_k.densify(whole.body, STRUCTURE)
        + top_k.state_from_bytes(whole.residual, STRUCTURE.parameters).residual
    )
    assert np.array_equal(total, full)


def test_a_refused_update_is_added_to_the_next_difference(chain: Chain, data: Path) -> None:
    plain = done(work(a_work(chain, data, density=1.0), Memory()))
    refused = done(work(a_work(chain, data, round=2), Memory()))
    both = done(work(a_work(chain, data, density=1.0, returned=(given_back(refused.body),)), Memory()))
    np.testing.assert_allclose(
        total(both), total(plain) + top_k.densify(refused.body, STRUCTURE), rtol=0, atol=1e-6
    )
    assert (both.returned, both.dropped) == ((b"u" * 16,), None)


def test_a_refused_update_of_drawn_coordinates_comes_back_where_its_own_round_drew_them(
    chain: Chain, data: Path
) -> None:
    """Nothing is lost: what was refused, what is sent and what is left over are the two differences."""
    method = {"codec": "random_k_feedback", "density": 0.2}
    first = done(work(a_work(chain, data, round=2, **method), Memory()))
    plain = done(work(a_work(chain, data, round=3, residual=first.residual, **method), Memory()))
    back = {"residual": first.residual, "returned": (given_back(first.body),)}
    both = done(work(a_work(chain, data, round=3, **method, **back), Memory()))

    def drawn(result: TrainingResult, number: int) -> Vector:
        return random_k.densify(result.body, STRUCTURE, work_seed(11, "dev", "job", number))

    def all_of(result: TrainingResult) -> Vector:
        return drawn(result, 3) + rest(result)

    assert np.abs(drawn(first, 2)).max() > 0
    np.testing.assert_allclose(all_of(both), all_of(plain) + drawn(first, 2), rtol=0, atol=1e-6)
    assert (both.returned, both.dropped) == ((b"u" * 16,), None)


# --- left-overs that do not fit ------------------------------------------------------------------


def poisoned(chain: Chain, data: Path) -> bytes:
    """Return a sound residual of the largest values that there are."""
    del chain, data
    largest = np.full(STRUCTURE.parameters, np.finfo(np.float32).max, np.float32)
    return top_k.state_to_bytes(top_k.State(largest))


def of_another_size(chain: Chain, data: Path) -> bytes:
    del chain, data
    return top_k.state_to_bytes(top_k.init(STRUCTURE.parameters + 1))


def rotten(chain: Chain, data: Path) -> bytes:
    sound = done(work(a_work(chain, data, round=2), Memory())).residual
    return sound[:40] + bytes([sound[40] ^ 1]) + sound[41:]


def not_finite(chain: Chain, data: Path) -> bytes:
    del chain, data
    return top_k.state_to_bytes(top_k.State(np.full(STRUCTURE.parameters, np.nan, np.float32)))


@pytest.mark.parametrize(
    ("residual", "code"),
    [(of_another_size, "E_CODEC"), (rotten, "E_CODEC"), (not_finite, "E_NONFINITE")],
)
def test_a_residual_that_cannot_be_read_is_as_none_and_the_result_says_so(
    chain: Chain, data: Path, residual: Callable[[Chain, Path], bytes], code: str
) -> None:
    result = done(work(a_work(chain, data, residual=residual(chain, data)), Memory()))
    fresh = done(work(a_work(chain, data), Memory()))
    assert (result.body, result.residual) == (fresh.body, fresh.residual)
    assert result.dropped is not None
    assert result.dropped[0] == code
    assert fresh.dropped is None


def test_left_overs_that_overflow_with_the_difference_are_let_go(chain: Chain, data: Path) -> None:
    """The largest float32 in the residual and once more given back: their sum is infinite."""
    top = np.full(STRUCTURE.parameters, np.finfo(np.float32).max, np.float32)
    _, huge = methods.METHODS["dense"].sparsify(top_k.init(STRUCTURE.parameters), top, STRUCTURE, 1.0)
    left = {"residual": poisoned(chain, data), "returned": (given_back(huge),)}
    result = done(work(a_work(chain, data, **left), Memory()))
    fresh = done(work(a_work(chain, data), Memory()))
    assert (result.body, result.residual) == (fresh.body, fresh.residual)
    assert result.returned == (b"u" * 16,), "it must not come back"
    assert result.dropped is not None
    assert result.dropped[0] == "E_NONFINITE"


@pytest.mark.parametrize("damage", ["another size", "cut", "empty", "another round"])
def test_a_returned_body_that_cannot_be_read_is_left_out_and_the_others_count(
    chain: Chain, data: Path, damage: str
) -> None:
    codec = "random_k_feedback" if damage == "another round" else "topk"
    good = done(work(a_work(chain, data, round=2, codec=codec), Memory())).body
    other = structure_of("mlp", {"hidden": 9}, DATA)
    values = np.ones(other.parameters, np.float32)
    _, foreign = top_k.sparsify(top_k.init(other.parameters), values, other, 0.5)
    bad = {"another size": foreign, "cut": good[:-3], "empty": b"", "another round": good}[damage]
    number = 1 if damage == "another round" else 2
    both = (given_back(good), Returned(update_id=b"w" * 16, round=number, body=bad))
    result = done(work(a_work(chain, data, codec=codec, returned=both), Memory()))
    only = done(work(a_work(chain, data, codec=codec, returned=both[:1]), Memory()))
    assert (result.body, result.residual) == (only.body, only.residual)
    assert result.returned == (b"u" * 16, b"w" * 16), "it must not come back"
    assert result.dropped is not None
    assert result.dropped[0] == "E_CODEC"


def test_the_residual_of_the_last_round_goes_into_this_one(chain: Chain, data: Path) -> None:
    first = done(work(a_work(chain, data, density=0.01), Memory()))
    fresh = done(work(a_work(chain, data, round=4, density=0.01), Memory()))
    carried = done(work(a_work(chain, data, round=4, density=0.01, residual=first.residual), Memory()))
    assert carried.residual != fresh.residual


def test_a_residual_of_rounds_ago_is_worth_less_and_nothing_beyond_the_limit(
    chain: Chain, data: Path
) -> None:
    first = done(work(a_work(chain, data, density=0.01), Memory()))

    def left(**changes: Any) -> Vector:
        result = done(work(a_work(chain, data, round=9, density=0.01, **changes), Memory()))
        rest = top_k.state_from_bytes(result.residual, STRUCTURE.parameters).residual
        return top_k.densify(result.body, STRUCTURE) + rest

    old = top_k.state_from_bytes(first.residual, STRUCTURE.parameters).residual
    own = left()
    away = {"residual": first.residual, "rounds_away": 2, "residual_decay": 0.5}
    np.testing.assert_allclose(left(**away), own + old / 4, rtol=0, atol=1e-6)
    np.testing.assert_allclose(left(residual=first.residual, rounds_away=2), own + old, rtol=0, atol=1e-6)
    assert np.array_equal(left(**away, residual_limit=1), own)


@pytest.mark.parametrize("codec", [name for name in methods.METHODS if name != "topk"])
def test_every_method_gives_updates_of_its_own_streams(chain: Chain, data: Path, codec: str) -> None:
    result = done(work(a_work(chain, data, codec=codec), Memory()))
    methods.require_stream(codec, result.body)
    seed = work_seed(11, "dev", "job", 3)
    sent = methods.densify(result.body, STRUCTURE, seed)
    assert np.abs(sent).max() > 0
    back = (given_back(result.body, 3),)
    again = done(work(a_work(chain, data, round=4, codec=codec, returned=back), Memory()))
    assert (again.returned, again.dropped) == ((b"u" * 16,), None)


def test_an_unknown_method_is_refused_with_a_code(chain: Chain, data: Path) -> None:
    assert failed(work(a_work(chain, data, codec="gzip"), Memory())).code == "E_CODEC"


def test_the_holdout_is_the_same_in_every_round_and_never_trained_on(chain: Chain, data: Path) -> None:
    result = done(work(a_work(chain, data, share_class_counts=True), Memory()))
    assert result.evaluation is not None
    assert result.class_counts is not None
    assert result.evaluation[1] == 15
    assert result.samples == sum(result.class_counts) == 85
    held = [holdout(a_work(chain, data, round=n, seed=n), 100, None) for n in (1, 2)]
    assert np.array_equal(held[0], held[1])
    assert not np.array_equal(held[0], holdout(a_work(chain, data, device="other"), 100, None))


def test_few_samples_are_all_trained_on_and_counts_are_not_told_unasked(chain: Chain, tmp_path: Path) -> None:
    path = tmp_path / "few.npz"
    np.savez(path, x=np.ones((39, 6), np.float32), y=np.arange(39) % 3)
    result = done(work(a_work(chain, path), Memory()))
    assert (result.samples, result.evaluation, result.class_counts) == (39, None, None)


def test_rows_marked_as_test_are_the_holdout(chain: Chain, tmp_path: Path) -> None:
    path = tmp_path / "marked.npz"
    np.savez(path, x=np.ones((10, 6), np.float32), y=np.arange(10) % 3, test=[0] * 7 + [1] * 3)
    result = done(work(a_work(chain, path), Memory()))
    assert result.evaluation is not None
    assert (result.samples, result.evaluation[1]) == (7, 3)


@pytest.mark.parametrize(
    ("arrays", "complaint"),
    [
        (None, "No such file"),
        ({"x": np.zeros((0, 6)), "y": np.zeros(0, int)}, "no samples"),
        ({"x": np.zeros((5, 7)), "y": np.zeros(5, int)}, "shape"),
        ({"x": np.full((5, 6), np.inf), "y": np.zeros(5, int)}, "NaN or infinity"),
        ({"x": np.zeros((5, 6)), "y": np.full(5, 3)}, "label 3"),
        ({"x": np.zeros((5, 6))}, "no labels"),
        ({"x": np.zeros((5, 6)), "y": np.zeros(5, int), "test": np.ones(5, int)}, "marked test"),
    ],
    ids=["missing", "empty", "shape", "nan", "label", "unlabelled", "test"],
)
def test_faulty_data_fail_the_task_with_e_data(
    chain: Chain, tmp_path: Path, arrays: dict[str, Any] | None, complaint: str
) -> None:
    path = tmp_path / "faulty.npz"
    if arrays is not None:
        np.savez(path, **arrays)
    answer = failed(work(a_work(chain, path), Memory()))
    assert answer.code == "E_DATA"
    assert complaint in answer.text


def test_new_data_are_read_again(chain: Chain, data: Path) -> None:
    memory = Memory()
    first = done(work(a_work(chain, data), memory))
    np.savez(data, x=np.ones((50, 6), np.float32), y=np.arange(50) % 3)
    os.utime(data, ns=(1, 1))
    assert done(work(a_work(chain, data), memory)).samples != first.samples


def test_a_training_that_diverges_fails_with_e_train(chain: Chain, data: Path) -> None:
    wild = Training(epochs=50, learning_rate=10.0, clip_norm=0.0, momentum=0.99)
    x = np.load(data)["x"]
    np.savez(data, x=x / np.abs(x).max() * np.float32(3e38), y=np.arange(100) % 3)
    assert failed(work(a_work(chain, data, training=wild), Memory())).code == "E_TRAIN"


# --- as a process ------------------------------------------------------------------------------


def test_the_process_answers_like_the_function_survives_faults_and_is_confined(
    chain: Chain, data: Path, tmp_path: Path
) -> None:
    async def scenario() -> tuple[TrainingResult, TrainingResult]:
        trainer = Trainer(60.0)
        try:
            await trainer.warm()
            pid = trainer.pid
            assert pid is not None
            with pytest.raises(DataError, match="No such file"):
                await trainer.train(a_work(chain, tmp_path / "absent.npz"))
            result = await trainer.train(a_work(chain, data))
            assert trainer.pid == pid
            process = psutil.Process(pid)
            assert os.getpgid(pid) == pid
            assert process.nice() == 19
            assert os.sched_getscheduler(pid) == os.SCHED_IDLE
            group = Path(f"/proc/{pid}/autogroup")
            assert not group.exists() or group.read_text().split()[-1] == "19"
            assert process.rlimit(psutil.RLIMIT_CORE)[0] == 0
            assert process.rlimit(psutil.RLIMIT_NOFILE)[0] == 256
            assert Path(f"/proc/{pid}/oom_score_adj").read_text().strip() == "600"
            assert process.environ()["OMP_NUM_THREADS"] == "1"
            # Killed in the middle: the next training is whole and gives the same bytes.
            long = asyncio.create_task(
                trainer.train(a_work(chain, data, training=Training(epochs=1000, batch_size=1)))
            )
            await asyncio.sleep(0.3)
            os.kill(pid, signal.SIGKILL)
            with pytest.raises(TrainerDiedError, match="signal 9"):
                await long
            return result, await trainer.train(a_work(chain, data))
        finally:
            await trainer.close()
            assert trainer.pid is None

    first, second = asyncio.run(scenario())
    direct = done(work(a_work(chain, data), Memory()))
    assert first.body == second.body == direct.body
    assert first.residual == direct.residual


def test_what_takes_more_memory_than_the_device_gives_says_so(chain: Chain, data: Path) -> None:
    """A batch of 200 000 samples through a wide layer: the limit of the process refuses it, the work names it."""
    wide = structure_of("mlp", {"hidden": 8192}, DATA)
    artifact = compress(initial_weights(wide, DATA, 1), wide, 100_000)
    path = data.with_name("wide")
    path.write_bytes(artifact)
    step = File(path=str(path), digest=weights_name(digest(restore(artifact, wide))))
    np.savez(data, x=np.zeros((200_000, 6), np.float32), y=np.arange(200_000) % 3)
    training = Training(epochs=1, batch_size=65_536)
    heavy = a_work(([step], []), data, structure=wide, training=training, memory_bytes=400 << 20)

    async def scenario() -> tuple[int, int]:
        trainer = Trainer(60.0)
        try:
            await trainer.warm()
            pid = trainer.pid
            assert pid is not None
            peak = asyncio.create_task(peak_rss(pid))
            with pytest.raises(MemoryLimitError, match="a batch of 65536"):
                await trainer.train(heavy)
            assert trainer.pid is None, "what it holds is given back"
            return await peak, (await trainer.train(a_work(chain, data))).samples
        finally:
            await trainer.close()

    most, samples = asyncio.run(scenario())
    assert most <= 1.2 * (400 << 20)
    assert samples == 170_000


async def peak_rss(pid: int) -> int:
    most = 0
    while True:
        try:
            most = max(most, psutil.Process(pid).memory_info().rss)
        except psutil.Error:
            return most
        await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(12, "Cannot allocate memory"),
        RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
        ),
        RuntimeError("std::bad_alloc"),
    ],
)
def test_every_way_to_run_out_of_memory_has_one_code(
    chain: Chain, data: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("liberatai_core.learning.training.train", fails)
    assert failed(work(a_work(chain, data), Memory())).code == "E_MEMORY"


def test_the_limit_of_the_process_refuses_what_no_estimate_foresaw(chain: Chain, data: Path) -> None:
    """The device gives less than what importing the libraries takes: the first large array is refused."""
    np.savez(data, x=np.zeros((2_000_000, 6), np.float32), y=np.arange(2_000_000) % 3)

    async def scenario() -> None:
        trainer = Trainer(60.0)
        try:
            await trainer.train(a_work(chain, data, memory_bytes=1 << 20, training=Training(batch_size=1)))
        finally:
            await trainer.close()

    with pytest.raises(MemoryLimitError, match="not enough memory"):
        asyncio.run(scenario())


def test_numpy_trains_without_torch_in_the_process(chain: Chain, data: Path) -> None:
    without_torch = """
import sys
sys.modules["torch"] = None
from liberatai_agent.children.trainer_child import main
sys.exit(main(sys.argv[1:]))
"""

    async def scenario() -> TrainingResult:
        trainer = Trainer(60.0, [sys.executable, "-c", without_torch])
        try:
            return await trainer.train(a_work(chain, data, runtime="numpy"))
        finally:
            await trainer.close()

    found = asyncio.run(scenario())
    assert found.loss is not None
    assert np.isfinite(total(found)).all()
    assert np.abs(total(found)).max() > 0
    here = done(work(a_work(chain, data, runtime="numpy"), Memory()))
    assert found.body == here.body
    assert found.body != done(work(a_work(chain, data), Memory())).body


def test_after_torch_ran_out_of_memory_a_process_without_it_takes_over(chain: Chain, data: Path) -> None:
    async def scenario() -> None:
        trainer = Trainer(60.0)
        try:
            await trainer.train(a_work(chain, data))
            first = trainer.pid
            await trainer.train(a_work(chain, data, runtime="numpy"))
            second = trainer.pid
            assert second != first
            assert "torch" not in Path(f"/proc/{second}/maps").read_text()
            await trainer.train(a_work(chain, data, runtime="numpy"))
            assert trainer.pid == second
        finally:
            await trainer.close()

    asyncio.run(scenario())


def test_a_training_that_takes_more_processor_time_than_its_deadline_says_so(
    chain: Chain, data: Path
) -> None:
    async def scenario() -> None:
        trainer = Trainer(60.0)
        try:
            await trainer.train(
                a_work(chain, data, training=Training(epochs=1000, batch_size=1), cpu_seconds=0.2)
            )
        finally:
            await trainer.close()

    with pytest.raises(TaskLimitError, match="processor time"):
        asyncio.run(scenario())


@pytest.mark.parametrize("counted", [True, False])
def test_a_kill_for_memory_says_so_and_other_kills_do_not(
    chain: Chain, data: Path, monkeypatch: pytest.MonkeyPatch, counted: bool
) -> None:
    kills = iter([4, 5 if counted else 4])
    monkeypatch.setattr("liberatai_agent.children.control_groups.out_of_memory_kills", lambda: next(kills))
    shot = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"

    async def scenario() -> None:
        trainer = Trainer(60.0, [sys.executable, "-c", shot])
        try:
            await trainer.train(a_work(chain, data))
        finally:
            await trainer.close()

    with pytest.raises(MemoryLimitError if counted else TrainerDiedError, match="signal 9"):
        asyncio.run(scenario())


def test_a_cancelled_training_leaves_no_process(chain: Chain, data: Path) -> None:
    async def scenario() -> int:
        trainer = Trainer(60.0, [sys.executable, "-c", "import sys, time; time.sleep(600)"])
        training = asyncio.create_task(trainer.train(a_work(chain, data)))
        while trainer.pid is None:
            await asyncio.sleep(0.01)
        pid = trainer.pid
        training.cancel()
        with pytest.raises(asyncio.CancelledError):
            await training
        return pid

    assert not psutil.pid_exists(asyncio.run(scenario()))


LOUD = """
import os, sys
sys.stdout.write("banner of a library\\n" * 1000)
sys.stdout.flush()
os.write(1, b"from C")
from liberatai_agent.children.trainer_child import main
main(sys.argv[1:])
"""


def test_what_libraries_print_is_no_part_of_the_protocol(chain: Chain, data: Path) -> None:
    async def scenario() -> bytes:
        trainer = Trainer(60.0, [sys.executable, "-c", LOUD])
        try:
            return (await trainer.train(a_work(chain, data))).body
        finally:
            await trainer.close()

    assert asyncio.run(scenario())


PARENT = """
import asyncio, sys, time
from liberatai_agent.children.trainer import Trainer
async def main():
    trainer = Trainer(600.0)
    await trainer.warm()
    print(trainer.pid, flush=True)
    await asyncio.sleep(600)
asyncio.run(main())
"""


def test_the_process_dies_with_its_parent() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    parent.stdout.close()
    child.wait(timeout=10)
    assert not child.is_running()


def test_an_idle_process_ends_by_itself() -> None:
    async def scenario() -> bool:
        trainer = Trainer(0.2, [sys.executable, "-c", "import os, sys; os.read(int(sys.argv[2]), 1)"])
        await trainer.warm()
        process = psutil.Process(trainer.pid)
        until = time.monotonic() + 10
        while trainer.pid is not None and time.monotonic() < until:
            await asyncio.sleep(0.02)
        await trainer.close()
        return process.is_running()

    assert not asyncio.run(scenario())


@pytest.mark.parametrize(
    "program", ["pass", "import os, sys; os.write(int(sys.argv[2]), b'Hi'); os.close(int(sys.argv[2]))"]
)
def test_a_process_that_talks_nonsense_is_killed_and_reported(chain: Chain, data: Path, program: str) -> None:
    async def scenario() -> None:
        trainer = Trainer(60.0, [sys.executable, "-c", program])
        try:
            await asyncio.wait_for(trainer.train(a_work(chain, data)), 10)
        finally:
            await trainer.close()

    with pytest.raises(TrainerDiedError):
        asyncio.run(scenario())


def test_a_residual_travels_as_a_file_and_a_damaged_one_is_let_go(
    chain: Chain, data: Path, tmp_path: Path
) -> None:
    from msgspec.structs import replace

    from liberatai_agent.children import residual
    from liberatai_agent.events import ResidualFile

    work = a_work(chain, data, residual_to=str(tmp_path / "next"))
    result = TrainingResult(body=b"body", residual=b"rest" * 100, samples=3)
    written = residual.write(work, result)
    assert (written.residual, written.dropped) == (b"", None)
    assert written.residual_file is not None
    assert (tmp_path / "next").stat().st_mode & 0o777 == 0o600
    again = a_work(
        chain, data, residual_to=str(tmp_path / "other"), residual_from=written.residual_file, rounds_away=2
    )
    assert (residual.read(again).residual, residual.read(again).rounds_away) == (b"rest" * 100, 2)
    (tmp_path / "next").write_bytes(bytes(400))
    lost = residual.read(again)
    assert (lost.residual, lost.rounds_away) == (None, 0)
    assert residual.write(lost, result).dropped == residual.DAMAGED
    gone = replace(again, residual_from=ResidualFile(path="/nowhere", sha256=b""))
    assert residual.read(gone).residual is None
