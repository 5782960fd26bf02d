"""Use a finished or running model: `load(...)` a file or an agent's state folder, then `predict(x)`.

>>> from liberatai_core.model import load
>>> model = load("digits.lam")            # or "/var/lib/liberatai"
>>> model.predict(x).labels               # doctest: +SKIP
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import ArrayLike, NDArray

from liberatai_core.compressor.artifact import restore
from liberatai_core.contract.frame import decode_spec
from liberatai_core.contract.limits import MAX_CHAIN, MAX_OBJECT_BYTES
from liberatai_core.contract.messages import Step, part_seed
from liberatai_core.errors import ConfigError, DataError, DigestError, LiberataiError, NotFoundError
from liberatai_core.files import write_durably
from liberatai_core.learning.dataset import as_inputs
from liberatai_core.learning.families import structure_of
from liberatai_core.learning.held import followed
from liberatai_core.learning.inference import LIGHT, Engine, Predictor, engine_for
from liberatai_core.sparsifier.subspace import subspace
from liberatai_core.structure import DataContract, Parameter, Structure
from liberatai_core.weights import Vector

PATH, SPEC, BLOBS = "path.msgpack", "model.spec", "blobs"
"""In an agent's state folder: which files lead to the newest weights, what they are of, where they lie."""
PATH_BYTES = 128 * MAX_CHAIN
"""A step takes some 60 bytes."""
DESCRIPTION = ".json"
"""What stands beside a compressed file NAME.lam is in NAME.lam.json."""
TRIES, PAUSE_S = 5, 0.2
"""An agent that goes on to the next version replaces its files: they are read again."""

_STEPS = msgspec.msgpack.Decoder(tuple[Step, ...])


class Description(msgspec.Struct, frozen=True, kw_only=True):
    """What a compressed file does not say of itself: JSON beside it.

    Attributes:
        family, params: the structure.
        data: shape of a sample and number of classes.
        classes: their names; empty if nobody knows.
        model, version: where it comes from.
    """

    family: str
    params: dict[str, Parameter]
    data: DataContract
    classes: tuple[str, ...] = ()
    model: str = ""
    version: int = 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prediction:
    """What a model says of some samples.

    Attributes:
        labels: the most probable class of each, int64, shape (n,).
        names: their names, or their numbers as text.
        probabilities: float32, shape (n, classes).
        version: of the model that said it.
    """

    labels: NDArray[np.int64]
    names: tuple[str, ...]
    probabilities: NDArray[np.float32]
    version: int


@dataclass(frozen=True, slots=True, eq=False)
class _Loaded:
    """One version in memory."""

    structure: Structure
    data: DataContract
    predictor: Predictor
    name: str
    version: int
    mark: tuple[int, ...]


class Model:
    """A model that follows its source: when an agent has a newer version, the next prediction uses it.

    Made by `load`. Not for several threads at once.
    """

    def __init__(self, source: Path, engine: Engine | None, classes: tuple[str, ...], *, light: bool) -> None:
        self._source, self._engine, self._light = source, engine, light
        self.classes = classes
        self._loaded = self._load()

    @property
    def structure(self) -> Structure:
        """What the newest version is made of."""
        return self._loaded.structure

    @property
    def data(self) -> DataContract:
        """What inputs look like."""
        return self._loaded.data

    @property
    def name(self) -> str:
        """Name of the job or model that it comes from, "" if nobody knows."""
        return self._loaded.name

    @property
    def version(self) -> int:
        """Number of the version that was used last."""
        return self._loaded.version

    @property
    def runtime(self) -> Engine:
        """What computes."""
        return self._loaded.predictor.engine

    def refresh(self) -> bool:
        """Take a newer version if there is one, and return whether there was; `predict` does so, too.

        Files that are just being replaced, or damaged ones, leave the version that is there.
        """
        if _mark(self._source) == self._loaded.mark:
            return False
        try:
            self._loaded = self._load()
        except LiberataiError:
            return False
        return True

    def predict(self, x: ArrayLike) -> Prediction:
        """Return the classes of some samples, or of one.

        Args:
            x: numbers, shape (n, …) or that of one sample; uint8 is an image from 0 to 255, as in training.

        Raises:
            DataError: another shape, no numbers, or not finite.
        """
        self.refresh()
        loaded = self._loaded
        inputs = np.asarray(x)
        if inputs.ndim == len(loaded.data.input_shape):
            inputs = inputs[None]
        probabilities = loaded.predictor.probabilities(as_inputs(inputs, loaded.data, "input"))
        labels = probabilities.argmax(axis=1).astype(np.int64)
        return Prediction(
            labels=labels,
            names=tuple(self.class_name(label) for label in labels.tolist()),
            probabilities=probabilities,
            version=loaded.version,
        )

    def class_name(self, label: int) -> str:
        """Return the name of a class, its number as text if it has none."""
        return self.classes[label] if label < len(self.classes) else str(label)

    def _load(self) -> _Loaded:
        mark = _mark(self._source)
        if self._source.is_dir():
            structure, data, weights, name, version = _held(self._source)
        else:
            found = read_description(self._source)
            structure = structure_of(found.family, found.params, found.data)
            data, name, version = found.data, found.model, found.version
            weights = restore(_read(self._source), structure)
            self.classes = self.classes or found.classes
        engine = self._engine
        if engine is None and self._light:
            engine = engine_for(structure.family, (*LIGHT, "torch"))
        predictor = Predictor(structure, data, weights, engine)
        return _Loaded(structure, data, predictor, name, version, mark)


def load(
    source: str | Path, *, runtime: Engine | None = None, classes: Sequence[str] = (), light: bool = False
) -> Model:
    """Return a model that is ready to predict.

    Args:
        source: a compressed file with its description beside it (`liberatai models pull` writes both), or the
            state folder of an agent, finished or running.
        runtime: "torch", "onnxruntime" or "numpy"; None: the first one that is installed.
        classes: names of the classes; else those of the description.
        light: onnxruntime or numpy before torch, which takes 200 MiB.

    Raises:
        NotFoundError: no such file or folder, no description, or the agent has no model yet.
        DigestError, CodecError: a file is damaged.
        MissingExtraError: the runtime is not installed.
        ConfigError: no such runtime, or the description has a fault.
    """
    path = Path(source)
    if not path.exists():
        raise NotFoundError(f"{path}: no such file or folder")
    return Model(path, runtime, tuple(classes), light=light)


def describe(file: Path, description: Description) -> None:
    """Write what a compressed file does not say of itself beside it; raises OSError."""
    path, content = description_file(file, description)
    write_durably(path, content, mode=0o644)


def description_file(file: Path, description: Description) -> tuple[Path, bytes]:
    """Return where a compressed file's description stands, and its content."""
    content = json.dumps(msgspec.to_builtins(description), indent=2) + "\n"
    return file.with_name(file.name + DESCRIPTION), content.encode()


def read_description(file: Path) -> Description:
    """Return what stands beside a compressed file.

    Raises:
        NotFoundError: there is nothing.
        ConfigError: it cannot be read.
    """
    path = file.with_name(file.name + DESCRIPTION)
    try:
        return msgspec.json.decode(path.read_bytes(), type=Description)
    except OSError:
        raise NotFoundError(
            f"{path}: no description beside {file.name}: `liberatai models pull` writes both files"
        ) from None
    except (msgspec.MsgspecError, LiberataiError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), [str(error)]) from None


def _held(folder: Path) -> tuple[Structure, DataContract, Vector, str, int]:
    """Return what an agent's newest files lead to; while it replaces them, they are read again."""
    for attempt in range(TRIES):
        try:
            return _read_held(folder)
        except (NotFoundError, DigestError):
            if attempt == TRIES - 1 or not (folder / PATH).exists():
                raise
            time.sleep(PAUSE_S)
    raise AssertionError("unreachable")


def _read_held(folder: Path) -> tuple[Structure, DataContract, Vector, str, int]:
    try:
        steps = _STEPS.decode((folder / PATH).read_bytes()[:PATH_BYTES])
        spec = decode_spec((folder / SPEC).read_bytes())
    except OSError:
        steps, spec = (), None
    except msgspec.MsgspecError as error:
        raise DigestError(f"{folder / PATH}: damaged ({error})") from None
    if not steps or spec is None:
        raise NotFoundError(f"{folder}: no model yet: the agent gets one with its first task of a job")
    part = subspace(spec.structure, spec.trained_share, part_seed(spec.seed, spec.job, spec.structure.id))
    files = ((step.blob.blob, _read(folder / BLOBS / step.blob.blob)) for step in steps)
    weights = followed(files, part, steps[-1].digest)
    return spec.structure, spec.data, weights, spec.job, steps[-1].version


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_OBJECT_BYTES:
            raise DataError(f"{path}: {path.stat().st_size} bytes, at most {MAX_OBJECT_BYTES}")
        return path.read_bytes()
    except OSError as error:
        raise NotFoundError(f"{path}: {error.strerror}") from None


def _mark(source: Path) -> tuple[int, ...]:
    """Return something that changes with the version."""
    try:
        found = (source / PATH if source.is_dir() else source).stat()
    except OSError:
        return ()
    return found.st_ino, found.st_mtime_ns, found.st_size
