"""The model that this device holds by wish of the fleet, and the one before it, so that it can go back.

Its files lie apart from those of training, and are deleted only when a third model takes their place.
"""

import contextlib
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec

from liberatai_agent.children.messages import File, Work
from liberatai_agent.events import TrainingResult
from liberatai_agent.session.fits import Limits, trainer_of
from liberatai_agent.store.blobs import BlobStore, Fetcher
from liberatai_agent.store.files import write_durably
from liberatai_core.contract.frame import decode_spec
from liberatai_core.contract.limits import MAX_SPEC_BYTES
from liberatai_core.contract.messages import ModelWish, Sums, TaskSpec
from liberatai_core.errors import DigestError, DiskError, LiberataiError, NotFoundError, QuotaError

RECORD = "model.msgpack"
RECORD_BYTES = 1 << 20
CHECK_S = 600.0
"""Longest check: reading the files, and the hold-out through the model once."""


class Deployed(msgspec.Struct, frozen=True, kw_only=True):
    """A model in use, or the one before it.

    Attributes:
        wish: what it is.
        structure: id of its structure.
        evaluation: (correct, total) on the hold-out when it was taken into use; None: nothing is held out.
    """

    wish: ModelWish
    structure: str
    evaluation: Sums | None = None


class _Record(msgspec.Struct, frozen=True, kw_only=True):
    current: Deployed | None = None
    previous: Deployed | None = None


class Models:
    """Keeps the model by wish.

    Args:
        folder: of the state.
        device: its name.
        fetcher: asks for files.
        data_path: the private file, "" if there is none.
        limits: gives what a check of so many seconds may take.
        check: lets the training process restore and score a model.
        storage_bytes: gives what a model's files may take.

    Attributes:
        current: the model in use; None: none by wish.
        previous: the one before it.
    """

    def __init__(
        self,
        folder: Path,
        device: str,
        fetcher: Fetcher,
        data_path: str,
        limits: Callable[[float], Limits],
        check: Callable[[Work], Awaitable[TrainingResult]],
        storage_bytes: Callable[[], int],
    ) -> None:
        self._device, self._data_path = device, data_path
        self._fetcher, self._limits, self._check = fetcher, limits, check
        self._storage_bytes = storage_bytes
        self._record = folder / RECORD
        self._store = BlobStore(folder / "model")
        record = _read(self._record)
        self.current, self.previous = record.current, record.previous

    def paths(self) -> list[str]:
        """Return the files of the model in use, in order."""
        steps = self.current.wish.steps if self.current else ()
        return [str(self._store.path(step.blob.blob)) for step in steps]

    async def use(self, wish: ModelWish) -> tuple[Sums | None, Sums | None]:
        """Take a model into use; returns its evaluation, and that of the one before on the same data.

        Until all of it is here and verified, the one before stays.

        Raises:
            LiberataiError: it cannot be fetched, is not what it says, or does not fit.
        """
        size_bytes = sum(step.blob.size_bytes for step in wish.steps)
        if size_bytes > self._storage_bytes():
            raise QuotaError(
                f"{wish.model} version {wish.version}: {size_bytes} bytes, more than may be stored"
            )
        before = self.current
        for ref in (wish.spec, *(step.blob for step in wish.steps)):
            await self._fetcher.fetch(ref, self._store)
        spec = decode_spec(self._store.read(wish.spec.blob, MAX_SPEC_BYTES))
        evaluation = await self._score(wish, spec)
        compared = await self._score_again(before) if before is not None else None
        new = Deployed(wish=wish, structure=spec.structure.id, evaluation=evaluation)
        previous = self.previous if before is not None and before.wish == wish else before
        self._keep(_Record(current=new, previous=previous))
        return evaluation, compared

    def drop(self) -> None:
        """Use no model by wish any more; the one before can still be gone back to.

        Raises:
            DiskError: the disk refuses.
        """
        self._keep(_Record(current=None, previous=self.current or self.previous))

    def _keep(self, record: _Record) -> None:
        try:
            write_durably(self._record, msgspec.msgpack.encode(record), mode=0o600)
        except OSError as error:
            raise DiskError(f"{self._record}: {error.strerror}") from error
        self.current, self.previous = record.current, record.previous
        kept = [one.wish for one in (record.current, record.previous) if one is not None]
        self._store.keep_only(
            [ref.blob for wish in kept for ref in (wish.spec, *(step.blob for step in wish.steps))]
        )

    async def _score(self, wish: ModelWish, spec: TaskSpec) -> Sums | None:
        limits = self._limits(CHECK_S)
        work = Work(
            device=self._device,
            job=spec.job,
            round=0,
            structure=spec.structure,
            data=spec.data,
            training=spec.training,
            seed=spec.seed,
            density=1.0,
            path=tuple(
                File(path=str(self._store.path(step.blob.blob)), digest=step.digest) for step in wish.steps
            ),
            data_path=self._data_path,
            trained_share=spec.trained_share,
            check=True,
            runtime=trainer_of(spec, limits, ()),
            memory_bytes=limits.memory_bytes,
            cpu_seconds=limits.cpu_seconds,
        )
        return (await self._check(work)).evaluation

    async def _score_again(self, one: Deployed) -> Sums | None:
        """Return how the model in use does on today's data; what was known of it if that fails."""
        with contextlib.suppress(LiberataiError):
            spec = decode_spec(self._store.read(one.wish.spec.blob, MAX_SPEC_BYTES))
            return await self._score(one.wish, spec)
        return one.evaluation


def _read(path: Path) -> _Record:
    """Return what is in use; nothing, if the record is not there or damaged: the fleet wishes it again."""
    try:
        with path.open("rb") as file:
            return msgspec.msgpack.decode(file.read(RECORD_BYTES), type=_Record)
    except (OSError, msgspec.MsgspecError, LiberataiError):
        return _Record()


LATER = (NotFoundError.code, "E_LINK", "E_BROKER", DiskError.code, "E_BUSY")
"""What passes by itself: the broker has not the file yet, the disk is full, a training runs."""
ONCE_MORE = (DigestError.code, "E_INTERNAL", "E_TRAIN")
"""What a second look may mend: a file was damaged on the way, the process died."""
