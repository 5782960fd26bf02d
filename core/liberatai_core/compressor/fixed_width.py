"""k-means codebooks with indices of equal width, nothing trained, nothing entropy-coded. A baseline by name.

The quantisation of Han, Mao and Dally, "Deep Compression", ICLR 2016, arXiv:1510.00149, without pruning and
Huffman coding: what a codebook alone gives. All tensors of two and more axes are quantised, each with 2^bits
centroids; the others stay float32. Its size is `codebook_ijcnn2020.packed_bytes`, since leaving out the
entropy coder is the point; the product's file of the same codings is smaller.
"""

from liberatai_core.compressor import artifact
from liberatai_core.compressor.artifact import Coding
from liberatai_core.compressor.codebook_ijcnn2020 import books, layers
from liberatai_core.structure import Structure
from liberatai_core.weights import Vector

MAX_BITS = 8


def quantise(structure: Structure, weights: Vector, bits: int) -> list[Coding]:
    """Return one coding per tensor.

    Args:
        structure: the named tensors.
        weights: float32, shape (parameters,).
        bits: width of an index, 1 … 8.

    Raises:
        ValueError: another width.
        StructureError: the weights do not belong to the structure.
        NonFiniteError: a weight is NaN or infinite.
    """
    if not 1 <= bits <= MAX_BITS:
        raise ValueError(f"indices of {bits} bits: wanted 1 to {MAX_BITS}")
    ready = books(structure, weights, (1 << bits,))
    chosen = set(layers(structure))
    return [
        ready[tensor.name, 1 << bits]
        if tensor.name in chosen
        else Coding(artifact.FULL, values=weights[place].copy())
        for tensor, place in structure.slices()
    ]
