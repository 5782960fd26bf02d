"""Files of other programs: what is taken, and what is refused. Nothing here runs what is in a file.

Taken are safetensors, a torch `state_dict` (read by torch's reader that knows tensors and nothing else), and
ONNX with its weights inside. Refused are pickles, exported programs and TorchScript (they carry code), ONNX
with external data (it names other files), archives, links, NaN, and whatever is larger than a model may be.
Sizes are looked at before anything is read.
"""

import io
import os
import stat
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from liberatai_coordinator.repository import tensor_file
from liberatai_coordinator.repository.tensor_file import Tensors
from liberatai_core.errors import (
    CodecError,
    DiskError,
    NonFiniteError,
    NotFoundError,
    StructureError,
    TooLargeError,
    UnsafeFileError,
)
from liberatai_core.learning import foreign
from liberatai_core.structure import MAX_PARAMETERS, MAX_TENSORS

MAX_FILE_BYTES: Final = 4 * MAX_PARAMETERS + tensor_file.MAX_HEADER_BYTES
MAX_MEMBERS: Final = 2 * MAX_TENSORS
"""Files in a torch archive: one per tensor, and a few."""
_ZIP: Final = b"PK\x03\x04"
_PACKED: Final = {
    b"\x1f\x8b": "gzip",
    b"\xfd7zXZ": "xz",
    b"(\xb5/\xfd": "zstd",
    b"BZh": "bzip2",
    b"7z\xbc\xaf": "7z",
    b"Rar!": "rar",
}


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
    if content.startswith((b"#!", b"\x7fELF")):
        raise UnsafeFileError(f"{name}: a program, not a model")
    if content.startswith(_ZIP):
        _check_archive(content, name)
        tensors = foreign.state_dict(content, name)
        return Imported(kind="tensors", content=content, tensors=tensors, metadata={})
    if content[:1] == b"\x80" and len(content) > 1 and content[1] <= 5:
        raise UnsafeFileError(f"{name}: a pickle, which can run code when read; save it as safetensors")
    if content.startswith((b"\x89HDF", b"\x93NUMPY")):
        raise CodecError(f"{name}: HDF5 and numpy files are not read; save the model as safetensors")
    if len(content) > 9 and content[8:9] == b"{":
        try:
            tensors, metadata = tensor_file.decode(content)
        except (CodecError, StructureError, NonFiniteError, TooLargeError) as error:
            raise type(error)(f"{name}: {error}") from None
        return Imported(kind="tensors", content=content, tensors=tensors, metadata=metadata)
    if name.endswith(".onnx") or content[:1] == b"\x08":
        model = foreign.checked_onnx(content, name)
        told = {prop.key: prop.value for prop in model.metadata_props}
        return Imported(kind="onnx", content=content, tensors={}, metadata=told)
    raise CodecError(f"{name}: neither safetensors, nor a torch state_dict, nor ONNX")


def _check_archive(content: bytes, name: str) -> None:
    """Refuse archives that are no state_dict, by their list of members alone."""
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
