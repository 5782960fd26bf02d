"""From the files that a device holds to the weights that they lead to: a keyframe, then deltas."""

from collections.abc import Iterable

from liberatai_core.compressor.artifact import restore
from liberatai_core.contract.messages import weights_name
from liberatai_core.errors import DigestError, LiberataiError
from liberatai_core.sparsifier.subspace import Subspace
from liberatai_core.sparsifier.top_k import densify
from liberatai_core.weights import Vector, digest


def followed(
    files: Iterable[tuple[str, bytes]], part: Subspace, wanted: bytes, start: Vector | None = None
) -> Vector:
    """Return the weights that files lead to. Only where they end is checked.

    Args:
        files: (name, content), in order.
        part: what deltas are about.
        wanted: name of the weights at the end (`weights_name`).
        start: weights that the files go on from; None: the first one is a keyframe.

    Raises:
        DigestError: they lead to other weights, or a file is damaged.
    """
    weights = start
    for name, content in files:
        try:
            if weights is None:
                weights = restore(content, part.structure)
            else:
                weights = part.added(weights, densify(content, part.part))
        except LiberataiError as error:
            # Its SHA-256 was checked when it was stored.
            raise DigestError(f"{name}: damaged: {error}") from error
    if weights is None:
        raise DigestError("no file leads to the base")
    found = weights_name(digest(weights))
    if found != wanted:
        raise DigestError(f"the files give weights {found.hex()}, wanted {wanted.hex()}")
    return weights
