import json
import multiprocessing
import shutil
import subprocess

import msgspec
import numpy as np
import pytest

from liberatai_coordinator.repository import care, signing, tensors, trust
from liberatai_coordinator.repository.commits import Commit
from liberatai_coordinator.repository.descriptors import (
    MANIFEST,
    SIGNATURE,
    Index,
    Manifest,
    decode,
    describe,
    encode,
)
from liberatai_coordinator.repository.names import parse_place, parse_ref
from liberatai_coordinator.repository.store import Store
from liberatai_core.errors import (
    DigestError,
    LiberataiError,
    NotFoundError,
    SchemaError,
    SignatureError,
    StateError,
)
from liberatai_core.structure import Structure, Tensor

SHAPE = Structure("tensors", {}, (Tensor("w", (40, 50)), Tensor("b", (50,))))


def weights(seed):
    return np.random.default_rng(seed).normal(size=SHAPE.parameters).astype(np.float32)


def commit(store, values, *parents, model="digits", message="", **more):
    variant = tensors.variant_of(SHAPE, values)
    before = parents[0].commit.variants[0] if parents else None
    draft = Commit(
        model=model,
        kind="import",
        parents=tuple(one.digest for one in parents),
        time=len(message),
        message=message,
        variants=(variant,),
    )
    return store.write(draft, {variant.name: tensors.layers_for(store, SHAPE, values, before)}, **more)


def read(store, loaded):
    return tensors.read(store, loaded.commit.variants[0])


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "models")


def test_what_was_committed_is_read_bit_for_bit_and_named(store):
    values = weights(1)
    first = commit(store, values, message="one")
    assert np.array_equal(read(store, first), values)
    assert store.find("digits") == store.find(first.digest[7:15]) == store.find(f"digits@{first.digest[7:]}")
    assert commit(store, values, message="one").digest == first.digest
    assert care.verify(store, first.digest) == []
    for text in ("other", "digits:v9", "digits~1", "digits:7", "beef", "0" * 64):
        with pytest.raises(NotFoundError):
            store.find(text)
    with pytest.raises(SchemaError):
        store.find("Digits")


def test_a_commit_that_changed_little_is_stored_as_a_difference_and_stands_alone(store):
    values = weights(1)
    first = commit(store, values)
    for number in range(20):
        values = values.copy()
        values[number * 7 : number * 7 + 20] += np.float32(0.25)
        later = commit(store, values, first, message="x" * number)
        assert np.array_equal(read(store, later), values)
        first = later
    files = [
        store.layers(store.read(entry.digest).commit.variants[0])[-1] for entry in store.log([first.digest])
    ]
    assert sum(one.size < values.nbytes / 10 for one in files) == 19  # whole: the first one and one later
    assert len(store.layers(first.commit.variants[0])) <= tensors.MAX_DIFFERENCES + 1
    assert next(store.log([first.digest])).digest == first.digest
    assert len(list(store.log([first.digest]))) == 21


def test_a_flipped_bit_in_any_file_is_found_and_named(store):
    first = commit(store, weights(1))
    changed = weights(1)
    changed[3] += 1
    last = commit(store, changed, first)
    care.gc(store)
    for digest in store.layout.blobs():
        path = store.layout.path(digest)
        content = path.read_bytes()
        for place in {0, len(content) // 2, len(content) - 1}:
            damaged = bytearray(content)
            damaged[place] ^= 4
            path.write_bytes(damaged)
            faults = care.verify(store, last.digest)
            if faults == []:  # only what lies under the signatures' tag may be without a part in the commit
                assert digest in {one.digest for one in store.layout.refs().values()}
                with pytest.raises(DigestError):
                    store.layout.get(digest)
            else:
                assert any(path.name in str(fault) for fault in faults), [str(one) for one in faults]
        path.write_bytes(content)
    assert care.verify(store, last.digest) == []


def test_unsigned_wrongly_signed_and_exchanged_content_is_refused(store, tmp_path):
    first, second = commit(store, weights(1)), commit(store, weights(2), message="b", force=True)
    shutil.rmtree(store.folder / "referrers")
    with pytest.raises(SignatureError, match="unsigned"):
        store.read(first.digest)
    other = Store(tmp_path / "other")
    theirs = commit(other, weights(3))
    for one in other.layout.blobs():
        store.layout.put([other.layout.get(one)])
    store.referrers.add(theirs.digest, other.referrers.of(theirs.digest).manifests)
    with pytest.raises(SignatureError, match="models trust"):
        store.read(theirs.digest)
    key = signing.public_key(trust.own_key(other.folder))
    trust.trust(store.folder, "them", key, ("elsewhere",))
    with pytest.raises(SignatureError, match="not trusted with the model"):
        store.read(theirs.digest)
    trust.trust(store.folder, "them", key, ("dig*",))
    assert store.read(theirs.digest).signer.name == "them"

    envelope = signing.sign(trust.own_key(other.folder), theirs.digest, "digits")
    swapped, parts = signing.signature_manifest(envelope, first.descriptor)
    store.layout.put([swapped, *parts])
    note = msgspec.structs.replace(describe(swapped, MANIFEST), artifact_type=SIGNATURE)
    store.referrers.add(second.digest, [note])
    with pytest.raises(SignatureError):
        store.read(second.digest)
    trust.distrust(store.folder, key)
    with pytest.raises(SignatureError):
        store.read(theirs.digest)


def test_an_index_with_another_variant_is_no_commit(store):
    first = commit(store, weights(1))
    second = commit(store, weights(2), message="b", force=True)
    index = decode(store.layout.json(first.digest), Index, "index")
    other = decode(store.layout.json(second.digest), Index, "index")
    mixed = encode(msgspec.structs.replace(index, manifests=(index.manifests[0], other.manifests[1])))
    (digest,) = store.layout.put([mixed])
    store.referrers.add(digest, store.referrers.of(first.digest).manifests)
    with pytest.raises(SchemaError, match="exchanged"):
        store.read(digest)


def test_branches_go_forward_and_tags_stay(store):
    first = commit(store, weights(1))
    second = commit(store, weights(2), first, message="b")
    store.set_ref("digits", "v1", first.digest, kind="tag")
    store.set_ref("digits", "v1", first.digest, kind="tag")
    with pytest.raises(StateError, match="tags stay"):
        store.set_ref("digits", "v1", second.digest, kind="tag")
    with pytest.raises(StateError, match="merge"):
        store.set_ref("digits", "latest", first.digest, kind="branch")
    with pytest.raises(StateError, match="faster"):
        store.set_ref("digits", "v2", second.digest, kind="tag", expected=first.digest)
    with pytest.raises(SchemaError):
        store.set_ref("digits", "7", second.digest, kind="tag")
    with pytest.raises(SchemaError):
        store.set_ref("other", "v1", second.digest, kind="tag")
    store.set_ref("digits", "v1", second.digest, kind="tag", force=True)
    assert [(one.tag, one.kind) for one in store.names("digits")] == [("latest", "branch"), ("v1", "tag")]
    store.remove_ref("digits", "v1")
    with pytest.raises(NotFoundError):
        store.remove_ref("digits", "v1")


def test_collecting_keeps_what_has_a_name_and_what_the_rule_keeps(store):
    made = [commit(store, weights(0), message="0")]
    for number in range(1, 8):
        made.append(commit(store, weights(number), made[-1], message="x" * number))
    store.set_ref("digits", "v2", made[2].digest, kind="tag")
    going, freed = care.gc(store)
    assert going == []
    assert freed == pytest.approx(0, abs=4096 * 8)
    told, would = care.gc(store, lambda _entry, age: age < 3, dry_run=True)
    gone, freed = care.gc(store, lambda _entry, age: age < 3)
    assert told == gone == [made[number].digest for number in (4, 3, 1, 0)]
    assert freed == would > 3 * weights(0).nbytes
    for number in (2, 5, 6, 7):
        assert np.array_equal(read(store, made[number]), weights(number))
    with pytest.raises(NotFoundError):
        read(store, made[3])
    assert len(list(store.log([made[-1].digest]))) == 8
    assert care.verify(store, made[-1].digest) == []


def test_a_lost_or_damaged_history_file_costs_time_only(store):
    made = [commit(store, weights(0))]
    for number in range(1, 5):
        made.append(commit(store, weights(number), made[-1], message="x" * number))
    wanted = [one.digest for one in reversed(made)]
    path = store.folder / "history.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0][:-9] + b"\n", *lines[1:3], b"\x00\xff garbage\n"]))
    assert [entry.digest for entry in Store(store.folder).log([made[-1].digest])] == wanted
    path.unlink()
    assert [entry.digest for entry in Store(store.folder).log([made[-1].digest])] == wanted


def _tagger(folder, worker, count):
    store = Store(folder)
    digest = store.find("digits")
    for number in range(count):
        store.set_ref("digits", f"w{worker}-{number}", digest, kind="tag")


def test_processes_that_write_at_once_lose_no_tag(store):
    commit(store, weights(1))
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_tagger, args=(store.folder, worker, 10)) for worker in range(4)]
    for one in workers:
        one.start()
    for one in workers:
        one.join(60)
        assert one.exitcode == 0
    assert len(store.names("digits")) == 41
    assert care.verify(store, store.find("digits")) == []


def test_names_that_are_none_are_refused():
    for text in ("a" * 65, "A", "a//b", "../x", "a:b:c", "a:", "x@zz", "a~b", "", "a b", "a\n"):
        with pytest.raises(LiberataiError):
            parse_ref(text)
    assert parse_ref("lab/digits:12").number == 12
    assert (parse_ref("digits~3").back, parse_ref("digits:v1~2").tag) == (3, "v1")
    place = parse_place("registry.example.org:5000/lab/digits:v1")
    assert (place.host, place.name, place.tag) == ("registry.example.org:5000", "lab/digits", "v1")
    assert parse_place("localhost/a").tag == "latest"
    for text in ("digits", "a/B", "a/../b", "http://a/b", "a/b:", "a/b@sha256:12"):
        with pytest.raises(SchemaError):
            parse_place(text)


def test_the_card_and_the_bill_of_materials_are_what_others_expect(store):
    first = commit(store, weights(1), message="first | try")
    layers = decode(store.layout.json(first.manifests[0].digest), Manifest, "x").layers
    card, bom = (store.layout.get(layer.digest) for layer in layers)
    text = card.decode()
    assert text.startswith("---\n")
    front = msgspec.yaml.decode(text.split("---\n")[1])
    assert front["library_name"] == "liberatai"
    assert json.loads(bom)["metadata"]["component"]["type"] == "machine-learning-model"


@pytest.mark.skipif(shutil.which("skopeo") is None, reason="skopeo is not installed")
def test_skopeo_copies_a_commit_with_its_digest(store, tmp_path):
    first = commit(store, weights(1))
    target = tmp_path / "copy"
    subprocess.run(
        [
            "skopeo",
            "copy",
            "--all",
            "--preserve-digests",
            f"oci:{store.folder}:digits:latest",
            f"oci:{target}:x",
        ],
        check=True,
        capture_output=True,
    )
    (copied,) = json.loads((target / "index.json").read_bytes())["manifests"]
    assert copied["digest"] == first.digest
