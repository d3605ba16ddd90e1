"""Bounds checking for Triton's interpreter, which reads past tensors without complaint."""

import contextlib
from collections.abc import Iterator

import numpy as np
import torch


@contextlib.contextmanager
def checked_interpreter() -> Iterator[None]:
    """Within the block a kernel that touches memory outside its tensor arguments raises."""
    from triton.runtime import interpreter

    ranges: list[tuple[int, int]] = []
    executor, builder = interpreter.GridExecutor, interpreter.InterpreterBuilder
    call, load, store = executor.__call__, builder.create_masked_load, builder.create_masked_store

    def checked_call(self, *args, **kwargs):
        ranges.clear()
        values = [*args, *kwargs.values()]
        for value in values:  # a table of addresses names the tensors that they are of
            values.extend(getattr(value, "points_to", ()))
            if isinstance(value, torch.Tensor) and value.numel():
                extent = sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True))
                ranges.append((value.data_ptr(), value.data_ptr() + (extent + 1) * value.itemsize))
        return call(self, *args, **kwargs)

    def check(pointers, mask, what: str) -> None:
        live = np.asarray(pointers.data)[np.asarray(mask.data).astype(bool)].astype(np.int64)
        inside = np.zeros(live.shape, bool)
        for low, high in ranges:
            inside |= (live >= low) & (live < high)
        if not inside.all():
            raise IndexError(f"kernel {what} outside its tensors: {(~inside).sum()} elements")

    def checked_load(self, ptrs, mask, *args, **kwargs):
        check(ptrs, mask, "loads")
        return load(self, ptrs, mask, *args, **kwargs)

    def checked_store(self, ptrs, value, mask, *args, **kwargs):
        check(ptrs, mask, "stores")
        return store(self, ptrs, value, mask, *args, **kwargs)

    executor.__call__ = checked_call
    builder.create_masked_load, builder.create_masked_store = checked_load, checked_store
    try:
        yield
    finally:
        executor.__call__ = call
        builder.create_masked_load, builder.create_masked_store = load, store
