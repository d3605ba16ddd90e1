"""How an operator gets its implementations, and which of them a call takes.

An `Op` is one schema with up to four implementations:

    reference   plain PyTorch: the definition, the fall-back, and the fake (meta) kernel
    cpu         C++, registered by the CPU library under the dispatch key CPU
    triton      the function of the same name in aigc_fast/kernels/<stem>.py
    cuda        CUDA C++, registered by the CUDA library in the namespace aigc_fast_cuda

torch's dispatcher chooses by device; on CUDA devices `Op._on_cuda` then prefers CUDA C++ where it
supports the call, and Triton otherwise.
"""

import contextlib
import importlib
import importlib.util
import os
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.compiler import is_dynamo_compiling

from aigc_fast import _libraries
from aigc_fast.ops._autograd import transforming
from aigc_fast.ops._batched import one_by_one

BACKENDS = ("reference", "cpu", "triton", "cuda")
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

_library = torch.library.Library("aigc_fast", "DEF")
# CUDA C++ has a namespace of its own, so that it and Triton can both be called.
_cuda_library = torch.library.Library("aigc_fast_cuda", "DEF")

OPS: dict[str, "Op"] = {}
# What takes over calls: of all threads, in the blocks of `backend` that are open, with their names,
# the newest last; of one thread, by its identifier, while it is in `explain`. `_intercept` is there
# while any is.
_forced: list[tuple[str | None, Callable[["Op", tuple], Any]]] = []
_explaining: dict[int, Callable[["Op", tuple], Any]] = {}
_intercept: Callable[["Op", tuple], Any] | None = None
_has_triton = importlib.util.find_spec("triton") is not None


class FallbackError(RuntimeError):
    """AIGC_FAST_STRICT=1 and no compiled kernel supports the call."""


def _translated(error: RuntimeError) -> Exception:
    """The kernel's refusal as the exception it names; any other error as it is."""
    text = str(error)
    for kind in (ValueError, TypeError):
        mark = f"{kind.__name__}: "
        if mark in text:
            return kind(text.split(mark, 1)[1].splitlines()[0])
    return error


class Op:
    """One operator; `define` makes it.

    schema:    torch schema without namespace, e.g. "rms_norm(Tensor x, float eps) -> Tensor"
    reference: the same maths in plain PyTorch
    check:     check(*args) raises ValueError or TypeError for arguments the operator refuses; it
               reads shapes, dtypes and devices, never data
    stem:      the file in kernels/ that holds the Triton launcher; None if there is none
    cuda:      cuda(*args) says whether the CUDA C++ kernel supports the call; None if there is none
    """

    def __init__(
        self,
        schema: str,
        reference: Callable[..., Any],
        check: Callable[..., None],
        *,
        stem: str | None,
        cuda: Callable[..., bool] | None = None,
        dtypes: tuple[torch.dtype, ...] = FLOATS,
    ) -> None:
        self.name = schema.split("(", 1)[0]
        self.reference, self.check, self.stem, self.dtypes = reference, check, stem, dtypes
        self._cuda_supports = cuda
        self._triton: Callable[..., Any] | None = None
        _library.define(schema)
        _library.impl(self.name, self._fall_back, "CompositeExplicitAutograd")
        _library.impl(self.name, self._on_cuda, "CUDA")
        # The functions of ops/ enter autograd themselves; torch's default kernel costs 0.1 us.
        _library.impl(self.name, torch.library.fallthrough_kernel, "Autograd")
        self.overload = getattr(torch.ops.aigc_fast, self.name).default
        if "Tensor[]" in schema:
            _library.impl(self.name, partial(one_by_one, self.overload), "Batched")
        if cuda is not None:
            _cuda_library.define(schema)
        OPS[self.name] = self

    def choose(self, *args: Any) -> tuple[str, str]:
        """(implementation, why) of a call with these arguments, nothing being forced."""
        tensor = _first_tensor(args)
        device, dtype = tensor.device.type, tensor.dtype
        if dtype not in self.dtypes:
            return "reference", f"no compiled kernel takes {dtype}"
        if device == "cpu":
            if "cpu" in _libraries.loaded and self.has("cpu"):
                return "cpu", _libraries.loaded["cpu"].stem
            return "reference", _libraries.missing.get("cpu", "it has no C++ kernel")
        if device == "cuda":
            if self.has("cuda") and self._cuda_supports(*args):  # type: ignore[misc]
                return "cuda", "the CUDA C++ kernel supports this call"
            if self.has("triton") and dtype != torch.float64:
                return "triton", "the Triton kernel supports this call"
            if dtype == torch.float64:
                return "reference", "the GPU kernels take no float64"
            return "reference", "triton is not installed" if self.stem else "it has no GPU kernel"
        return "reference", f"no compiled kernel runs on {device}"

    def has(self, backend: str) -> bool:
        """Whether this machine has that implementation."""
        if backend == "triton":
            return self.stem is not None and _has_triton
        if backend == "cpu":
            return torch._C._dispatch_has_kernel_for_dispatch_key(f"aigc_fast::{self.name}", "CPU")
        if backend == "cuda":
            return self._cuda_supports is not None and "cuda" in _libraries.loaded
        return True

    def call(self, backend: str, *args: Any) -> Any:
        """Runs this very implementation, or raises RuntimeError where it cannot."""
        self.check(*args)
        self.check_forced(backend, args)
        if backend == "reference":
            return self.reference(*args)
        if backend == "triton":
            return self._call_triton(*args)
        try:
            return self._call_cuda(*args) if backend == "cuda" else self.overload(*args)
        except RuntimeError as error:
            raise _translated(error) from None

    def check_forced(self, backend: str, args: tuple) -> None:
        """RuntimeError where this implementation cannot run."""
        if not self.has(backend):
            raise RuntimeError(f"{self.name} has no {backend} implementation here")
        if backend != "reference" and transforming():
            raise RuntimeError(
                f"{self.name}: only the reference serves torch.func and forward-mode derivatives"
            )
        _check_place(self.name, backend, args)

    def _call_cuda(self, *args: Any) -> Any:
        return getattr(torch.ops.aigc_fast_cuda, self.name).default(*args)

    def _call_triton(self, *args: Any) -> Any:
        if self._triton is None:
            module = importlib.import_module(f"aigc_fast.kernels.{self.stem}")
            self._triton = getattr(module, self.name)
        return self._triton(*args)

    def _on_cuda(self, *args: Any) -> Any:
        """The implementation under the dispatch key CUDA."""
        self.check(*args)  # before any look that takes them for right, at their devices too
        backend, _ = self.choose(*args)
        with torch.cuda.device(_first_tensor(args).device):
            return {
                "cuda": self._call_cuda,
                "triton": self._call_triton,
                "reference": self._fall_back,
            }[backend](*args)

    def _fall_back(self, *args: Any) -> Any:
        """The implementation under every other key: reached when no kernel takes the call."""
        self.check(*args)
        tensor = _first_tensor(args)
        # Shape propagation (compile, export, meta) is no fall-back.
        if not isinstance(tensor, FakeTensor) and tensor.device.type != "meta":
            self._refuse_if_strict(self.choose(*args)[1])
        return self.reference(*args)

    def in_torch(self, *args: Any) -> Any:
        """The reference, for what differentiates or maps torch's own operators."""
        self.check(*args)
        self._refuse_if_strict("torch.func and forward-mode derivatives take torch's own operators")
        return self.reference(*args)

    def _refuse_if_strict(self, reason: str) -> None:
        if os.environ.get("AIGC_FAST_STRICT") == "1":
            raise FallbackError(
                f"{self.name} would run the reference: {reason} (AIGC_FAST_STRICT=1)"
            )


def define(
    schema: str, reference: Callable[..., Any], check: Callable[..., None], **options: Any
) -> Callable[..., Any]:
    """Makes an `Op`, whose arguments these are, and returns the function that calls it: it takes
    the best implementation that supports the call."""
    op = Op(schema, reference, check, **options)
    overload = op.overload
    # What the overload itself calls, 0.25 us sooner; a function is 0.15 us quicker than a __call__.
    entry = overload._op

    def call(*args: Any) -> Any:
        if _intercept is not None:
            return _intercept(op, args)
        run: Callable[..., Any] = entry
        if is_dynamo_compiling():  # which knows the overload alone
            run = overload
        elif transforming():
            run = op.in_torch
        try:
            return run(*args)
        except RuntimeError as error:
            # The kernels check for safety; the words come from here, off the fast path.
            op.check(*args)
            raise _translated(error) from None

    return call


def _first_tensor(args: tuple) -> torch.Tensor:
    return next(a for a in _flat(args) if isinstance(a, torch.Tensor))


def _flat(args: tuple) -> Iterator[Any]:
    """The arguments, and the members of lists among them."""
    return (b for a in args for b in (a if isinstance(a, list | tuple) else (a,)))


def _check_place(name: str, backend: str, args: tuple) -> None:
    """RuntimeError for tensors that lie where the implementation does not run."""
    device = _first_tensor(args).device.type
    if backend == "triton":
        # On the CPU, Triton's interpreter runs the kernel.
        if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            raise RuntimeError(f"{name}: triton on CPU tensors needs TRITON_INTERPRET=1")
    elif backend not in ("reference", device):
        raise RuntimeError(f"{name}: backend {backend} got tensors on {device}")


def forced() -> str | None:
    """The implementation that the newest block of `backend` asks for."""
    return _forced[-1][0] if _forced else None


def check_torch(name: str, args: tuple) -> None:
    """What `backend` means for a function that torch computes: see there."""
    if (asked := forced()) is not None and any(isinstance(a, torch.Tensor) for a in _flat(args)):
        _check_place(name, asked, args)


def _take(op: Op, args: tuple) -> Any:
    take = _explaining.get(threading.get_ident()) or (_forced[-1][1] if _forced else None)
    if take is not None:
        return take(op, args)
    op.check(*args)
    return op.overload(*args)


def _set_intercept() -> None:
    global _intercept
    _intercept = _take if _forced or _explaining else None


@contextlib.contextmanager
def _intercepting(take: Callable[[Op, tuple], Any], name: str | None = None) -> Iterator[None]:
    entry = name, take
    _forced.append(entry)
    _set_intercept()
    try:
        yield
    finally:
        _forced.remove(entry)  # blocks of several threads end in any order
        _set_intercept()


@contextlib.contextmanager
def explaining(take: Callable[[Op, tuple], Any]) -> Iterator[None]:
    """Within the block `take` gets the calls of this thread."""
    thread = threading.get_ident()
    _explaining[thread] = take
    _set_intercept()
    try:
        yield
    finally:
        _explaining.pop(thread, None)
        _set_intercept()


def backend(name: str) -> contextlib.AbstractContextManager[None]:
    """Within the block every operator of the library runs this implementation, in all threads.

    name: "reference", "cpu", "triton" or "cuda". An operator raises RuntimeError where it has no
          such implementation, or gets tensors on a device that the implementation does not run
          on. What functions of aigc_fast.ops leave to torch (all of `linear`, the convolution in
          `conv2d_resample`) torch computes in any block; they refuse such tensors just the same.

    Raises ValueError for another name.
    """
    if name not in BACKENDS:
        raise ValueError(f"name must be one of {', '.join(BACKENDS)}, got {name!r}")
    return _intercepting(lambda op, args: op.call(name, *args), name)
