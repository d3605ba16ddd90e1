"""A short program of elementwise instructions in one pass, with the bits of torch's operators."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from aigc_fast.ops._autograd import wanted
from aigc_fast.ops._checks import check_tensor, name_of
from aigc_fast.ops._registry import FLOATS, define

#: The number of an instruction is its place here; s: its second operand is a scalar.
CODES = ("add", "sub", "mul", "div", "add s", "sub s", "mul s", "div s", "clamp", "to", "return")
CLAMP, TO, RETURN = map(CODES.index, ("clamp", "to", "return"))
LIMIT = 4096


def pointwise_program(
    inputs: Sequence[Tensor], program: str, scalars: Sequence[float] = ()
) -> tuple[Tensor, ...]:
    """What torch's operators give when they run one after the other, bit for bit, in one pass.

        x0, = pointwise_program([x, m], "mul v1 s0; sub v0 v2; clamp v3 s1 s2; return v4",
                                [0.8, -1.0, 1.0])  # (x - 0.8 * m).clamp(-1, 1)

    inputs:  tensors of one shape, the values v0, v1, ...; float64/32/16 or bfloat16, which may
             differ. The memory order of the first is that of the results.
    program: instructions, each with a ";" behind it; the result of each is the next value.
                 add | sub | mul | div  vI vJ     vI + vJ, ...
                 add | sub | mul | div  vI sJ     vI + sJ, ...
                 clamp  vI sJ sK                  vI, at least sJ and at most sK
                 to  vI dtype                     float64, float32, bfloat16 or float16
             At the end "return" and the values that are returned, results of instructions, each
             once.
    scalars: s0, s1, ..., as torch takes Python floats.

    The result of each instruction has the dtype that torch gives it, and is rounded to it as torch
    does: computed in fp32 where it is bfloat16 or float16. Nothing is fused, division is division.
    Where a gradient is wanted torch's operators run, and it is theirs. A program computes in
    float64, or in float32 and one dtype of 16 bits. Bytes that must move: inputs and results.

    Returns what the program returns, each of the shape of the inputs.

    Raises TypeError or ValueError for a wrong dtype, shape, device or program.
    """
    code = encoded(program)
    if wanted(*inputs):
        _check(inputs, code, scalars)
        return tuple(_reference(inputs, code, scalars))
    return tuple(run(inputs, code, scalars))


# ---- a program as numbers, one for each instruction and each result -----------------------------


def instruction(name: str, *operands: int) -> int:
    """Its number in the lowest 4 bits, and 12 for each operand: the place of a value, of a scalar
    or of a dtype in FLOATS. A text would be parsed in every call, and torch 2.13 leaks it."""
    number = CODES.index(name)
    for i, operand in enumerate(operands):
        number |= operand << (4 + 12 * i)
    return number


def _decoded(code: Sequence[int]) -> Iterator[tuple[int, int, int, int]]:
    for number in code:
        yield number & 15, number >> 4 & 4095, number >> 16 & 4095, number >> 28 & 4095


_encoded: dict[str, list[int]] = {}


def encoded(program: str) -> list[int]:
    """The program as `run` takes it; ValueError where it is none."""
    if program not in _encoded:  # Dynamo warns of functools.cache
        _encoded[program] = _encode(program)
    return _encoded[program]


def _encode(program: str) -> list[int]:
    def place(word: str, kind: str) -> int:
        if word[:1] != kind or not word[1:].isdecimal() or int(word[1:]) >= LIMIT:
            raise ValueError(f"program has {word!r} in place of {kind}0, {kind}1, ...: {program!r}")
        return int(word[1:])

    *lines, last = (line.split() for line in program.split(";"))
    if last[:1] != ["return"] or len(last) == 1:
        raise ValueError(f"program must end with what it returns: {program!r}")
    code = []
    for line in lines:
        name, *operands = line or [""]
        if name not in CODES[:RETURN] or len(operands) != (3 if name == "clamp" else 2):
            raise ValueError(f"program has no instruction {' '.join(line)!r}: {program!r}")
        places = [place(operands[0], "v")]
        if name == "to":
            if operands[1] not in map(name_of, FLOATS):
                raise ValueError(f"program has no dtype {operands[1]!r}: {program!r}")
            places.append(FLOATS.index(getattr(torch, operands[1])))
        elif name == "clamp" or operands[1][0] == "s":
            places += [place(word, "s") for word in operands[1:]]
            name = name if name == "clamp" else f"{name} s"
        else:
            places.append(place(operands[1], "v"))
        code.append(instruction(name, *places))
    return code + [instruction("return", place(word, "v")) for word in last[1:]]


def _reference(inputs: Sequence[Tensor], code: Sequence[int], scalars: Sequence[float]) -> list:
    values, order = list(inputs), torch.empty_like(inputs[0])
    results = []
    for kind, a, b, c in _decoded(code):
        x: Any = values[a]
        if kind == RETURN:
            same = x.stride() == order.stride()
            results.append(x if same else torch.empty_like(order, dtype=x.dtype).copy_(x))
        elif kind == TO:
            values.append(x.to(FLOATS[b], copy=True))
        elif kind == CLAMP:
            values.append(x.clamp(scalars[b], scalars[c]))
        else:
            second = values[b] if kind < 4 else scalars[b]
            values.append(getattr(torch, CODES[kind % 4])(x, second))
    return results


def _check(inputs: Sequence[Tensor], code: Sequence[int], scalars: Sequence[float]) -> None:
    if not inputs:
        raise ValueError("inputs must not be empty")
    for i, x in enumerate(inputs):
        check_tensor(f"inputs[{i}]", x, shape=inputs[0].shape)
        if x.device != inputs[0].device:
            raise ValueError(f"inputs must be on one device, got {inputs[0].device} and {x.device}")
    dtypes, returned = [x.dtype for x in inputs], []

    def require(place: int, kind: str, count: int) -> None:
        if place >= count:
            raise ValueError(f"program names {kind}{place}, which is not there")

    for kind, a, b, c in _decoded(code):
        require(a, "v", len(dtypes))
        if kind == RETURN:
            returned.append(a)
            continue
        dtype = FLOATS[b] if kind == TO else dtypes[a]
        if kind < 4:
            require(b, "v", len(dtypes))
            dtype = torch.promote_types(dtype, dtypes[b])
        elif kind != TO:
            require(max(b, c), "s", len(scalars))
        if kind == CLAMP and any(scalars[i] != scalars[i] for i in (b, c)):
            raise ValueError(f"scalars of clamp must not be NaN, got {scalars[b]} and {scalars[c]}")
        dtypes.append(dtype)
    if min(returned) < len(inputs) or len(set(returned)) < len(returned):
        raise ValueError("program must return results of instructions, each once")
    kinds = {dtype for dtype in dtypes if dtype != torch.float32}
    if len(kinds) > 1 or (torch.float64 in kinds and torch.float32 in dtypes):
        names = ", ".join(name_of(d) for d in FLOATS if d in dtypes)
        raise TypeError(
            f"program must compute in float64, or in float32 and one dtype of 16 bits, got {names}"
        )


run = define(
    "pointwise_program(Tensor[] inputs, int[] program, float[] scalars) -> Tensor[]",
    _reference,
    _check,
    stem=None,
)
