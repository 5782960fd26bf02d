import struct

import numpy as np
import pytest
import torch
from tests.unit.coordinator.hostile_models import HOSTILE, onnx_file, safetensors, torch_file

from liberatai_coordinator.repository import imports, tensor_file
from liberatai_core.errors import LiberataiError
from liberatai_core.structure import Structure, Tensor


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_with_a_code(name, tmp_path, capfd):
    file_name, content, code = HOSTILE[name]
    path = tmp_path / file_name
    path.write_bytes(content)

    with pytest.raises(LiberataiError) as refused:
        imports.load(path)

    assert refused.value.code == code, str(refused.value)
    assert "executed" not in capfd.readouterr().out
    assert "\n" not in str(refused.value)


def test_links_folders_and_huge_files_are_refused_before_they_are_read(tmp_path):
    huge = tmp_path / "huge.safetensors"
    with huge.open("wb") as file:
        file.truncate(imports.MAX_FILE_BYTES + 1)  # a hole: no bytes on the disk
    for path, code in ((huge, "E_SIZE"), (tmp_path, "E_UNSAFE"), (tmp_path / "none", "E_NOT_FOUND")):
        with pytest.raises(LiberataiError) as refused:
            imports.load(path)
        assert refused.value.code == code


def test_what_is_good_is_read(tmp_path):
    state = {"a.weight": torch.arange(6.0).reshape(2, 3), "n.num_batches_tracked": torch.tensor(3)}
    for name, content in (
        ("m.pt", torch_file(state)),
        ("c.pt", torch_file({"state_dict": state, "epoch": 3})),
    ):
        (tmp_path / name).write_bytes(content)
        found = imports.load(tmp_path / name)
        assert list(found.tensors) == ["a.weight"]
        assert np.array_equal(found.tensors["a.weight"], np.arange(6, dtype=np.float32).reshape(2, 3))
    assert imports.parse(onnx_file(), "m.onnx").kind == "onnx"
    half = np.array([1, -2, 0.5, 4], np.float16)
    header = {"h": {"dtype": "F16", "shape": [4], "data_offsets": [0, 8]}}
    tensors = imports.parse(safetensors(header, half.tobytes()), "m.safetensors").tensors
    assert tensors["h"].tolist() == half.tolist()
    brain = np.array([1.0, -2.0], np.float32).view(np.uint32) >> 16
    header = {"h": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}
    found = imports.parse(safetensors(header, brain.astype("<u2").tobytes()), "m.safetensors")
    assert found.tensors["h"].tolist() == [1.0, -2.0]


def test_our_files_are_those_that_the_safetensors_library_reads():
    from safetensors.numpy import load

    structure = Structure("mlp", {}, (Tensor("b", (2, 2)), Tensor("a", (3,))))
    weights = np.arange(7, dtype=np.float32)
    content = tensor_file.encode(structure, weights, {"format": "pt"})

    theirs = load(content)
    assert theirs["b"].tolist() == [[0, 1], [2, 3]]
    assert theirs["a"].tolist() == [4, 5, 6]
    assert np.array_equal(tensor_file.flat(content, structure), weights)
    tensors, metadata = tensor_file.decode(content, structure)
    assert metadata == {"format": "pt"}
    assert list(tensors) == ["b", "a"]
    assert struct.unpack_from("<Q", content)[0] % 8 == 0
