"""Weights as one flat float32 vector, and the digest that names them.

A structure fixes the order and the shapes of its tensors (`structure.py`); everything that travels,
is stored or is averaged is the flat vector. The digest is taken over its little-endian bytes, so it
is the same on x86-64 and aarch64.
"""

import hashlib

import numpy as np
from numpy.typing import NDArray

from liberatai_core.errors import NonFiniteError, StructureError

Vector = NDArray[np.float32]
"""Flat weights or differences, shape (parameters,), float32."""


def digest(weights: Vector) -> bytes:
    """Return the 32-byte SHA-256 of the weights' little-endian float32 bytes."""
    return hashlib.sha256(np.ascontiguousarray(weights, dtype="<f4").data).digest()


def to_bytes(weights: Vector) -> bytes:
    """Return the little-endian float32 bytes, 4 per parameter."""
    return np.ascontiguousarray(weights, dtype="<f4").tobytes()


def from_bytes(data: bytes) -> Vector:
    """Return the vector that `to_bytes` wrote (a copy, writable).

    Raises:
        StructureError: the length is no multiple of 4.
    """
    if len(data) % 4:
        raise StructureError(f"{len(data)} bytes are no float32 vector")
    return np.frombuffer(data, dtype="<f4").astype(np.float32)


def require_finite(weights: Vector, what: str) -> None:
    """Raise NonFiniteError if a value is NaN or infinite."""
    if not np.isfinite(weights).all():
        bad = int(np.flatnonzero(~np.isfinite(weights))[0])
        raise NonFiniteError(f"{what}: value {bad} is not finite")
