"""Files that must not be taken for models: name -> (file name, content, code)."""

import io
import json
import pickle
import struct
import tarfile
import zipfile

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper


def safetensors(header, data=b"\0" * 16, *, text=None, length=None):
    encoded = text if text is not None else json.dumps(header).encode()
    return struct.pack("<Q", len(encoded) if length is None else length) + encoded + data


def field(begin=0, end=16, shape=(4,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


class Runs:
    def __reduce__(self):
        return (print, ("executed",))


def torch_file(value, **more):
    buffer = io.BytesIO()
    torch.save(value, buffer, **more)
    return buffer.getvalue()


def archive(members, *, link=None):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as made:
        for name, content in members:
            made.writestr(name, content)
        if link is not None:
            info = zipfile.ZipInfo(link)
            info.external_attr = 0o120777 << 16
            made.writestr(info, "/etc/passwd")
    return buffer.getvalue()


def tar(name, kind=tarfile.REGTYPE, linkname=""):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as made:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, linkname
        made.addfile(info)
    return buffer.getvalue()


def onnx_file(change=lambda _model: None, values=(1.0, 2.0)):
    weight = numpy_helper.from_array(np.array(values, np.float32), "w")
    node = helper.make_node("Add", ["x", "w"], ["y"])
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, 2]) for name in "xy"]
    graph = helper.make_graph([node], "g", ends[:1], ends[1:], [weight])
    model = helper.make_model(graph)
    change(model)
    return model.SerializeToString()


def external(model):
    tensor = model.graph.initializer[0]
    tensor.data_location = TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", "../../etc/passwd"


def hidden_external(model):
    inner = helper.make_tensor("hidden", TensorProto.FLOAT, [2], [1.0, 2.0])
    inner.ClearField("float_data")
    inner.data_location = TensorProto.EXTERNAL
    entry = inner.external_data.add()
    entry.key, entry.value = "location", "/etc/passwd"
    model.graph.node.append(helper.make_node("Constant", [], ["c"], value=inner))


def short_tensor(model):
    model.graph.initializer[0].raw_data = b"\0\0"


NAN = np.array([1, np.nan, 3, 4], np.float32).tobytes()
INF = np.array([1, 2, np.inf, 4], np.float32).tobytes()
TWICE = b'{"a":' + json.dumps(field()).encode() + b',"a":' + json.dumps(field()).encode() + b"}"
TWICE_INSIDE = b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16],"data_offsets":[0,16]}}'
STATE = {"w": torch.zeros(2)}


def script():
    return archive([("m/code/__torch__.py", "import os"), ("m/data.pkl", "x"), ("m/constants.pkl", "x")])


HOSTILE = {
    "pickle": ("m.pkl", pickle.dumps(Runs()), "E_UNSAFE"),
    "pickle of protocol 2": ("m.bin", pickle.dumps({"w": 1}, 2), "E_UNSAFE"),
    "pickle of protocol 0": ("m.pt", pickle.dumps(Runs(), 0), "E_CODEC"),
    "old torch file": ("m.pt", torch_file(STATE, _use_new_zipfile_serialization=False), "E_UNSAFE"),
    "torch file that runs": ("m.pt", torch_file({"w": Runs()}), "E_UNSAFE"),
    "whole torch module": ("m.pt", torch_file(torch.nn.Linear(2, 2)), "E_UNSAFE"),
    "torch list": ("m.pt", torch_file([torch.zeros(2)]), "E_STRUCTURE"),
    "torch text": ("m.pt", torch_file({"w": "text"}), "E_STRUCTURE"),
    "torch integers": ("m.pt", torch_file({"w": torch.zeros(2, dtype=torch.int64)}), "E_STRUCTURE"),
    "torch NaN": ("m.pt", torch_file({"w": torch.tensor([float("nan")])}), "E_NONFINITE"),
    "torch view that promises": ("m.pt", torch_file({"w": torch.zeros(1).expand(1 << 30)}), "E_SIZE"),
    "torch sparse": ("m.pt", torch_file({"w": torch.eye(2).to_sparse()}), "E_STRUCTURE"),
    "TorchScript": ("m.pt", script(), "E_UNSAFE"),
    "exported program": ("m.pt2", archive([("m/archive_format", "pt2"), ("m/data.pkl", "x")]), "E_UNSAFE"),
    "zip": ("m.zip", archive([("model.safetensors", safetensors({"a": field()}))]), "E_UNSAFE"),
    "zip with a way out": ("m.pt", archive([("../data.pkl", "x")]), "E_UNSAFE"),
    "zip with an absolute name": ("m.pt", archive([("/data.pkl", "x")]), "E_UNSAFE"),
    "zip with a link": ("m.pt", archive([("m/data.pkl", "x")], link="m/data/0"), "E_UNSAFE"),
    "zip that is cut": ("m.pt", torch_file(STATE)[:100], "E_CODEC"),
    "tar": ("m.tar", tar("model.safetensors"), "E_UNSAFE"),
    "tar with a way out": ("m.tar", tar("../../etc/cron.d/x"), "E_UNSAFE"),
    "tar with a link": ("m.tar", tar("m", tarfile.SYMTYPE, "/etc/passwd"), "E_UNSAFE"),
    "gzip": ("m.safetensors", b"\x1f\x8b" + b"\0" * 40, "E_UNSAFE"),
    "program": ("m.safetensors", b"#!/bin/sh\necho\n" * 4, "E_UNSAFE"),
    "HDF5": ("m.h5", b"\x89HDF\r\n\x1a\n" + b"\0" * 40, "E_CODEC"),
    "numpy": ("m.npy", b"\x93NUMPY\x01\0" + b"\0" * 40, "E_CODEC"),
    "empty": ("m.safetensors", b"", "E_CODEC"),
    "text": ("m.safetensors", b"hello, I am a model", "E_CODEC"),
    "ONNX with external data": ("m.onnx", onnx_file(external), "E_UNSAFE"),
    "ONNX with hidden external data": ("m.onnx", onnx_file(hidden_external), "E_UNSAFE"),
    "ONNX with NaN": ("m.onnx", onnx_file(values=(1.0, float("nan"))), "E_NONFINITE"),
    "ONNX whose tensor is short": ("m.onnx", onnx_file(short_tensor), "E_CODEC"),
    "ONNX that is cut": ("m.onnx", onnx_file()[:-20], "E_CODEC"),
    "ONNX without nodes": ("m.onnx", onnx.ModelProto(ir_version=8).SerializeToString(), "E_CODEC"),
    "doubled name": ("m.safetensors", safetensors(None, text=TWICE), "E_CODEC"),
    "doubled key of a tensor": ("m.safetensors", safetensors(None, text=TWICE_INSIDE), "E_CODEC"),
    "NaN": ("m.safetensors", safetensors({"a": field()}, NAN), "E_NONFINITE"),
    "infinite": ("m.safetensors", safetensors({"a": field()}, INF), "E_NONFINITE"),
    "overlap": ("m.safetensors", safetensors({"a": field(), "b": field(8, 24)}, b"\0" * 24), "E_CODEC"),
    "gap": ("m.safetensors", safetensors({"a": field(), "b": field(20, 36)}, b"\0" * 36), "E_CODEC"),
    "outside": ("m.safetensors", safetensors({"a": field(0, 64, (16,))}), "E_CODEC"),
    "something behind": ("m.safetensors", safetensors({"a": field()}, b"\0" * 17), "E_CODEC"),
    "wrong length of a shape": ("m.safetensors", safetensors({"a": field(shape=(5,))}), "E_CODEC"),
    "negative side": ("m.safetensors", safetensors({"a": field(shape=(-4,))}), "E_CODEC"),
    "sides beyond 64 bits": ("m.safetensors", safetensors({"a": field(shape=(1 << 40, 1 << 40))}), "E_CODEC"),
    "truth as a side": ("m.safetensors", safetensors({"a": field(shape=(True, 4))}), "E_CODEC"),
    "huge header": ("m.safetensors", safetensors({"a": field()}, length=1 << 62), "E_SIZE"),
    "header beyond the file": ("m.safetensors", safetensors({"a": field()}, length=4000), "E_CODEC"),
    "deep header": ("m.safetensors", safetensors(None, text=b'{"a":' * 9000), "E_CODEC"),
    "integers": ("m.safetensors", safetensors({"a": field(shape=(2,), dtype="I64")}), "E_STRUCTURE"),
    "no tensor": ("m.safetensors", safetensors({}, b""), "E_STRUCTURE"),
    "metadata that is no text": (
        "m.safetensors",
        safetensors({"__metadata__": {"a": 1}, "a": field()}),
        "E_CODEC",
    ),
    "unknown dtype": ("m.safetensors", safetensors({"a": field(dtype="F8_E4M3")}), "E_STRUCTURE"),
    "too many axes": ("m.safetensors", safetensors({"a": field(shape=(4, *[1] * 12))}), "E_STRUCTURE"),
}
