"""Files of other programs: what is taken, and what is refused. Nothing here runs what is in a file.

Taken are safetensors, a torch `state_dict` (read by torch's reader that knows tensors and nothing else), ONNX
with its weights inside, and our own compressed files. Refused are pickles, exported programs and TorchScript
(they carry code), ONNX with external data (it names other files), archives, links, NaN, and whatever is larger
than a model may be. Sizes are looked at before anything is read.
"""

import os
import stat
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from liberatai_coordinator.repository import tensor_file
from liberatai_coordinator.repository.tensor_file import SKIPPED, Tensors
from liberatai_core.errors import (
    CodecError,
    DiskError,
    MissingExtraError,
    NonFiniteError,
    NotFoundError,
    StructureError,
    TooLargeError,
    UnsafeFileError,
)
from liberatai_core.structure import MAX_PARAMETERS, MAX_TENSORS

MAX_FILE_BYTES: Final = 4 * MAX_PARAMETERS + tensor_file.MAX_HEADER_BYTES
MAX_MEMBERS: Final = 2 * MAX_TENSORS
"""Files in a torch archive: one per tensor, and a few."""
_GZIP, _ZIP, _XZ, _ZSTD = b"\x1f\x8b", b"PK\x03\x04", b"\xfd7zXZ", b"(\xb5/\xfd"
_PACKED: Final = {_GZIP: "gzip", _XZ: "xz", _ZSTD: "zstd", b"BZh": "bzip2", b"7z\xbc\xaf": "7z", b"Rar!": "rar"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """What is in a file.

    Attributes:
        kind: "tensors" (then `tensors` holds them) or "onnx".
        content: the file.
        metadata: texts that the file carries.
    """

    kind: str
    content: bytes
    tensors: Tensors
    metadata: dict[str, str]


def load(path: Path) -> Imported:
    """Return what is in a file.

    Raises:
        NotFoundError: no such file. DiskError: it cannot be read.
        TooLargeError: larger than any model here.
        UnsafeFileError: it could run code, or reach outside of itself.
        CodecError, StructureError, NonFiniteError: of no known form, damaged, no float tensors, or NaN.
    """
    content = read(path)
    return parse(content, path.name)


def read(path: Path) -> bytes:
    """Return the bytes of a plain file that is not too large.

    Raises:
        NotFoundError, DiskError, TooLargeError, UnsafeFileError: as `load`.
    """
    try:
        with path.open("rb") as file:
            about = os.fstat(file.fileno())
            if not stat.S_ISREG(about.st_mode):
                raise UnsafeFileError(f"{path}: not a plain file")
            if about.st_size > MAX_FILE_BYTES:
                raise TooLargeError(f"{path}: {about.st_size} bytes, at most {MAX_FILE_BYTES}")
            return file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise NotFoundError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise UnsafeFileError(f"{path}: a folder, not a plain file") from None
    except OSError as error:
        raise DiskError(f"{path}: cannot be read ({error.strerror})") from None


def parse(content: bytes, name: str) -> Imported:
    """Return what is in the content of a file; `name` is for messages, and tells ONNX from others.

    Raises:
        TooLargeError, UnsafeFileError, CodecError, StructureError, NonFiniteError: as `load`.
    """
    if len(content) > MAX_FILE_BYTES:
        raise TooLargeError(f"{name}: {len(content)} bytes, at most {MAX_FILE_BYTES}")
    for magic, what in _PACKED.items():
        if content.startswith(magic):
            raise UnsafeFileError(f"{name}: packed with {what}; unpack it and commit the model's own file")
    if content[257:262] == b"ustar":
        raise UnsafeFileError(f"{name}: a tar archive; unpack it and commit the model's own file")
    if content.startswith(b"#!") or content.startswith(b"\x7fELF"):
        raise UnsafeFileError(f"{name}: a program, not a model")
    if content.startswith(_ZIP):
        tensors = _torch(content, name)
        return Imported(kind="tensors", content=content, tensors=tensors, metadata={})
    if content[:1] == b"\x80" and len(content) > 1 and content[1] <= 5:
        raise UnsafeFileError(f"{name}: a pickle, which can run code when it is read; save it as safetensors")
    if content.startswith(b"\x89HDF") or content.startswith(b"\x93NUMPY"):
        raise CodecError(f"{name}: HDF5 and numpy files are not read; save the model as safetensors")
    if len(content) > 9 and content[8:9] == b"{":
        try:
            tensors, metadata = tensor_file.decode(content)
        except (CodecError, StructureError, NonFiniteError, TooLargeError) as error:
            raise type(error)(f"{name}: {error}") from None
        return Imported(kind="tensors", content=content, tensors=tensors, metadata=metadata)
    if name.endswith(".onnx") or content[:1] == b"\x08":
        return Imported(kind="onnx", content=content, tensors={}, metadata=onnx_metadata(content, name))
    raise CodecError(f"{name}: neither safetensors, nor a torch state_dict, nor ONNX")


def _torch(content: bytes, name: str) -> Tensors:
    """Return the tensors of a torch state_dict."""
    _check_archive(content, name)
    try:
        import torch
    except ImportError as error:
        raise MissingExtraError("torch is not installed: pip install 'liberatai[train]'") from error
    import io

    try:
        found = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True, mmap=False)
    except Exception as error:  # noqa: BLE001 - its reader refuses what is no tensor with whatever it likes
        raise UnsafeFileError(
            f"{name}: holds more than tensors ({type(error).__name__}); save `model.state_dict()`"
        ) from None
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    if not isinstance(found, dict) or not 1 <= len(found) <= MAX_TENSORS:
        raise StructureError(f"{name}: no state_dict: save `model.state_dict()`")
    tensors: Tensors = {}
    for key, value in found.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise StructureError(f"{name}: {str(key)[:80]}: not a named tensor; save `model.state_dict()`")
        if key.rpartition(".")[2] == SKIPPED:
            continue
        tensors[key] = _array(key, value, name)
    if sum(value.size for value in tensors.values()) > MAX_PARAMETERS:
        raise TooLargeError(f"{name}: more than {MAX_PARAMETERS} values")
    return tensors


def _array(key: str, value: Any, name: str) -> np.ndarray[Any, np.dtype[np.float32]]:
    if value.layout is not __import__("torch").strided or value.is_quantized or not value.is_floating_point():
        raise StructureError(f"{name}: {key[:80]} is {value.dtype}: weights are dense floating-point numbers")
    if value.numel() > MAX_PARAMETERS:
        raise TooLargeError(f"{name}: {key[:80]}: more than {MAX_PARAMETERS} values")
    array: np.ndarray[Any, np.dtype[np.float32]] = value.detach().float().contiguous().numpy()
    tensor_file.require_finite(array, f"{name}: {key[:80]}")
    return array


def _check_archive(content: bytes, name: str) -> None:
    """Refuse archives that are no state_dict, by their list of members alone."""
    import io

    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError) as error:
        raise CodecError(f"{name}: a damaged archive ({str(error)[:80]})") from None
    if len(members) > MAX_MEMBERS:
        raise TooLargeError(f"{name}: an archive of {len(members)} files, at most {MAX_MEMBERS}")
    names = [member.filename for member in members]
    if len(set(names)) != len(names):
        raise UnsafeFileError(f"{name}: a file stands twice in the archive")
    for member in members:
        parts = member.filename.replace("\\", "/").split("/")
        if member.filename.startswith("/") or ".." in parts:
            raise UnsafeFileError(f"{name}: {member.filename[:80]!r} lies outside of the archive")
        if stat.S_ISLNK(member.external_attr >> 16):
            raise UnsafeFileError(f"{name}: {member.filename[:80]!r} is a link")
    if sum(member.file_size for member in members) > 2 * MAX_FILE_BYTES:
        raise TooLargeError(f"{name}: unpacks to more than a model may have")
    inside = {part.rpartition("/")[2] for part in names}
    if any("/code/" in f"/{part}" for part in names) or "constants.pkl" in inside:
        raise UnsafeFileError(f"{name}: TorchScript, which carries code; save `model.state_dict()`")
    if inside & {"archive_format", "serialized_exported_program.json", "model.json"} or any(
        part.endswith((".pt2", ".so")) for part in inside
    ):
        raise UnsafeFileError(f"{name}: an exported program, which carries code; save `model.state_dict()`")
    if "data.pkl" not in inside:
        raise UnsafeFileError(f"{name}: an archive, but no torch state_dict; commit the model's own file")


def onnx_metadata(content: bytes, name: str) -> dict[str, str]:
    """Return the texts that an ONNX file carries, after every check.

    Raises:
        UnsafeFileError: weights lie in other files. NonFiniteError: a weight is NaN or infinite.
        CodecError: not ONNX, or damaged.
    """
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        raise MissingExtraError("onnx is not installed: pip install 'liberatai[coordinator]'") from error
    try:
        model = onnx.load_model_from_string(content)
    except Exception:  # noqa: BLE001 - protobuf raises what it likes
        raise CodecError(f"{name}: not ONNX, or damaged") from None
    if not model.graph.node:
        raise CodecError(f"{name}: not ONNX, or an empty graph")
    for tensor in _onnx_tensors(model):
        if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data:
            raise UnsafeFileError(f"{name}: weights of {tensor.name[:80]!r} lie in another file (external data)")
        if tensor.data_type in (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE, onnx.TensorProto.FLOAT16):
            try:
                values = numpy_helper.to_array(tensor)
            except Exception:  # noqa: BLE001 - a length that does not fit its shape
                raise CodecError(f"{name}: {tensor.name[:80]!r} does not hold its shape") from None
            if not np.isfinite(values).all():
                raise NonFiniteError(f"{name}: {tensor.name[:80]!r}: a value is NaN or infinite")
    try:
        onnx.checker.check_model(model)
    except Exception as error:  # noqa: BLE001 - it has no base class of its own
        raise CodecError(f"{name}: not a valid ONNX graph ({str(error).splitlines()[0][:120]})") from None
    return {prop.key: prop.value for prop in model.metadata_props}


def _onnx_tensors(model: Any) -> Any:
    """Yield every tensor of a model, those inside of attributes and of graphs in graphs, too."""
    graphs, functions = [model.graph], [list(function.node) for function in model.functions]
    nodes = [node for body in functions for node in body]
    while graphs or nodes:
        if graphs:
            graph = graphs.pop()
            yield from graph.initializer
            for sparse in graph.sparse_initializer:
                yield sparse.values
                yield sparse.indices
            nodes += graph.node
            continue
        for attribute in nodes.pop().attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            for sparse in [attribute.sparse_tensor, *attribute.sparse_tensors]:
                yield sparse.values
                yield sparse.indices
            if attribute.HasField("g"):
                graphs.append(attribute.g)
            graphs += attribute.graphs
