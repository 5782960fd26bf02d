"""A data file is read, or refused with one clear line."""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from liberatai_core.errors import BusyError, DataError, MemoryLimitError
from liberatai_core.learning import dataset
from liberatai_core.learning.dataset import contract_of, load_labelled, load_npz, load_unlabeled
from liberatai_core.structure import DataContract

DIGITS = DataContract(input_shape=(1, 8, 8), classes=10)
IMAGES = np.arange(4 * 64, dtype=np.uint8).reshape(4, 8, 8)
LABELS = np.array([0, 1, 2, 9], dtype=np.uint8)


def saved(tmp_path: Path, **arrays: Any) -> Any:
    np.savez_compressed(tmp_path / "d.npz", **arrays)
    return tmp_path / "d.npz"


@pytest.mark.parametrize("data", [None, DIGITS])
def test_images_are_scaled_and_get_a_channel_axis(tmp_path: Path, data: Any) -> None:
    samples = load_npz(saved(tmp_path, x=IMAGES, y=LABELS), data)
    assert samples.x.dtype == np.float32
    assert samples.x.shape == (4, 1, 8, 8)
    assert np.array_equal(samples.x[:, 0], IMAGES.astype(np.float32) / 255)
    assert samples.y is not None
    assert samples.y.dtype == np.int64
    assert samples.y.tolist() == [0, 1, 2, 9]
    assert len(samples) == 4
    assert not samples.one_class
    assert samples.device is None
    assert samples.test is None


def test_other_numbers_are_taken_as_they_are(tmp_path: Path) -> None:
    x = np.array([[0.5, 1e-3], [7, -2]], dtype=np.float16)
    samples = load_npz(saved(tmp_path, x=x, y=np.array([0, 1])))
    assert np.array_equal(samples.x, x.astype(np.float32))


def test_owners_test_marks_and_names_are_read(tmp_path: Path) -> None:
    path = saved(
        tmp_path,
        x=IMAGES,
        y=LABELS,
        device=np.array([3, -1, 3, 0]),
        test=np.array([0, 0, 1, 1]),
        classes=list("abcdefghij"),
    )
    samples = load_npz(path, DIGITS)
    assert samples.device is not None
    assert samples.test is not None
    assert samples.device.tolist() == [3, -1, 3, 0]
    assert samples.test.tolist() == [False, False, True, True]
    assert samples.classes == tuple("abcdefghij")


def test_train_and_test_parts_are_joined_and_marked(tmp_path: Path) -> None:
    path = saved(tmp_path, x_train=IMAGES[:3], y_train=LABELS[:3], x_test=IMAGES[3:], y_test=LABELS[3:])
    samples = load_npz(path, DIGITS)
    assert samples.y is not None
    assert samples.test is not None
    assert samples.y.tolist() == [0, 1, 2, 9]
    assert samples.test.tolist() == [False, False, False, True]
    assert load_unlabeled(path, DIGITS).shape == (3, 1, 8, 8)


def test_coded_images_are_decoded(tmp_path: Path) -> None:
    """Encode as the data set's page says: G off R and B, then differences down and to the right."""
    plain = np.random.default_rng(0).integers(0, 256, (2, 3, 5, 4)).astype(np.uint8)
    coded = plain.copy()
    coded[:, 0] -= plain[:, 1]
    coded[:, 2] -= plain[:, 1]
    coded[:, :, 1:] -= coded[:, :, :-1].copy()
    coded[:, :, :, 1:] -= coded[:, :, :, :-1].copy()
    samples = load_npz(saved(tmp_path, x_delta=coded, y=np.array([0, 1])))
    assert np.array_equal(samples.x, plain.astype(np.float32) / 255)


def test_spectra_are_restored_from_their_scale(tmp_path: Path) -> None:
    path = saved(
        tmp_path,
        logmel_u8=np.full((2, 3, 4), 10, np.uint8),
        scale=np.float32(0.5),
        offset=np.float32(-1),
        y=[0, 1],
    )
    samples = load_npz(path, DataContract(input_shape=(1, 3, 4), classes=2))
    assert samples.x.shape == (2, 1, 3, 4)
    assert np.unique(samples.x).tolist() == [4.0]


def test_channels_are_moved_to_the_front_when_the_job_wants_them_there(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(2, 5, 3)).astype(np.float32)
    samples = load_npz(saved(tmp_path, x=x, y=[0, 1]), DataContract(input_shape=(3, 5), classes=2))
    assert np.array_equal(samples.x, x.transpose(0, 2, 1))


def test_one_class_is_allowed_and_marked(tmp_path: Path) -> None:
    assert load_npz(saved(tmp_path, x=IMAGES, y=np.full(4, 3)), DIGITS).one_class


def test_labels_are_optional_and_never_looked_at_for_unlabeled_data(tmp_path: Path) -> None:
    path = saved(tmp_path, x=IMAGES)
    assert load_npz(path, DIGITS).y is None
    with pytest.raises(DataError, match="no labels"):
        load_labelled(path, DIGITS)
    path = saved(tmp_path, x=IMAGES, y=np.array([77]))
    assert load_unlabeled(path, DIGITS).shape == (4, 1, 8, 8)


def test_the_contract_is_read_off_the_samples(tmp_path: Path) -> None:
    assert contract_of(load_npz(saved(tmp_path, x=IMAGES, y=LABELS))) == DIGITS
    named = load_npz(saved(tmp_path, x=IMAGES, y=[0, 0, 1, 1], classes=["a", "b", "c"]))
    assert contract_of(named).classes == 3
    with pytest.raises(DataError):
        contract_of(load_npz(saved(tmp_path, x=IMAGES)))


FAULTS: dict[str, dict[str, Any]] = {
    "no inputs: keys are y": {"y": LABELS},
    "no samples": {"x": IMAGES[:0], "y": LABELS[:0]},
    "samples have shape": {"x": IMAGES[:, :7], "y": LABELS},
    r"sample 2 contains NaN": {
        "x": np.where(np.arange(4)[:, None, None] == 2, np.nan, 1.0 + IMAGES),
        "y": LABELS,
    },
    r"label 10 of sample 1": {"x": IMAGES, "y": [0, 10, 2, 3]},
    r"label -1 of sample 3": {"x": IMAGES, "y": [0, 1, 2, -1]},
    r"y has shape \(3,\), but there are 4 samples": {"x": IMAGES, "y": LABELS[:3]},
    "y must be whole numbers": {"x": IMAGES, "y": LABELS.astype(np.float32)},
    "test has shape": {"x": IMAGES, "y": LABELS, "test": [1]},
    r"inputs are uint8 \(\)": {"x": np.uint8(3), "y": LABELS},
    "inputs are <U1": {"x": np.array(list("abcd")), "y": LABELS},
    "no array of numbers": {"x": np.zeros(4, dtype=complex), "y": LABELS},
    "x_delta is float64": {"x_delta": np.zeros((4, 3, 2, 2)), "y": LABELS},
    "y_train has shape": {"x_train": IMAGES, "y_train": LABELS[:2]},
    "do not fit together": {"x_train": IMAGES, "y_train": LABELS, "x_test": IMAGES[:, :3], "y_test": LABELS},
}


@pytest.mark.parametrize("text", sorted(FAULTS))
def test_faults_are_named(tmp_path: Path, text: str) -> None:
    path = saved(tmp_path, **FAULTS[text])
    with pytest.raises(DataError, match=text) as caught:
        load_npz(path, DIGITS)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


OBJECTS = np.array([{"a": 1}, None, "text", 4], dtype=object)


@pytest.mark.parametrize("key", ["notes", "device", "classes", "mfcc", "x_delta", "scale"])
def test_a_key_that_nothing_needs_may_hold_whatever_it_likes(tmp_path: Path, key: str) -> None:
    samples = load_npz(saved(tmp_path, x=IMAGES, y=LABELS, **{key: OBJECTS}), DIGITS)
    assert samples.y is not None
    assert (len(samples), samples.device, samples.classes) == (4, None, ())
    assert len(load_npz(saved(tmp_path, x=IMAGES, y=LABELS, device=["a", "b", "c", "d"]), DIGITS)) == 4


@pytest.mark.parametrize("key", ["x", "y", "test"])
def test_a_key_that_is_needed_must_be_an_array(tmp_path: Path, key: str) -> None:
    path = saved(tmp_path, **({"x": IMAGES, "y": LABELS, "test": [0, 0, 0, 1]} | {key: OBJECTS}))
    with pytest.raises(DataError, match=f"{key} is no array of numbers"):
        load_npz(path, DIGITS)


def test_an_array_that_claims_more_than_the_archive_holds_is_refused_before_it_is_reserved(
    tmp_path: Path,
) -> None:
    path = saved(tmp_path, x=IMAGES, y=LABELS)
    with zipfile.ZipFile(path) as archive:
        parts = {entry: archive.read(entry) for entry in archive.namelist()}
    old, new = b"(4, 8, 8)", b"(9999999999999, 8, 8)"
    head = parts["x.npy"].replace(old, new).replace(b" " * (len(new) - len(old)) + b"\n", b"\n", 1)
    with zipfile.ZipFile(path, "w") as archive:
        for entry, content in (parts | {"x.npy": head}).items():
            archive.writestr(entry, content)
    with pytest.raises(DataError, match="does not fit into"):
        load_npz(path, DIGITS)


def test_a_file_for_which_memory_is_lacking_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(dataset, "_array", lacking)
    with pytest.raises(MemoryLimitError, match="not enough memory"):
        load_npz(saved(tmp_path, x=IMAGES, y=LABELS), DIGITS)


def test_a_file_that_is_replaced_while_it_is_read_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = saved(tmp_path, x=IMAGES, y=LABELS)
    (tmp_path / "next").mkdir()
    new = saved(tmp_path / "next", x=np.concatenate([IMAGES, IMAGES]), y=[*LABELS, *LABELS])
    whole, read = new.read_bytes(), dataset._array
    times: list[int] = []

    def replaced(*arguments: Any) -> Any:
        if not times:
            old.write_bytes(whole)
        times.append(1)
        return read(*arguments)

    monkeypatch.setattr(dataset, "_array", replaced)
    assert len(load_npz(old, DIGITS)) == 8


def test_a_file_that_is_still_being_written_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path, x=IMAGES, y=LABELS)
    whole = path.read_bytes()
    parts = iter([whole[: len(whole) // 2], whole])
    path.write_bytes(whole[:100])
    monkeypatch.setattr("time.sleep", lambda _: path.write_bytes(next(parts)))
    assert len(load_npz(path, DIGITS)) == 4


def test_a_file_that_changes_all_the_time_is_tried_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path, x=IMAGES, y=LABELS)
    numbers = iter(range(100))
    monkeypatch.setattr("time.sleep", lambda _: None)
    monkeypatch.setattr(dataset, "_state", lambda _: (next(numbers),))
    with pytest.raises(BusyError, match="all the time"):
        load_npz(path, DIGITS)


def test_a_file_without_a_row_to_train_on_is_a_fault_in_words(tmp_path: Path) -> None:
    path = saved(tmp_path, x=IMAGES, y=LABELS, test=[1, 1, 1, 1])
    with pytest.raises(DataError, match="all 4 samples are marked test"):
        dataset.require_training_rows(load_npz(path, DIGITS), str(path))
    path = saved(tmp_path, x=IMAGES, y=LABELS, test=[1, 1, 1, 0])
    dataset.require_training_rows(load_npz(path, DIGITS), str(path))


def test_files_that_are_no_npz_are_refused(tmp_path: Path) -> None:
    whole = saved(tmp_path, x=IMAGES, y=LABELS).read_bytes()
    np.save(tmp_path / "plain.npy", IMAGES)
    cases = {
        "text.npz": b"hello",
        "empty.npz": b"",
        "half.npz": whole[: len(whole) // 2],
        "flipped.npz": whole[:60] + bytes(b ^ 0x55 for b in whole[60:120]) + whole[120:],
        "plain.npz": (tmp_path / "plain.npy").read_bytes(),
    }
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError):
            load_npz(tmp_path / name, DIGITS)
    for missing in (tmp_path / "none.npz", tmp_path):
        with pytest.raises(DataError, match="no such file"):
            load_npz(missing, DIGITS)


def test_pickled_objects_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, x=np.array([{}, []], dtype=object), y=[0, 1])
    with pytest.raises(DataError):
        load_npz(path)


def test_an_archive_that_unpacks_to_too_much_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("liberatai_core.learning.dataset.MAX_BYTES", 1000)
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", bytes(100_000))
    with pytest.raises(DataError, match="at most 1000"):
        load_npz(tmp_path / "bomb.npz")
