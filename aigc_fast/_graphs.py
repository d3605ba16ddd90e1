"""A function of tensors, recorded once for each shape of its inputs and then replayed."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

Function = Callable[..., tuple[Tensor, ...]]


def check_graph(cuda_graph: bool, device: torch.device) -> None:
    """ValueError where a graph is asked for on a device that records none."""
    if cuda_graph and device.type not in RECORDERS:
        raise ValueError(f"cuda_graph must be False for a model on {device}, got True")


class Replay:
    """Calls `function(*inputs)`, which returns a tuple of tensors, as a CUDA graph.

    The first call with inputs of certain shapes and dtypes runs the function as it is, so that what
    is made on first use is made; the second records it. From then on a call copies its inputs to
    where the recorded kernels read them, and replays these. So what the function does to a model,
    an optimizer or a cache is done once a call. An input that is no tensor is part of what is
    recorded: there is a graph for each of its values.

    The function must take from the host nothing that changes from call to call but its inputs,
    must not wait for the device, and must draw random numbers from torch's default generator or
    from `generators`, which are of the device. All memory that it reads is kept with the graph.

    That the library's own loops are such functions is proved on the CPU, where the tests replay a
    tape of the operators they call (tests/tape.py). The recording by CUDA, `CUDARecorder`, has not
    run on a device yet.

    Args:
        device: where the function works. Inputs on the host are copied there, without waiting.

    Raises:
        RuntimeError: from the second call, where the device cannot record the function.
    """

    def __init__(
        self,
        function: Function,
        device: torch.device,
        generators: Iterable[torch.Generator] = (),
    ) -> None:
        self._function, self._device = function, device
        self._recorder = RECORDERS[device.type](device, list(generators))
        self._warm: set[Any] = set()
        self._static: dict[Any, list[Any]] = {}
        self._recorded: dict[Any, tuple[tuple[Tensor, ...], Callable[[], None]]] = {}

    def __call__(self, *inputs: Any) -> tuple[Tensor, ...]:
        """The results: tensors of their own, which no later call changes."""
        key = tuple((t.shape, t.dtype) if isinstance(t, Tensor) else t for t in inputs)
        if key not in self._warm:
            self._warm.add(key)
            return self._recorder.warm_up(self._function, [self._on_device(t) for t in inputs])
        if key not in self._static:
            # Outside inference mode, so that a call outside of it can copy to them.
            with torch.inference_mode(False):
                self._static[key] = [
                    torch.empty_like(t, device=self._device) if isinstance(t, Tensor) else t
                    for t in inputs
                ]
        static = self._static[key]
        _copy(inputs, static)
        if key not in self._recorded:
            self._recorded[key] = self._recorder.record(self._function, static)
        results, replay = self._recorded[key]
        replay()
        return tuple(t.clone() for t in results)

    def _on_device(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(self._device, non_blocking=True)
        return value


@torch.no_grad()
def _copy(inputs: Sequence[Any], static: Sequence[Any]) -> None:
    for given, kept in zip(inputs, static, strict=True):
        if isinstance(given, Tensor):
            kept.copy_(given, non_blocking=True)


class CUDARecorder:
    """Records CUDA graphs. They share the memory of what they compute on the way: one runs after
    the other, and `Replay` has copied the results of one before the next."""

    def __init__(self, device: torch.device, generators: Sequence[torch.Generator]) -> None:
        self._device, self._generators = device, generators
        with torch.cuda.device(device):
            self._stream = torch.cuda.Stream()
            self._memory = torch.cuda.graph_pool_handle()

    def warm_up(self, function: Function, inputs: Sequence[Any]) -> tuple[Tensor, ...]:
        """Runs the function where it will be recorded: not on the default stream, to which
        autograd would then return."""
        with torch.cuda.device(self._device):
            caller = torch.cuda.current_stream()
            self._stream.wait_stream(caller)
            with torch.cuda.stream(self._stream):
                results = function(*inputs)
            caller.wait_stream(self._stream)
        return results

    def record(
        self, function: Function, inputs: Sequence[Any]
    ) -> tuple[tuple[Tensor, ...], Callable[[], None]]:
        """Where the results will stand, and what computes them."""
        graph, kept = torch.cuda.CUDAGraph(), _Kept()
        for generator in self._generators:
            graph.register_generator_state(generator)
        with torch.cuda.device(self._device):
            try:
                with torch.cuda.graph(graph, self._memory, self._stream), kept:
                    results = function(*inputs)
            except RuntimeError as error:
                raise RuntimeError(
                    "this cannot be recorded as a CUDA graph (cuda_graph=False runs it without): "
                    f"{error}"
                ) from error

        def replay() -> None:
            with torch.cuda.device(self._device):
                graph.replay()

        replay.reads = kept.memory  # type: ignore[attr-defined]
        return results, replay


class _Kept(TorchDispatchMode):
    """Keeps the memory that operators read and none of them made: a graph has only its address."""

    def __init__(self) -> None:
        super().__init__()
        self.memory: dict[int, torch.UntypedStorage] = {}
        self._made: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        results = func(*args, **kwargs or {})
        for storage in _storages((args, kwargs)):
            if storage.data_ptr() not in self._made:
                self.memory[storage.data_ptr()] = storage
        for storage in _storages(results):
            if storage.data_ptr() not in self.memory:
                self._made.add(storage.data_ptr())
        return results


def _storages(values: Any) -> Iterable[torch.UntypedStorage]:
    return (t.untyped_storage() for t in tree_iter(values) if isinstance(t, Tensor))


#: what records on a device
RECORDERS: dict[str, type] = {"cuda": CUDARecorder}
