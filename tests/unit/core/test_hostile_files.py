"""Files from a hostile coordinator are refused before they cost much: fifty by hand."""

import tracemalloc

import numpy as np
import pytest
from benchmarks.hostile_files import a_structure, by_hand, head, message, with_tables

from liberatai_core.compressor import artifact
from liberatai_core.errors import BombError, LiberataiError

CASES = list(by_hand())


@pytest.mark.parametrize(("name", "file", "structure"), CASES, ids=[name for name, _, _ in CASES])
def test_a_hostile_file_is_refused_and_takes_little_beside_the_weights(name, file, structure) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(LiberataiError):
            artifact.restore(file, structure)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= 1.5 * 4 * structure.parameters + (8 << 20)


def test_there_are_fifty_or_so() -> None:
    assert len(CASES) >= 45


def test_more_tables_than_any_encoder_writes_are_refused_at_once() -> None:
    structure = a_structure(*[(16, 16, 8)] * 512)
    file = head(structure) + with_tables((16, 16, 8), (3, 3, 3)) * 512 + message(2048, 1) * 512
    with pytest.raises(BombError, match="22 tables"):
        artifact.restore(file, structure)


def test_messages_that_would_take_long_are_refused_before_the_first_is_decoded(monkeypatch) -> None:
    structure = a_structure(*[(16, 16, 8)] * 512)
    file = head(structure) + with_tables((16, 16, 8), (2, 2, 2)) * 512 + message(4 * 2048, 2) * 128
    monkeypatch.setattr("liberatai_core.rans.decode", lambda *_: pytest.fail("decoded"))
    with pytest.raises(BombError, match="rows of lanes"):
        artifact.restore(file, structure)


@pytest.mark.parametrize("tables", [1, 3, 40])
def test_searching_and_looking_up_give_the_same_symbols(tables: int, monkeypatch) -> None:
    from liberatai_core import rans

    random = np.random.default_rng(tables)
    frequencies = [rans.normalise(random.integers(1, 1 << 20, 50)) for _ in range(tables)]
    each = random.integers(0, tables, 5000).astype(np.uint8) if tables > 1 else None
    coded = rans.Coded(frequencies, [5000], [0], each)
    symbols = random.integers(0, 50, 5000).astype(np.uint16)
    data = rans.encode(symbols, coded, 7, b"raw")
    found = []
    for shift in (0, 30):
        monkeypatch.setattr(rans, "_WORTH_FILLING", shift)
        found.append(rans.decode(data, coded, 7))
    assert np.array_equal(found[0][0], symbols)
    assert np.array_equal(found[1][0], symbols)
    assert found[0][1] == found[1][1]
