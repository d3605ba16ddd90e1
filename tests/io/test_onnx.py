"""ONNX files, sound and damaged."""

import random
import sys

import pytest
import torch

onnx = pytest.importorskip("onnx")

from onnx import TensorProto, helper

from aigc_fast.io import read_onnx


def write(path, *tensors, **conv):
    node = helper.make_node("Conv", ["x", "w", "b"], ["y"], "/a/Conv", **conv)
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, None)]
    graph = helper.make_graph([node], "g", inputs, [], tensors)
    path.write_bytes(helper.make_model(graph).SerializeToString())
    return path


def tensor(name="w", kind=TensorProto.FLOAT, shape=(2, 3), raw=False):
    values = torch.arange(6.0).numpy()
    if raw:
        values = values.astype(helper.tensor_dtype_to_np_dtype(kind)).tobytes()
    return helper.make_tensor(name, kind, shape, values, raw=raw)


@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize("kind", ["FLOAT", "FLOAT16", "DOUBLE"])
def test_tensors_and_nodes(tmp_path, kind, raw):
    weight = tensor(kind=getattr(TensorProto, kind), raw=raw)
    file = read_onnx(
        write(tmp_path / "a.onnx", weight, dilations=[2], group=3, alpha=0.5, auto_pad="VALID")
    )
    assert file.inputs == ("x",) and file.shape("w") == (2, 3)
    dtype = dict(FLOAT=torch.float32, FLOAT16=torch.float16, DOUBLE=torch.float64)[kind]
    assert torch.equal(file.get_tensor("w"), torch.arange(6, dtype=dtype).reshape(2, 3))
    (node,) = file.nodes
    assert (node.kind, node.name, node.inputs, node.outputs) == (
        "Conv", "/a/Conv", ("x", "w", "b"), ("y",),
    )  # fmt: skip
    assert node.attributes == {"dilations": (2,), "group": 3, "alpha": 0.5}


def test_what_is_refused(tmp_path):
    path = tmp_path / "a.onnx"

    def refused(name="w", **fields):
        weight = tensor(raw=True)
        for key, value in fields.items():
            if key == "dims":
                weight.dims[:] = value
            else:
                setattr(weight, key, value)
        with pytest.raises(ValueError, match=r"a\.onnx: ") as error:
            read_onnx(write(path, weight)).get_tensor(name)
        return str(error.value)

    assert "tensor 'v' is missing" in refused("v")
    assert "has its data in another file" in refused(data_location=1)
    assert "must be float32, float16 or float64, got type 7" in refused(data_type=7)
    assert "of shape (2, 4) must have 32 bytes, got 24" in refused(dims=[2, 4])
    assert f"of shape (3, {2**62}) must have" in refused(dims=[3, 2**62])
    assert "of shape (-2, -3) must have" in refused(dims=[-2, -3])
    assert "must have 24 bytes, got 23" in refused(raw_data=bytes(23))
    with pytest.raises(ValueError, match=r"a\.onnx: there are two tensors 'w'"):
        read_onnx(write(path, tensor(), tensor()))
    onnx.save(helper.make_model(helper.make_graph([], "g", [], [])), path)
    with pytest.raises(ValueError, match=r"a\.onnx: not a sound ONNX file: it has no nodes"):
        read_onnx(path)
    with pytest.raises(OSError):
        read_onnx(tmp_path / "none.onnx")


def test_damaged_files(tmp_path):
    path = write(tmp_path / "a.onnx", tensor(raw=True), tensor("b"), dilations=[2])
    content, rng, read = path.read_bytes(), random.Random(0), 0
    for _ in range(3000):
        damaged = bytearray(content)
        for _ in range(rng.choice([1, 1, 3])):
            at = rng.randrange(len(damaged))
            if rng.random() < 0.5:
                damaged[at] = rng.randrange(256)
            elif rng.random() < 0.5:
                del damaged[at : at + rng.randrange(1, 9)]
            else:
                damaged[at:at] = damaged[at : at + rng.randrange(1, 30)]
        path.write_bytes(damaged)
        try:
            file = read_onnx(path)
            for name in file.tensors:
                assert file.get_tensor(name).numel() <= len(damaged)
            read += 1
        except ValueError as error:
            assert str(error).startswith(str(path))
    assert 0 < read < 3000


def test_without_the_package_it_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError, match="this needs the package onnx: pip install onnx"):
        read_onnx(tmp_path / "a.onnx")
