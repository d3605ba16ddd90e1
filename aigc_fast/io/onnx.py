"""Reading the weights of an ONNX file, and which nodes use them; not trusted, and never run.

The package onnx parses the file (protobuf). What it leaves open is checked here: a tensor is
looked at when it is asked for, and has as many values as its shape says or is refused. Data in
other files is refused: their names would come from this one.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

#: by the numbers of data types in TensorProto
_DTYPES: dict[int, np.dtype[Any]] = {
    1: np.dtype("<f4"),
    10: np.dtype("<f2"),
    11: np.dtype("<f8"),
}


@dataclass(frozen=True)
class OnnxNode:
    """One operation: what it reads and writes, by name, and its numeric attributes."""

    kind: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, int | float | tuple[int, ...]]


@dataclass(frozen=True)
class OnnxFile:
    """Attributes:
    inputs: names of what the graph is given.
    nodes: in the order of the file.
    tensors: name -> the initialiser, as the package onnx has it.
    """

    path: str
    inputs: tuple[str, ...]
    nodes: tuple[OnnxNode, ...]
    tensors: dict[str, Any]

    def shape(self, name: str) -> tuple[int, ...]:
        """What the file says the tensor's shape is; `get_tensor` holds its data against it."""
        if name not in self.tensors:
            raise ValueError(f"{self.path}: tensor {name!r} is missing")
        return tuple(self.tensors[name].dims)

    def get_tensor(self, name: str) -> torch.Tensor:
        """A copy of a tensor of float32, float64 or float16; ValueError names one that is missing
        or unsound."""
        shape = self.shape(name)
        tensor = self.tensors[name]
        if tensor.data_location or tensor.external_data:
            raise ValueError(f"{self.path}: tensor {name!r} has its data in another file")
        if (dtype := _DTYPES.get(tensor.data_type)) is None:
            kinds = "float32, float16 or float64"
            raise ValueError(
                f"{self.path}: tensor {name!r} must be {kinds}, got type {tensor.data_type}"
            )
        if tensor.HasField("raw_data"):
            data = tensor.raw_data
        elif tensor.data_type == 1:
            data = np.asarray(tensor.float_data, "<f4").tobytes()
        elif tensor.data_type == 11:
            data = np.asarray(tensor.double_data, "<f8").tobytes()
        else:  # float16 as the bits of integers
            data = (np.asarray(tensor.int32_data, "<i4") & 0xFFFF).astype("<u2").tobytes()
        if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != len(data):
            raise ValueError(
                f"{self.path}: tensor {name!r} of shape {shape} must have "
                f"{math.prod(shape) * dtype.itemsize} bytes, got {len(data)}"
            )
        return torch.from_numpy(np.frombuffer(data, dtype).reshape(shape).copy())


def read_onnx(path: str | os.PathLike[str]) -> OnnxFile:
    """Reads the initialisers of an ONNX file's graph, and its nodes without what is nested in them.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is unsound; the message names it and the fault.
        ImportError: the package `onnx` is not installed.
    """
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError as error:
        raise ImportError("this needs the package onnx: pip install onnx") from error
    content = Path(path).read_bytes()
    try:
        graph = onnx.ModelProto.FromString(content).graph
    except DecodeError as error:
        raise ValueError(f"{path}: not a sound ONNX file: {error}") from None
    tensors: dict[str, Any] = {}
    for tensor in graph.initializer:
        if tensor.name in tensors:
            raise ValueError(f"{path}: there are two tensors {tensor.name!r}")
        tensors[tensor.name] = tensor
    nodes = tuple(
        OnnxNode(node.op_type, node.name, tuple(node.input), tuple(node.output), _numbers(node))
        for node in graph.node
    )
    inputs = tuple(value.name for value in graph.input)
    if not nodes:
        raise ValueError(f"{path}: not a sound ONNX file: it has no nodes")
    found = {*tensors, *inputs}
    for node in nodes:
        found |= {node.kind, node.name, *node.inputs, *node.outputs, *node.attributes}
    for text in found:
        if not isinstance(text, str):  # what is no UTF-8, protobuf leaves as bytes
            raise ValueError(f"{path}: not a sound ONNX file: the name {text!r} is not UTF-8")
    return OnnxFile(str(path), inputs, nodes, tensors)


def _numbers(node: Any) -> dict[str, int | float | tuple[int, ...]]:
    found: dict[str, int | float | tuple[int, ...]] = {}
    for attribute in node.attribute:
        if attribute.type == 1:  # AttributeProto's numbers of types: FLOAT, INT, INTS
            found[attribute.name] = attribute.f
        elif attribute.type == 2:
            found[attribute.name] = attribute.i
        elif attribute.type == 7:
            found[attribute.name] = tuple(attribute.ints)
    return found
