"""What the check of an update has read is not read again, and changes nothing; memory for it is bounded."""

from typing import Any

import msgspec
import numpy as np
import pytest

from liberatai_coordinator.config import Aggregate, JobSpec, Rounds, Sparsify, StructureChoice
from liberatai_coordinator.models import aggregation
from liberatai_coordinator.models.aggregation import Late
from liberatai_coordinator.models.members import Member, Public, trained_part, trained_structure
from liberatai_coordinator.models.updates import (
    Decoded,
    Kept,
    changes,
    check_update,
    check_updates,
    difference,
    packed,
)
from liberatai_core.aggregator.packed import Packed, unpack
from liberatai_core.contract.messages import Update, update_id, work_seed
from liberatai_core.errors import LiberataiError
from liberatai_core.learning.families import initial_weights, structure_of
from liberatai_core.sparsifier import codec, methods
from liberatai_core.sparsifier.top_k import init
from liberatai_core.structure import DataContract, Structure

DATA = DataContract(input_shape=(1, 8, 8), classes=3)
HIDDEN = (8, 40)
BASE = b"b" * 16


def job(method: Any = "topk", rule: Any = "mean", nested: Any = "off") -> JobSpec:
    return JobSpec(
        name="again",
        data=DATA,
        structures=tuple(StructureChoice(family="mlp", params={"hidden": hidden}) for hidden in HIDDEN),
        rounds=Rounds(mode="buffered"),
        sparsify=Sparsify(method=method, up_density=0.3),
        aggregate=Aggregate(rule=rule, hostile=0.2, ensemble="uniform", nested=nested),
    )


def structures() -> dict[str, Structure]:
    return {one.id: one for one in (structure_of("mlp", {"hidden": hidden}, DATA) for hidden in HIDDEN)}


def update(given: JobSpec, structure: Structure, number: int) -> Update:
    part = trained_part(given, structure).part
    noise = np.random.default_rng(number).normal(0, 0.01, part.parameters).astype(np.float32)
    device, method = f"d{number}", given.sparsify.method
    _, body = methods.METHODS[method].sparsify(
        init(part.parameters), noise, part, 0.3, seed=work_seed(given.seed, device, given.name, 1)
    )
    return Update(
        update_id=update_id(device, given.name, 1, BASE),
        device=device,
        job=given.name,
        round=1,
        epoch=1,
        structure=structure.id,
        base=BASE,
        samples=10,
        codec=method,
        body=body,
        class_counts=(4, 3, 3),
    )


def members(given: JobSpec) -> dict[str, Member]:
    return {
        sid: aggregation.first(given, structure, initial_weights(structure, DATA, 0))
        for sid, structure in structures().items()
    }


def updates(given: JobSpec) -> list[Update]:
    both = list(structures().values())
    return [update(given, both[number % 2], number) for number in range(10)]


def read(given: JobSpec, some: list[Update]) -> dict[bytes, Decoded]:
    return {one.update_id: check_update(one, structures()[one.structure], given) for one in some}


JOBS = [
    *(job(method) for method in methods.METHODS),
    *(job(rule=rule) for rule in ("median", "screened_mean")),
    job(nested="width"),
]


@pytest.mark.parametrize("given", JOBS)
def test_what_was_decoded_gives_the_same_bytes_and_is_not_decoded_again(
    given: JobSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = updates(given)
    late = Late(staleness={one.update_id: number % 3 for number, one in enumerate(some)})
    fresh = aggregation.advance(given, 1, members(given), some, Public(), late)
    decoded = read(given, some)

    def refuse(*_: object) -> None:
        raise AssertionError("decoded again")

    monkeypatch.setattr(methods, "entries", refuse)
    again = aggregation.advance(given, 1, members(given), some, Public(), late, decoded)
    for sid, member in fresh.members.items():
        assert again.members[sid].master.tobytes() == member.master.tobytes()
        assert again.members[sid].view.tobytes() == member.view.tobytes()
    assert again.contributions == fresh.contributions
    assert again.deltas == fresh.deltas
    assert again.frozen == fresh.frozen


def test_what_was_read_from_other_bytes_is_not_believed() -> None:
    """A device may send two updates under one id: the one that was stored counts."""
    given = job()
    some = updates(given)
    other = update(given, structures()[some[0].structure], 77)
    false = msgspec.structs.replace(some[0], body=other.body)
    decoded = read(given, some) | read(given, [false])
    plain = aggregation.advance(given, 1, members(given), some, Public())
    again = aggregation.advance(given, 1, members(given), some, Public(), decoded=decoded)
    for sid, member in plain.members.items():
        assert again.members[sid].master.tobytes() == member.master.tobytes()
    elsewhere = msgspec.structs.replace(some[0], structure="mlp-hidden41")
    part = trained_part(given, structures()[some[0].structure]).part
    assert decoded[some[1].update_id].content != decoded[some[2].update_id].content
    assert not read(given, some)[some[0].update_id].tells(elsewhere, part)


@pytest.mark.parametrize("method", methods.METHODS)
def test_a_decoded_update_is_the_difference_without_its_zeros(method: str) -> None:
    given = job(method)
    one = updates(given)[1]
    structure = structures()[one.structure]
    part = trained_part(given, structure).part
    positions, values = changes(given, one, part)
    dense = np.zeros(part.parameters, np.float32)
    dense[positions] = values
    decoded = check_update(one, structure, given)
    np.testing.assert_array_equal(unpack(decoded.packed), dense)
    np.testing.assert_array_equal(unpack(packed(given, one, part)), dense)
    assert packed(given, one, part, decoded) is decoded.packed
    sent = int(np.count_nonzero(dense))
    assert decoded.nbytes <= 8 * max(sent, 1)


def test_decoded_updates_are_kept_in_bounded_memory() -> None:
    def one(values: int) -> Decoded:
        return Decoded(b"", Packed(100, np.arange(values, dtype=np.int32), np.ones(values, np.float32)))

    kept = Kept(limit=100)
    assert kept.keep(b"a", one(5))
    assert kept.keep(b"b", one(5))
    assert not kept.keep(b"c", one(3))
    assert kept.keep(b"d", one(2))
    assert (list(kept), kept.nbytes) == ([b"a", b"b", b"d"], 96)
    assert kept.keep(b"a", one(1))
    assert not kept.keep(b"b", one(12))
    assert b"b" not in kept
    assert kept.nbytes == 24
    kept.drop(b"a")
    kept.drop(b"never there")
    assert (list(kept), kept.nbytes) == ([b"d"], 16)
    kept.clear()
    assert (len(kept), kept.nbytes) == (0, 0)


def test_updates_are_checked_together_as_one_by_one() -> None:
    """Of several jobs and structures, with every kind of refusal between them."""
    jobs = [job(), job("dense"), job("random_k"), job("topk_small_dense")]
    asked = [(one, structures()[one.structure], given) for given in jobs for one in updates(given)[:4]]
    change = msgspec.structs.replace
    one, structure, given = asked[0]
    huge = np.full(trained_part(jobs[1], structure).part.parameters, 2e3, np.float32)
    asked += [
        (change(one, codec="dense"), structure, given),
        (change(one, body=b""), structure, given),
        (change(one, body=one.body[:-1]), structure, given),
        (change(one, body=b"\x04" + one.body[1:]), structure, given),
        (change(one, class_counts=(1, 2)), structure, given),
        (change(one, class_counts=(9, 9, 9)), structure, given),
        (change(one, evaluation=(3, 2)), structure, given),
        (change(asked[4][0], body=codec.encode_dense(huge)), structure, jobs[1]),
        (change(asked[8][0], device="other"), structure, jobs[2]),
        (change(asked[12][0], body=asked[12][0].body[:9]), structure, jobs[3]),
    ]
    order = np.random.default_rng(0).permutation(len(asked))
    asked = [asked[place] for place in order]
    found = check_updates(asked)
    assert sum(isinstance(one, LiberataiError) for one in found) == 10
    for together, (sent, of, by) in zip(found, asked, strict=True):
        if isinstance(together, LiberataiError):
            with pytest.raises(type(together)) as alone:
                check_update(sent, of, by)
            assert str(alone.value) == str(together)
        else:
            assert together.content == check_update(sent, of, by).content
            np.testing.assert_array_equal(
                unpack(together.packed), difference(by, sent, trained_part(by, of).part)
            )


@pytest.mark.parametrize("given", [job(), job("dense")])
def test_the_trained_structure_is_that_of_the_drawn_part(given: JobSpec) -> None:
    big = structure_of("mlp", {"hidden": 400}, DATA)
    for structure in (*structures().values(), big):
        assert trained_structure(given, structure) == trained_part(given, structure).part
        assert trained_structure(given, structure) is trained_structure(given, structure)
