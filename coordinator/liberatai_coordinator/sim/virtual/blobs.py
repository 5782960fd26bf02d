"""Files of models that the devices of virtual time fetch: each is kept once for all of them."""

from dataclasses import dataclass, field
from pathlib import Path

from liberatai_core.contract.frame import decode_spec
from liberatai_core.contract.messages import BlobRef, TaskSpec
from liberatai_core.contract.topics import blob_id


@dataclass(slots=True)
class Blobs:
    """A folder of blobs.

    Attributes:
        folder: is there.
        fetched_bytes: by all devices together.
    """

    folder: Path
    fetched_bytes: int = 0
    _kept: dict[str, int] = field(default_factory=dict)
    _specs: dict[str, TaskSpec] = field(default_factory=dict)

    def spec(self, blob: str) -> TaskSpec:
        """Return the spec that a blob holds."""
        if blob not in self._specs:
            self._specs[blob] = decode_spec(self.path(blob).read_bytes())
        return self._specs[blob]

    def keep(self, ref: BlobRef, content: bytes) -> bool:
        """Take a blob's content; False: it is not what its name says."""
        self.fetched_bytes += len(content)
        if ref.blob in self._kept:
            return self._kept[ref.blob] == hash(content)
        if len(content) != ref.size_bytes or blob_id(content) != ref.blob:
            return False
        self._kept[ref.blob] = hash(content)
        self.path(ref.blob).write_bytes(content)
        return True

    def path(self, blob: str) -> Path:
        """Return the file of a blob."""
        return self.folder / blob
