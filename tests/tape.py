"""What a CUDA graph does with a function, done on the CPU.

`TapeRecorder` runs a function once and keeps the operators that it called, with the very tensors
that they were called with; replaying them is all that happens from then on, into the same memory.
Where a replay with new inputs gives what the function gives, the function takes nothing else from
the host that changes. What a graph could not hold is refused while recording: reading a value,
making a tensor of Python numbers, and random numbers of a generator that nobody registered.
"""

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from aigc_fast import _graphs

_READS = {
    getattr(Tensor, name)
    for name in ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__")
}
_WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "lift_fresh", "lift_fresh_copy"}


class NotCapturable(RuntimeError):
    """The function does what no CUDA graph can hold."""


class TapeRecorder:
    """In place of `aigc_fast._graphs.CUDARecorder`."""

    #: objects whose tensors would be on the host where the others are on a device: reading is free
    host: "tuple[object, ...]" = ()

    def __init__(self, device, generators):
        self._generators = generators

    def warm_up(self, function, inputs):
        return function(*inputs)

    def record(self, function, inputs):
        tape = _Tape(self._generators, self.host)
        with tape, _NoReads(tape):
            results = function(*inputs)
        return results, tape.replay


class _Tape(TorchDispatchMode):
    def __init__(self, generators, host):
        super().__init__()
        self._generators = [*generators, torch.default_generator]
        tensors = [t for o in host for t in vars(o).values() if isinstance(t, Tensor)]
        self._host = {t.untyped_storage().data_ptr() for t in tensors}
        self._calls = []
        self._played = True  # by recording, which a CUDA graph does not do

    def is_on_host(self, values):
        """Whether all tensors among the values, of which there are some, are the host's."""
        tensors = [t for t in tree_leaves(values) if isinstance(t, Tensor)]
        return bool(tensors) and all(t.untyped_storage().data_ptr() in self._host for t in tensors)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        on_host = self.is_on_host((args, kwargs))
        if not on_host:
            self._check(func, args, kwargs)
        # With the shapes of now: a squeeze_ changes those of its tensor, and leaves no work to do.
        given = _aliases((args, kwargs))
        result = func(*args, **kwargs)
        if torch.Tag.inplace_view not in func.tags:
            self._calls.append((func, *given, _aliases(result)))
        if on_host:
            tensors = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
            self._host.update(t.untyped_storage().data_ptr() for t in tensors)
        return result

    def _check(self, func, args, kwargs):
        if func.overloadpacket.__name__ in _WAITS:
            raise NotCapturable(f"{func} waits for the device, or copies from the host")
        for value in tree_leaves((args[1:], kwargs)):
            if isinstance(value, Tensor) and value.dtype == torch.bool and "index" in str(func):
                raise NotCapturable(f"{func} by a mask waits for the number of its elements")
            if isinstance(value, torch.Generator) and not self._is_registered(value):
                raise NotCapturable(f"{func} draws from a generator that is not registered")

    def _is_registered(self, generator):
        """The dispatcher makes a new object of it: it is known by its state."""
        state = generator.get_state()
        return any(known.get_state().equal(state) for known in self._generators)

    @torch.no_grad()
    def replay(self):
        if self._played:
            self._played = False
            return
        for func, args, kwargs, result in self._calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                # What is a view, or was written in place, stands there already.
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def _aliases(values):
    return tree_map_only(Tensor, torch.ops.aten.alias.default, values)


class _NoReads(TorchFunctionMode):
    """On the CPU these reach no dispatcher."""

    def __init__(self, tape):
        self._tape = tape

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in _READS and not self._tape.is_on_host(args):
            raise NotCapturable(f"Tensor.{func.__name__} reads a value")
        if func is F.one_hot:  # looks at the values on the CPU alone
            labels, classes = args
            return (labels[..., None] == torch.arange(classes)).long()
        return func(*args, **kwargs or {})


@contextlib.contextmanager
def tapes():
    """Within the block, CPU tensors are what CUDA tensors are to `aigc_fast._graphs`."""
    _graphs.RECORDERS["cpu"] = TapeRecorder
    try:
        yield TapeRecorder
    finally:
        del _graphs.RECORDERS["cpu"]
        TapeRecorder.host = ()
