"""What a client may ask about variants of versions."""

import asyncio
from dataclasses import dataclass

from liberatai_coordinator.api import present
from liberatai_coordinator.api.models import version_row
from liberatai_coordinator.client.views import VariantDetail, VariantView
from liberatai_coordinator.models import variants
from liberatai_coordinator.service import Service
from liberatai_coordinator.store.manifests import VariantManifest, decode_variant
from liberatai_coordinator.store.rows import VariantRow


@dataclass(frozen=True, slots=True)
class VariantOperations:
    """Variants of a coordinator's models."""

    service: Service

    async def commit(self, model: str, ref: str, manifest: VariantManifest, file: bytes) -> VariantView:
        """Check a variant of a version and store it; the same one again is stored once."""
        ledger, repository = self.service.ledger, self.service.repository
        row = await version_row(self.service, model, ref)
        variant = await asyncio.to_thread(variants.commit, ledger, repository, model, row, manifest, file)
        await asyncio.to_thread(self.service.jobs.commits.publish, model)
        return present.variant_view(variant)

    async def list(self, model: str, ref: str) -> tuple[VariantView, ...]:
        """Return the variants of a version, the smallest first."""
        number = (await version_row(self.service, model, ref)).number
        return tuple(
            present.variant_view(row) for row in self.service.ledger.versions.variants(model, number)
        )

    async def show(self, model: str, prefix: str) -> VariantDetail:
        """Return one variant by the beginning of its id."""
        row = await self._row(model, prefix)
        manifest = decode_variant(row.manifest)
        sizes = await asyncio.to_thread(
            variants.tensor_sizes, self.service.repository, manifest.file, manifest.structure
        )
        return present.variant_detail(row, sizes)

    async def file(self, model: str, prefix: str) -> bytes:
        """Return the file of a variant, by the beginning of its id."""
        row = await self._row(model, prefix)
        return await asyncio.to_thread(variants.file_of, self.service.repository, row)

    async def _row(self, model: str, prefix: str) -> VariantRow:
        await version_row(self.service, model, "latest")  # an unknown model is told as such
        return self.service.ledger.versions.variant(model, prefix)
