"""Bounds checking for Triton's interpreter, which reads past tensors without complaint."""

import contextlib
from collections.abc import Iterator

import numpy as np
import torch


@contextlib.contextmanager
def checked_interpreter() -> Iterator[None]:
    """Within the block a kernel that touches memory outside its tensor arguments raises."""
    from aigc_fast.kernels import optim
    from triton.runtime import interpreter

    ranges: list[tuple[int, int]] = []
    #: where the newest table of addresses lies, and the tensors that it names
    named: dict[int, list[torch.Tensor]] = {}
    make_table = optim._Table.__init__
    executor, builder = interpreter.GridExecutor, interpreter.InterpreterBuilder
    call, load, store = executor.__call__, builder.create_masked_load, builder.create_masked_store

    def checked_call(self, *args, **kwargs):
        ranges.clear()
        values = [*args, *kwargs.values()]
        for value in values:
            if isinstance(value, torch.Tensor) and value.numel():
                values.extend(named.get(value.data_ptr(), ()))
                extent = sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True))
                ranges.append((value.data_ptr(), value.data_ptr() + (extent + 1) * value.itemsize))
        return call(self, *args, **kwargs)

    def make_known_table(self, columns) -> None:
        make_table(self, columns)
        named.clear()
        named[self.rows.data_ptr()] = [t for tensors in columns.values() for t in tensors]

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

    executor.__call__, optim._Table.__init__ = checked_call, make_known_table
    builder.create_masked_load, builder.create_masked_store = checked_load, checked_store
    try:
        yield
    finally:
        executor.__call__, optim._Table.__init__ = call, make_table
        builder.create_masked_load, builder.create_masked_store = load, store
