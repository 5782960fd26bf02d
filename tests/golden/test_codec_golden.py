"""Bytes of both codecs, fixed: other versions and other processors must read and write the same.

To see the bytes that this code writes: `python tests/golden/test_codec_golden.py`. A difference is a new
codec id or magic, never a change of these constants.
"""

import hashlib
import sys

import numpy as np
import pytest

from liberatai_core.compressor import artifact
from liberatai_core.compressor.artifact import Coding
from liberatai_core.errors import DigestError
from liberatai_core.sparsifier import codec, top_k
from liberatai_core.structure import Structure, Tensor
from liberatai_core.weights import Vector, digest, to_bytes

pytestmark = pytest.mark.aarch64

PARAMETERS = 5000


def numbers(size: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Return the same pseudo-random integers below 2^31 everywhere: no library generator is involved."""
    out, value = np.empty(size, np.int64), 12345
    for place in range(size):
        value = (1103515245 * value + 12345) % 2**31
        out[place] = value >> 8
    return out


def small_update() -> codec.Sparse:
    return codec.Sparse(
        np.array([0, 3, 4, 700, 4999]),
        np.array([1, -1, 2, -3, 1], np.int16),
        np.array([2, 3]),
        np.array([0.0078125, 1.5], np.float32),
    )


def large_update(density: int, levels: int) -> codec.Sparse:
    random = numbers(2 * PARAMETERS)
    positions = np.flatnonzero(random[:PARAMETERS] % 100 < density)
    draw = random[PARAMETERS:][positions]
    magnitudes = np.minimum(1 + draw % 7 * (draw >> 5) % 11, levels)
    signed = np.where(draw >> 9 & 1, -magnitudes, magnitudes).astype(np.int16)
    half = positions.size // 2
    scales = np.array([codec.round_scale(0.001234), codec.round_scale(37.7)], np.float32)
    return codec.Sparse(positions, signed, np.array([half, positions.size - half]), scales)


def model() -> tuple[list[Coding], Structure]:
    random = numbers(3000)
    book = np.array([-1, -0.333, 0, 0.29, 0.77], np.float16)
    codings = [
        Coding(artifact.CONSTANT, np.float32(0.1)),
        Coding(artifact.HALF, values=np.array([0.1, -2, 3, 6e-8], np.float16)),
        Coding(artifact.FULL, values=np.array([0.1, -2e-39], np.float32)),
        Coding(artifact.GRID, np.float32(0.0123), low=-7, levels=16, raw_bits=4, indices=random[:33] % 16),
        Coding(
            artifact.GRID,
            np.float32(0.00371),
            low=-20,
            levels=73,
            centre=20,
            indices=np.array([0, 4, 15, 20, 21, 22, 23, 72])[random[33:1033] % 8],
        ),
        Coding(
            artifact.CODEBOOK,
            np.float32(2),
            entries=book,
            centre=2,
            indices=np.minimum(random[1033:] % 23, 4) * (random[1033:] % 3 > 0),
        ),
        Coding(
            artifact.GRID,
            np.float32(0.5),
            low=-1,
            levels=3,
            centre=1,
            indices=(1 + clustered_rows(2400)),
            channels=np.arange(40, dtype=np.uint8),
        ),
    ]
    shapes: tuple[tuple[int, ...], ...] = ((6,), (4,), (2,), (33,), (1000,), (1967,), (40, 20, 3))
    tensors = tuple(Tensor(f"t{number}", shape) for number, shape in enumerate(shapes))
    return codings, Structure(family="mlp", params={}, tensors=tensors)


def clustered_rows(size: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Levels -1, 0, 1: rare in the first rows of 60, frequent in the last ones: tables are several."""
    draw = numbers(size)
    signs = 1 - 2 * (draw >> 7 & 1)
    return np.where(draw % 2400 < np.arange(size) * (np.arange(size) // 60) // 40, signs, 0)


def clustered_update() -> codec.Sparse:
    """Runs of one sign, dense at first and rare later: signs are modelled, tables are several."""
    draw = numbers(600)
    positions = np.cumsum(np.where(np.arange(600) < 400, draw % 7 // 5, draw % 5 // 4 * (draw >> 6) % 97) + 1)
    signs = 1 - 2 * (np.cumsum(draw % 9 == 0) & 1)
    return codec.Sparse(positions, signs.astype(np.int16), np.array([600]), np.array([0.25], np.float32))


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


SMALL_UPDATE = "038827051202003cc03f000a081c3422e432c94d88"
"""Hexadecimal, whole."""
LARGE_UPDATES = {
    # (density in percent, levels): SHA-256 of the update, SHA-256 of the values
    (1, 1): (
        "0cfa7872f63c1cdbb4412840dbfb4855ab83f68c1fa80dd86038801c2356edf4",
        "3609cb98504aa8f98fc1617296b7245528246220e2228526f8601da40ca96b3f",
    ),
    (10, 1): (
        "cbef384732092437e3442323b53783498528e372ddcf7886dff033e0ef303e33",
        "7ef83270859d9bd18e4edf9f74cb7c0a423e442fccd510c98175c4d29a9907e1",
    ),
    (10, 3): (
        "de7b0bed82a40fbc8079a8fe0e935db24961087409d226b8484d191d80a0cec7",
        "dac7a7aa2beb589dcce8b96256e1c7d49d2896275255c268ffbb9e95cc86772d",
    ),
    (45, 2): (
        "ae56466912706f5bca4770c4b3782330952346d55a07560678955264f175e0f7",
        "5e7c7b754d06539cd8795816e6c04fb08bf2f506dc3e7646529675eeaf8bcbc0",
    ),
    (80, 11): (
        "9a430a4833ac8e907ed30def223d8a1e5a8b22daa03976900d17814cb94b1d9f",
        "7141dedbfcf3c32231b7697a662afd5dc8eec17f8c205296a4e812858b4456bf",
    ),
    (100, 11): (
        "468c89d529bf3c48beb732c95857ddca8bed512f161483c18a3e34df83a771f7",
        "967de8598cbb3f90845ec1777d8e1810133359207e14c484ce50c40231a7e981",
    ),
}
CLUSTERED_UPDATE = (
    "157a55429ac44821a30ae627885827cccfcddc59818b688bb9b2cd06b1df8465",
    "eb0316ca1cd3373afc2b08acd75222aea230378d447b453af18b55b7d3823161",
)
"""SHA-256 of the update, SHA-256 of the values."""
PLAIN_UPDATE = "02ad020301000000030000002c0100000000003f000000c0cdcccc3d"
DENSE_UPDATE = "04030000003f000000c0cdcccc3d"
MODEL = (
    "c6052c5b6738ddc831c5fae75436dae4f4f5426b967ad3388225494ddab98acd",
    "d9a2c6e12021e054e13ff0c5770fec6bb1350d6af00933674d88ba2921728c85",
)
"""SHA-256 of the file, and the digest of the weights in it."""
STATES = {
    "float32": "c9dccb5479053d8b5a9ec346062823d5d4204b40a046c3a186e9c9d16e2e0bb4",
    "float16": "c9dccb5479053d8b5a9ec346062823d5d4204b40a046c3a186e9c9d16e2e0bb4",
}
"""Storage: SHA-256 of the residual read back, whose bytes are below (zlib's own output may differ)."""
STATE_FILES = {
    "float32": "4c415231040000030000007801636040020d407603c301870607078d35d3f7afefb5bdfa53f4dd653b7b3b3b3b7b7bfbfdf6fbf70300f1ac0eb8",
    "float16": "4c4152310201000300000078017348d9f1a322e7c5ba536b8a66a51666646616e4167dcef9fc0900a9a00df4",
}


def values_of(sparse: codec.Sparse) -> Vector:
    dense = np.zeros(PARAMETERS, np.float32)
    dense[sparse.positions] = sparse.values()
    return dense


def residual(storage: top_k.Storage) -> top_k.State:
    values = (numbers(12) % 2001 - 1000).astype(np.float32) * np.float32(2**-9)
    return top_k.State(values, 3, storage)


def test_a_small_update_has_these_bytes() -> None:
    assert codec.encode(small_update(), PARAMETERS).hex() == SMALL_UPDATE
    positions, values = codec.decode(bytes.fromhex(SMALL_UPDATE), PARAMETERS)
    assert positions.tolist() == [0, 3, 4, 700, 4999]
    assert values.tolist() == [0.0078125, -0.0078125, 3.0, -4.5, 1.5]


def test_a_clustered_update_has_these_bytes_and_values() -> None:
    data = codec.encode(clustered_update(), 20_000)
    positions, values = codec.decode(data, 20_000)
    dense = np.zeros(20_000, np.float32)
    dense[positions] = values
    assert (sha(data), digest(dense).hex()) == CLUSTERED_UPDATE


def test_plain_and_dense_updates_have_these_bytes() -> None:
    values = np.array([0.5, -2, 0.1], np.float32)
    assert codec.encode_plain(np.array([1, 3, 300]), values, 301).hex() == PLAIN_UPDATE
    assert codec.encode_dense(values).hex() == DENSE_UPDATE


@pytest.mark.parametrize(("density", "levels"), LARGE_UPDATES)
def test_large_updates_have_these_bytes_and_values(density: int, levels: int) -> None:
    data = codec.encode(large_update(density, levels), PARAMETERS)
    positions, values = codec.decode(data, PARAMETERS)
    dense = np.zeros(PARAMETERS, np.float32)
    dense[positions] = values
    assert (sha(data), digest(dense).hex()) == LARGE_UPDATES[density, levels]


def test_a_model_has_these_bytes_and_weights() -> None:
    codings, structure = model()
    file = artifact.write(codings, structure)
    assert (sha(file), digest(artifact.restore(file, structure)).hex()) == MODEL
    with pytest.raises(DigestError):
        artifact.restore(file[:4] + bytes(32) + file[36:], structure)


@pytest.mark.parametrize("storage", STATES)
def test_a_residual_file_of_an_older_version_is_read(storage: top_k.Storage) -> None:
    state = top_k.state_from_bytes(bytes.fromhex(STATE_FILES[storage]), 12)
    assert (state.rounds, state.storage) == (3, storage)
    assert sha(to_bytes(state.residual)) == STATES[storage]
    np.testing.assert_array_equal(state.residual, residual(storage).residual)


def show() -> None:
    """Print every constant of this file as the code makes it."""
    lines = [f"SMALL_UPDATE {codec.encode(small_update(), PARAMETERS).hex()}"]
    for density, levels in ((1, 1), (10, 1), (10, 3), (45, 2), (80, 11), (100, 11)):
        sparse = large_update(density, levels)
        data = codec.encode(sparse, PARAMETERS)
        lines.append(f"LARGE {density} {levels} {sha(data)} {digest(values_of(sparse)).hex()}")
    sparse = clustered_update()
    dense = np.zeros(20_000, np.float32)
    dense[sparse.positions] = sparse.values()
    lines.append(f"CLUSTERED {sha(codec.encode(sparse, 20_000))} {digest(dense).hex()}")
    values = np.array([0.5, -2, 0.1], np.float32)
    lines.append(f"PLAIN {codec.encode_plain(np.array([1, 3, 300]), values, 301).hex()}")
    lines.append(f"DENSE {codec.encode_dense(values).hex()}")
    codings, structure = model()
    file = artifact.write(codings, structure)
    lines.append(f"MODEL {sha(file)} {digest(artifact.restore(file, structure)).hex()}")
    storages: tuple[top_k.Storage, ...] = ("float32", "float16")
    for storage in storages:
        state = residual(storage)
        file = top_k.state_to_bytes(state)
        lines.append(f"STATE {storage} {sha(to_bytes(state.residual))} {file.hex()}")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    show()
