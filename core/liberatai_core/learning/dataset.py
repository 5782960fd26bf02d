"""Read a file of the data contract: one npz with inputs and, for training, labels. Needs numpy only.

Keys (`classes` and the owner or test marks are optional):

    x | x_delta | logmel_u8 (with scale, offset) | mfcc     inputs, first axis: samples
    y, device (owner of each sample, -1 = nobody), test (0 or 1), classes (names)
    or x_train, y_train, x_test, y_test

8-bit images are scaled to 0 … 1 and get a channel axis. With a data contract the inputs are brought to its
shape where that changes no value (`structure.fitting`).
"""

import math
import time
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from liberatai_core.errors import BusyError, DataError, MemoryLimitError
from liberatai_core.structure import DataContract, fitting

MAX_BYTES = 8 << 30
"""Unpacked size of one file: a damaged or hostile archive must not fill the memory. Eight GiB is more than an
edge device can train on, and the whole of CIFAR-10 as float32 is 0.7."""

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Samples:
    """Samples of the data contract.

    Attributes:
        x: float32, shape (n, *input_shape), finite, n >= 1.
        y: labels 0 … classes-1, int64, shape (n,); None if the file has none.
        device: owner of each sample, int64, shape (n,), -1 for nobody; None if unknown.
        test: which samples are for testing, bool, shape (n,); None if the file does not say.
        classes: names of the labels; empty if the file has none.
        one_class: all labels are equal; training works, but what comes out knows one answer only.
    """

    x: NDArray[np.float32]
    y: NDArray[np.int64] | None = None
    device: NDArray[np.int64] | None = None
    test: NDArray[np.bool_] | None = None
    classes: tuple[str, ...] = ()
    one_class: bool = False

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.x)


def load_npz(path: Path | str, data: DataContract | None = None) -> Samples:
    """Return the samples of a file.

    Args:
        path: the npz file.
        data: the job's contract; None: whatever the file has, labels counted from the file.

    Raises:
        DataError: the file is missing, damaged, empty, or not of this form; one line says what is wrong.
    """
    arrays = _read(Path(path))
    where = str(path)
    y, test = None, None
    if "x_train" in arrays:
        pairs = [part for part in ("train", "test") if f"x_{part}" in arrays]
        inputs = _joined([arrays[f"x_{part}"] for part in pairs], f"{where}: x_train and x_test")
        if all(f"y_{part}" in arrays for part in pairs):
            y = _joined([arrays[f"y_{part}"] for part in pairs], f"{where}: y_train and y_test")
        test = np.repeat([part == "test" for part in pairs], [len(arrays[f"x_{part}"]) for part in pairs])
        for part in pairs:
            if f"y_{part}" in arrays:
                _require_rows(arrays[f"y_{part}"], len(arrays[f"x_{part}"]), f"{where}: y_{part}")
    else:
        inputs = _inputs(arrays, where)
        y = arrays.get("y")
        if "test" in arrays:
            test = _integers(arrays["test"], len(inputs), f"{where}: test") != 0
    x = _prepared(inputs, data, where)
    owner = _owners(arrays.get("device"), len(x))
    classes = (
        tuple(str(name) for name in np.atleast_1d(arrays["classes"]).ravel()) if "classes" in arrays else ()
    )
    if y is None:
        return Samples(x=x, device=owner, test=test, classes=classes)
    labels = _labels(y, len(x), data, classes, where)
    return Samples(
        x=x,
        y=labels,
        device=owner,
        test=test,
        classes=classes,
        one_class=int(labels.min()) == int(labels.max()),
    )


def load_labelled(path: Path | str, data: DataContract) -> Samples:
    """Return the samples of a file that must have labels; else as `load_npz`.

    Raises:
        DataError: as `load_npz`, or there are no labels.
    """
    samples = load_npz(path, data)
    if samples.y is None:
        raise DataError(f"{path}: no labels: training needs a key y beside x")
    return samples


def load_unlabeled(
    path: Path | str, data: DataContract | None = None, *, keep_test: bool = True
) -> NDArray[np.float32]:
    """Return the inputs of a file, shape (n, *input_shape); labels, if any, are not looked at.

    Args:
        path: the npz file.
        data: see `load_npz`.
        keep_test: samples that the file marks as test samples come along; those of `x_test` never do.

    Raises:
        DataError: as `load_npz`, or no sample is left.
    """
    arrays = _read(Path(path), labels=False)
    where = str(path)
    inputs = arrays["x_train"] if "x_train" in arrays else _inputs(arrays, where)
    if not keep_test and "x_train" not in arrays and "test" in arrays:
        inputs = inputs[_integers(arrays["test"], len(inputs), f"{where}: test") == 0]
    return _prepared(inputs, data, where)


def class_names(path: Path | str) -> tuple[str, ...]:
    """Return the names of classes in a file; none if it has none, or there is no such file."""
    if not str(path):
        return ()
    try:
        with np.load(path, allow_pickle=False) as loaded:
            named = loaded["classes"] if "classes" in loaded.files else np.empty(0)
        return tuple(str(name) for name in np.atleast_1d(named).ravel())
    except UNREADABLE:
        return ()


def as_inputs(inputs: NDArray[Any], data: DataContract, where: str) -> NDArray[np.float32]:
    """Return samples as a network takes them: in the contract's shape, uint8 as shares of 255.

    Raises:
        DataError: no numbers, another shape, or not finite.
    """
    return _prepared(inputs, data, where)


def contract_of(samples: Samples) -> DataContract:
    """Return the contract that these samples fulfil: their shape, and as many classes as they name or show.

    Raises:
        DataError: there are no labels.
    """
    if samples.y is None:
        raise DataError("no labels: the number of classes is unknown")
    shown = int(samples.y.max()) + 1
    return DataContract(input_shape=samples.x.shape[1:], classes=max(2, shown, len(samples.classes)))


def _read(path: Path, *, labels: bool = True) -> Arrays:
    """Return the arrays of a file that mean something here, all from one state of it.

    A file that is replaced or written while it is read is read again, a few times.

    Raises:
        DataError: missing, damaged, too large, or a key that is needed is no array of numbers or text.
        BusyError: it changes all the time.
    """
    for pause_s in PAUSES_S:
        before = _state(path)
        try:
            arrays = _unpacked(path, labels=labels)
        except DataError:
            if _state(path) == before:
                if not _just_written(path):
                    raise
                time.sleep(pause_s)
                if _state(path) == before:
                    raise
        else:
            if _state(path) == before:
                return arrays
            time.sleep(pause_s)
    raise BusyError(f"{path}: is written to all the time: it could not be read in one state")


PAUSES_S = (0.2, 0.2, 0.5, 1.0, 2.0, 4.0)
"""Before another try: a file of some hundred megabytes is copied by then."""
FRESH_S = 5.0
"""A damaged file that was written just now may not be complete yet."""


def _state(path: Path) -> tuple[int, ...] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size


def _just_written(path: Path) -> bool:
    try:
        return abs(time.time() - path.stat().st_mtime) < FRESH_S
    except OSError:
        return False


UNREADABLE = (OSError, ValueError, KeyError, EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error)
"""What numpy and zipfile raise for damaged files."""


def _unpacked(path: Path, *, labels: bool) -> Arrays:
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        with zipfile.ZipFile(path) as archive:
            sizes = {entry.filename.removesuffix(".npy"): entry.file_size for entry in archive.infolist()}
            wanted = _wanted(sizes.keys(), labels=labels)
            size = sum(sizes[key] for key in wanted)
            if size > MAX_BYTES:
                raise DataError(f"{path}: {size} bytes unpacked, at most {MAX_BYTES}")
            for key in wanted:
                _require_honest(archive, key, sizes[key])
        with np.load(path, allow_pickle=False) as loaded:
            if not wanted:
                raise DataError(_no_inputs(str(path), loaded.files))
            arrays = {key: array for key in wanted if (array := _array(loaded, key, path)) is not None}
    except UNREADABLE as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: no readable npz file ({error})") from error
    except MemoryError as error:
        raise MemoryLimitError(f"{path}: not enough memory for its {size} bytes") from error
    return arrays


def _require_honest(archive: zipfile.ZipFile, key: str, size: int) -> None:
    """Raise ValueError if an array claims more than the archive holds: memory would be taken for it."""
    with archive.open(f"{key}.npy") as file:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in read:
            raise ValueError(f"{key}: unknown version {version} of an array")
        shape, _, kind = read[version](file)
    if kind.hasobject:
        return  # refused, or passed over, where it is read
    if math.prod(shape) * kind.itemsize > size:
        raise ValueError(f"{key}: {shape} of {kind} does not fit into {size} bytes")


def _array(loaded: Mapping[str, Any], key: str, path: Path) -> NDArray[Any] | None:
    """Return one array, None if it is none of numbers or text and can be done without."""
    try:
        array = loaded[key]
    except ValueError:
        array = None  # objects are pickled, which is never read
    if isinstance(array, np.ndarray) and array.dtype.kind in "biufU":
        return array
    if key in INFORMATION:
        return None
    raise DataError(f"{path}: {key} is no array of numbers or text")


INPUTS = (("x",), ("x_delta",), ("logmel_u8", "scale", "offset"), ("mfcc",))
"""Keys of inputs: the first that are all there count."""
MARKS = ("y", "test")
LABELS = ("y", "y_train", "y_test")
INFORMATION = ("device", "classes")
"""Keys that training can do without."""


def _wanted(names: AbstractSet[str], *, labels: bool) -> list[str]:
    """Return the keys of a file that mean something; others may hold whatever they like."""
    if "x_train" in names:
        keys: tuple[str, ...] = ("x_train", "y_train", "x_test", "y_test")
    else:
        found = next((keys for keys in INPUTS if set(keys) <= names), None)
        if found is None:
            return []
        keys = (*found, *MARKS)
    return [key for key in (*keys, *INFORMATION) if key in names and (labels or key not in LABELS)]


def _no_inputs(where: str, names: Sequence[str]) -> str:
    return f"{where}: no inputs: keys are {', '.join(sorted(names)[:8]) or 'none'}, wanted x"


def _inputs(arrays: Arrays, where: str) -> NDArray[Any]:
    if "x" in arrays:
        return arrays["x"]
    if "x_delta" in arrays:
        return _undelta(arrays["x_delta"], where)
    if {"logmel_u8", "scale", "offset"} <= arrays.keys():
        scale, offset = np.float32(arrays["scale"].ravel()[0]), np.float32(arrays["offset"].ravel()[0])
        return arrays["logmel_u8"] * scale + offset
    if "mfcc" in arrays:
        return arrays["mfcc"]
    raise DataError(_no_inputs(where, list(arrays)))


def _undelta(delta: NDArray[Any], where: str) -> NDArray[np.uint8]:
    """Decode differences to the upper and left neighbour, modulo 256, with G taken from R and B."""
    if delta.dtype != np.uint8 or delta.ndim != 4 or delta.shape[1] != 3:
        raise DataError(
            f"{where}: x_delta is {delta.dtype} {delta.shape}, wanted uint8 (n, 3, height, width)"
        )
    image = np.cumsum(delta, axis=3, dtype=np.uint8)
    image = np.cumsum(image, axis=2, dtype=np.uint8)
    image[:, 0] += image[:, 1]
    image[:, 2] += image[:, 1]
    return image


def _joined(parts: list[NDArray[Any]], what: str) -> NDArray[Any]:
    try:
        return np.concatenate(parts)
    except ValueError as error:
        raise DataError(f"{what} do not fit together: {error}") from error


def _prepared(inputs: NDArray[Any], data: DataContract | None, where: str) -> NDArray[np.float32]:
    if inputs.ndim < 2 or inputs.dtype.kind not in "biuf":
        raise DataError(f"{where}: inputs are {inputs.dtype} {inputs.shape}, wanted numbers (n, …)")
    if len(inputs) == 0 or inputs.size == 0:
        raise DataError(f"{where}: no samples")
    image = inputs.dtype == np.uint8
    x = inputs.astype(np.float32)
    if image:
        x /= 255
        if x.ndim == 3 and data is None:
            x = x[:, None]
    if data is not None:
        x = _shaped(x, data, where)
    if not np.isfinite(x).all():
        bad = int(np.flatnonzero(~np.isfinite(x.reshape(len(x), -1)).all(axis=1))[0])
        raise DataError(f"{where}: sample {bad} contains NaN or infinity")
    return x


def _shaped(x: NDArray[np.float32], data: DataContract, where: str) -> NDArray[np.float32]:
    shape, wanted = x.shape[1:], data.input_shape
    match fitting(shape, wanted):
        case "same":
            return x
        case "channels first":
            return np.ascontiguousarray(np.moveaxis(x, -1, 1))
        case "add axis" | "drop axis" | "flatten":
            return x.reshape(len(x), *wanted)
    raise DataError(f"{where}: samples have shape {shape}, the job wants {wanted}")


def _labels(
    y: NDArray[Any], rows: int, data: DataContract | None, classes: tuple[str, ...], where: str
) -> NDArray[np.int64]:
    labels = _integers(y, rows, f"{where}: y")
    named = len(classes) if classes else int(labels.max()) + 1
    count = named if data is None else data.classes
    if int(labels.min()) < 0 or int(labels.max()) >= count:
        bad = int(np.flatnonzero((labels < 0) | (labels >= count))[0])
        raise DataError(f"{where}: label {labels[bad]} of sample {bad} is not in 0 … {count - 1}")
    return labels


def _integers(values: NDArray[Any], rows: int, what: str) -> NDArray[np.int64]:
    _require_rows(values, rows, what)
    if values.dtype.kind not in "biu":
        raise DataError(f"{what} must be whole numbers, not {values.dtype}")
    return values.astype(np.int64)


def _owners(values: NDArray[Any] | None, rows: int) -> NDArray[np.int64] | None:
    """Return the owner of each sample; None if the file means something else by that key."""
    if values is None or values.shape != (rows,) or values.dtype.kind not in "biu":
        return None
    return values.astype(np.int64)


def require_training_rows(samples: Samples, where: str) -> None:
    """Raise DataError if a file has no sample that may be trained on."""
    if samples.test is not None and samples.test.all():
        raise DataError(f"{where}: all {len(samples)} samples are marked test: there is nothing to train on")


def _require_rows(values: NDArray[Any], rows: int, what: str) -> None:
    if values.shape != (rows,):
        raise DataError(f"{what} has shape {values.shape}, but there are {rows} samples")
