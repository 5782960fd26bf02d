"""The cheapest way to the newest weights, for every state that a device may be in."""

from hypothesis import given
from hypothesis import strategies as st

from liberatai_coordinator.rounds.catch_up import FILE_BYTES, MAX_FILES, Path, Way, choose, size_of
from liberatai_core.contract.messages import BlobRef, Step
from liberatai_core.contract.topics import blob_id


def a_step(version: int, size: int, what: str = "delta") -> Step:
    """Return a file that leads to a version: its weights have one name, whatever led there."""
    blob = BlobRef(blob=blob_id(f"{what} {version} {size}".encode()), size_bytes=size)
    return Step(version=version, blob=blob, digest=f"weights {version}".encode().ljust(16))


KEYFRAME = a_step(0, 1000, "keyframe")
NEWEST = (KEYFRAME, a_step(9, 500, "merged"))


def test_who_holds_nothing_gets_the_keyframe_and_what_leads_from_there() -> None:
    assert choose((), NEWEST) == Way(held=b"", steps=NEWEST, path=NEWEST)
    assert choose((), NEWEST, storage_bytes=10).path == NEWEST, "a newcomer has no other way"


def test_who_is_there_already_fetches_nothing() -> None:
    path = (KEYFRAME, a_step(4, 50), a_step(9, 60))
    way = choose(path, NEWEST, merged=[a_step(9, 1)], singles=[a_step(9, 1)])
    assert way == Way(held=NEWEST[-1].digest, steps=(), path=path)
    assert way.size_bytes == 0


def test_one_merged_delta_is_taken_where_it_is_cheaper_than_single_ones() -> None:
    path = (KEYFRAME, a_step(6, 50))
    singles = [a_step(7, 30), a_step(8, 30), a_step(9, 30)]
    merged = a_step(9, 80, "merged")
    assert choose(path, NEWEST, merged=[merged], singles=singles).steps == (merged,)
    # Two files more cost more than the bytes that they save.
    barely = a_step(9, 90 + 2 * FILE_BYTES - 1, "merged")
    assert choose(path, NEWEST, merged=[barely], singles=singles).steps == (barely,)
    dear = a_step(9, 90 + 2 * FILE_BYTES + 1, "merged")
    assert choose(path, NEWEST, merged=[dear], singles=singles).steps == tuple(singles)


def test_single_deltas_are_taken_where_no_merged_one_is_exact() -> None:
    path = (KEYFRAME, a_step(8, 50))
    way = choose(path, NEWEST, singles=[a_step(9, 30)])
    assert way == Way(held=path[-1].digest, steps=(a_step(9, 30),), path=(*path, a_step(9, 30)))


def test_a_path_that_outgrows_the_storage_is_shortened_to_its_keyframe() -> None:
    path = (KEYFRAME, a_step(6, 400))
    merged = a_step(9, 200, "merged")
    onward = choose(path, NEWEST, merged=[merged], storage_bytes=1600)
    assert onward.path == (*path, merged)
    shortened = choose(path, NEWEST, merged=[merged], storage_bytes=1599)
    assert shortened == Way(held=KEYFRAME.digest, steps=NEWEST[1:], path=NEWEST)
    assert shortened.size_bytes == 500, "the keyframe is there"


def test_a_path_of_many_files_is_shortened_even_with_unlimited_storage() -> None:
    path = (KEYFRAME, *(a_step(n, 1) for n in range(1, MAX_FILES)))
    newest = (KEYFRAME, a_step(MAX_FILES, 500, "merged"))
    assert choose(path, newest, merged=[a_step(MAX_FILES, 1)]).steps == newest[1:]
    assert choose(path[:-1], newest, merged=[a_step(MAX_FILES, 1)]).path[:-1] == path[:-1]


def test_a_merged_delta_of_several_files_is_one_way_with_the_cost_of_all() -> None:
    path = (KEYFRAME, a_step(6, 50))
    parts = [a_step(8, 20, "coarse"), a_step(9, 70, "fine")]
    way = choose(path, NEWEST, merged=parts, singles=[a_step(7, 200), a_step(8, 200), a_step(9, 200)])
    assert way == Way(held=path[-1].digest, steps=tuple(parts), path=(*path, *parts))


def test_a_chain_longer_than_paths_may_be_is_still_followed_from_its_keyframe() -> None:
    """Otherwise everybody would fetch everything in every round."""
    chain = (KEYFRAME, *(a_step(n, 9) for n in range(1, MAX_FILES + 5)))
    way = choose(chain[:-1], chain, singles=chain[-1:])
    assert (way.held, way.steps) == (chain[-2].digest, chain[-1:])


def test_after_a_new_keyframe_the_cheapest_of_all_ways_is_taken() -> None:
    path = (KEYFRAME, a_step(6, 50))
    renewed = (a_step(9, 900, "keyframe"),)
    assert choose(path, renewed) == Way(held=b"", steps=renewed, path=renewed)
    merged = a_step(9, 100, "merged")
    assert choose(path, renewed, merged=[merged]).steps == (merged,)


def test_a_keyframe_that_is_the_newest_version_needs_no_step() -> None:
    assert choose((KEYFRAME,), (KEYFRAME,)).steps == ()


sizes = st.integers(1, 5000)


@given(
    st.lists(sizes, max_size=5), sizes, sizes, st.lists(sizes, min_size=3, max_size=3), st.integers(0, 9000)
)
def test_every_way_leads_to_the_newest_weights_and_is_no_dearer_than_starting_afresh(
    held: list[int], merged: int, onward: int, single: list[int], storage: int
) -> None:
    path: Path = (KEYFRAME, *(a_step(n + 1, size) for n, size in enumerate(held))) if held else ()
    newest = (KEYFRAME, a_step(9, merged, "merged"))
    singles = [a_step(7 + n, size) for n, size in enumerate(single)]
    way = choose(path, newest, merged=[a_step(9, onward)], singles=singles, storage_bytes=storage)
    assert way.path[-1].digest == newest[-1].digest
    assert way.path[0] == KEYFRAME
    assert way.size_bytes <= size_of(newest)
    if storage:
        assert size_of(way.path) <= max(storage, size_of(newest))
    if way.held:
        names = [step.digest for step in path]
        assert way.path == (*path[: names.index(way.held) + 1], *way.steps)
    else:
        assert way.path == way.steps
