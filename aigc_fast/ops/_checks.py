"""The words in which arguments are refused: shapes, dtypes, devices and options, never data."""

from collections.abc import Collection, Iterable, Sequence

import torch
from torch._subclasses.fake_tensor import FakeTensor

from aigc_fast.ops._autograd import transforming
from aigc_fast.ops._registry import FLOATS

_PLAIN = (torch.Tensor, torch.nn.Parameter, FakeTensor)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def has_data(x: torch.Tensor) -> bool:
    """Whether there are numbers to look at: no graph is traced, no shape propagated."""
    traced = torch.compiler.is_compiling() or transforming()
    return not (traced or isinstance(x, FakeTensor) or x.is_meta)


def can_look(x: torch.Tensor) -> bool:
    """Whether looking costs nothing, as it would on a GPU."""
    return x.device.type == "cpu" and has_data(x)


def plain_on_cpu(tensors: Iterable[torch.Tensor | None], dtypes: Collection[torch.dtype]) -> bool:
    """Whether all are torch's own tensors of one of these dtypes in a CPU's memory: subclasses
    (sharded, quantised) know torch's functions, and not our operators."""
    return all(
        type(t) in _PLAIN
        and t.dtype in dtypes
        and t.device.type == "cpu"
        and t.layout is torch.strided
        for t in tensors
        if t is not None
    )


def check_tensor(
    name: str,
    value: object,
    *,
    dtypes: Sequence[torch.dtype] = FLOATS,
    like: tuple[str, torch.Tensor] | None = None,
    shape: Sequence[int] | None = None,
    ndim: int | None = None,
    min_ndim: int = 0,
) -> None:
    """TypeError or ValueError unless `value` is a strided tensor of that description.

    like: (name, tensor) whose dtype and device `value` must have, in place of `dtypes`.
    """
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if like is not None and value.dtype != like[1].dtype:
        raise TypeError(
            f"{name} must have the dtype of {like[0]} ({name_of(like[1].dtype)}), "
            f"got {name_of(value.dtype)}"
        )
    if like is None and value.dtype not in dtypes:
        names = ", ".join(name_of(d) for d in dtypes)
        raise TypeError(f"{name} must be {names}, got {name_of(value.dtype)}")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a strided tensor, got {value.layout}")
    if like is not None:
        check_device(name, value, like)
    if ndim is not None and value.dim() != ndim:
        raise ValueError(f"{name} must have {ndim} dimensions, got shape {tuple(value.shape)}")
    if value.dim() < min_ndim:
        raise ValueError(
            f"{name} must have at least {min_ndim} dimensions, got shape {tuple(value.shape)}"
        )
    if shape is not None and tuple(value.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(value.shape)}")


def check_class(name: str, value: object, wanted: type) -> None:
    """TypeError unless `value` is of that class."""
    if not isinstance(value, wanted):
        what = "a class" if isinstance(value, type) else type(value).__name__
        raise TypeError(f"{name} must be a {wanted.__name__}, got {what}")


def check_choice(name: str, value: object, choices: Collection[object]) -> None:
    """ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, got {value!r}")


def check_positive(**sizes: int) -> None:
    """ValueError that names the first size below 1."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")


def check_device(name: str, value: torch.Tensor | None, like: tuple[str, torch.Tensor]) -> None:
    """ValueError unless `value` is None or on the device of `like`, (name, tensor)."""
    if value is not None and value.device != like[1].device:
        raise ValueError(
            f"{name} must be on the device of {like[0]} ({like[1].device}), got {value.device}"
        )
