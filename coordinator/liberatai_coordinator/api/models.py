"""What a client may ask about models and their versions."""

import asyncio
from dataclasses import dataclass

from liberatai_coordinator.api import present
from liberatai_coordinator.api.names import not_found
from liberatai_coordinator.client.views import EnsembleView, SizesView, VersionView
from liberatai_coordinator.models import variants
from liberatai_coordinator.service import Service
from liberatai_coordinator.store.ledger import Ledger
from liberatai_coordinator.store.manifests import decode_manifest
from liberatai_coordinator.store.rows import VersionRow
from liberatai_coordinator.store.versions import require_files
from liberatai_core.errors import NotFoundError
from liberatai_core.spelling import meant
from liberatai_core.structure import DataContract, Structure


@dataclass(frozen=True, slots=True)
class ModelOperations:
    """Models of a coordinator. A version is asked for by number, tag or "latest"."""

    service: Service

    async def list(self) -> tuple[VersionView, ...]:
        """Return the newest version of every model."""
        return await asyncio.to_thread(_newest_versions, self.service.ledger)

    async def log(self, model: str) -> tuple[VersionView, ...]:
        """Return all versions of a model, newest first."""
        rows = await asyncio.to_thread(self.service.ledger.versions.all, model)
        if not rows:
            error = NotFoundError(f"no model {model!r}; `liberatai models list` shows all")
            raise await not_found(error, model, self.service.ledger.versions.models())
        return await asyncio.to_thread(lambda: tuple(map(present.version_view, reversed(rows))))

    async def version(self, model: str, ref: str) -> VersionView:
        """Return one version."""
        return present.version_view(await self._row(model, ref))

    async def ensemble(self, model: str, ref: str) -> EnsembleView:
        """Return how a version's structures are combined."""
        return present.ensemble_view(await self._row(model, ref))

    async def weights(self, model: str, ref: str, structure: str) -> tuple[Structure, DataContract, bytes]:
        """Return a structure's weights as devices hold them: little-endian float32, in the flat order."""
        row = await self._row(model, ref)
        require_files(model, row.number, collected=row.collected)
        manifest = decode_manifest(row.manifest)
        if structure not in manifest.structures:
            known = ", ".join(sorted(manifest.structures))
            hint = meant(structure, manifest.structures)
            raise NotFoundError(f"{model} has no structure {structure!r}{hint} (known: {known})")
        record = manifest.structures[structure]
        content = await asyncio.to_thread(self.service.repository.get, record.view)
        return record.structure, manifest.data, content

    async def sizes(self, model: str, ref: str, structure: str) -> SizesView:
        """Return where the bytes of one structure's files go."""
        row = await self._row(model, ref)
        require_files(model, row.number, collected=row.collected)
        members = decode_manifest(row.manifest).structures
        if structure not in members:
            known = ", ".join(sorted(members))
            hint = meant(structure, members)
            raise NotFoundError(
                f"{model} version {row.number} has no structure {structure!r}{hint} (known: {known})"
            )
        member = members[structure]
        sizes = await asyncio.to_thread(
            variants.tensor_sizes, self.service.repository, member.keyframe.blob, member.structure
        )
        return present.sizes_view(structure, member, sizes)

    async def _row(self, model: str, ref: str) -> VersionRow:
        return await version_row(self.service, model, ref)


def _newest_versions(ledger: Ledger) -> tuple[VersionView, ...]:
    return tuple(present.version_view(ledger.versions.get(model)) for model in ledger.versions.models())


async def version_row(service: Service, model: str, ref: str) -> VersionRow:
    """Return one version of a model.

    Raises:
        NotFoundError: there is none of this number or tag.
    """
    versions = service.ledger.versions
    try:
        return versions.get(model, int(ref) if ref.isdigit() else ref)
    except NotFoundError as error:
        known = versions.models()
        raise (error if model in known else await not_found(error, model, known)) from None
