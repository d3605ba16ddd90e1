"""Replacing parts of a stock model, reversibly.

A patch is a list of assignments to attributes, kept on the model with what stood there before. Most
assign to `__class__`: the module stays the very object that it was, with its parameters, buffers,
hooks and children, and its class becomes a subclass of its own class with another `forward`. So
state dicts, optimizers, isinstance, adapters and hooks notice nothing.
"""

import functools
import importlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from aigc_fast import ops
from aigc_fast._devices import torch_multiplies
from aigc_fast.integrations import _packed
from aigc_fast.nn._replacing import (
    Assignment,
    PatchReport,
    Unfit,
    carry_out,
    fast_class,
    runs_as_written,
    take_back,
)
from aigc_fast.nn.conv2d import convolve
from aigc_fast.nn.rms_norm import eps_or_default
from aigc_fast.ops._unfolded import may_serve
from aigc_fast.ops._winograd import are_faster, in_torch_order, kind_of
from aigc_fast.ops.linear import DTYPES, lags

#: package of a stock class -> the module that says what takes the place of its classes (`rows_of`),
#: and of which models torch's own layers may be replaced, whatever else is in them (`MODELS`)
INTEGRATIONS = {
    "diffusers": "aigc_fast.integrations.diffusers_models",
    "transformers": "aigc_fast.integrations.transformers",
}
_RECORD = "_aigc_fast_patch"
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


class Replacement(nn.Module):
    """Base of the rows of a table: goes in front of the stock class, whose forward is super()'s.

    A forward that a row brings has the stock one's names of arguments, and does not run within
    torch.compile: the compiler gets the stock one.
    """

    #: the operators that it brings, for the report
    uses = ""
    #: children whose work it does itself
    absorbs: tuple[str, ...] = ()
    #: whether its forward looks for hooks on them in each call
    minds_hooks = False
    #: the argument of `patch` that asks for it
    opt_in = ""
    #: what takes its place where the weights of a model stay as they are
    frozen: "type[Replacement] | None" = None

    if TYPE_CHECKING:  # the attributes of the stock class

        def __getattr__(self, name: str) -> Any: ...

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "forward" in vars(cls):
            cls.forward = _unless_compiling(cls.forward)

    @classmethod
    def assignments(cls, module: nn.Module) -> Iterable[Assignment]:
        """What makes `module` ours; Unfit where it cannot be. Reads, and changes nothing."""
        for name in () if cls.minds_hooks else cls.absorbs:
            check_as_written(module, name)
        fast = fast_class(cls, type(module))  # type: ignore[arg-type]  # classes do hash
        yield Assignment(module, "__class__", fast)


def _unless_compiling(forward: Callable) -> Callable:
    @functools.wraps(forward)
    def either(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return super(Replacement, self).forward(*args, **kwargs)
        return forward(self, *args, **kwargs)

    return either


class Linear(Replacement):
    """Of any known model, where torch's own products lag behind."""

    uses = "linear"

    @classmethod
    def assignments(cls, module: nn.Module) -> Iterable[Assignment]:
        if not any(map(lags, DTYPES)):
            raise Unfit("torch's own products are as fast on this machine")
        yield from super().assignments(module)

    def forward(self, input: Tensor) -> Tensor:
        return ops.linear(input, self.weight, self.bias)


class Conv2d(Replacement):
    """Of any known model, where ours has fewer products."""

    uses = "conv2d"

    @classmethod
    def assignments(cls, module: nn.Module) -> Iterable[Assignment]:
        conv: Any = module
        how = conv.stride, conv.padding, conv.dilation, conv.groups
        if not are_faster():
            raise Unfit("torch's own convolution is as fast on this machine")
        # Of any dtype: the model may be moved to another.
        faster = (
            kind_of(conv.weight, *how)
            or may_serve(conv.weight, conv.groups)
            or not all(map(torch_multiplies, DTYPES))
        )
        if conv.padding_mode != "zeros" or not faster:
            raise Unfit("torch's own convolution is as fast")
        yield from super().assignments(module)

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight  # once: a parametrization computes it anew each time
        y = convolve(self, input, weight, self.bias)  # type: ignore[arg-type]
        return in_torch_order(y, input, weight)


class Frozen(Replacement):
    """Keeps a packed copy of its weight in `_packed`, until it is moved: the copy would stay."""

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        # None of one made since by type(module)(...), as PEFT makes an adapter's convolutions.
        if packed := vars(self).get("_packed"):
            packed.forget()
        return super()._apply(*args, **kwargs)


class FrozenConv2d(Frozen, Conv2d):
    """The same, with a second copy of its weight, packed, where that saves much of a call."""

    uses = "conv2d, its weight packed once"

    @classmethod
    def assignments(cls, module: nn.Module) -> Iterable[Assignment]:
        conv: Any = module
        if conv.padding_mode != "zeros" or isinstance(conv.padding, str) or conv.groups > 1:
            raise Unfit("its weight is not packed")
        yield from Replacement.assignments.__func__(cls, module)  # type: ignore[attr-defined]
        yield Assignment(module, "_packed", _packed.Packed(_packed.pack_convolution))

    def forward(self, input: Tensor) -> Tensor:
        packed = vars(self).get("_packed")
        y = None if packed is None else _packed.convolve(self, packed, input)
        return super().forward(input) if y is None else y


Conv2d.frozen = FrozenConv2d


class RMSNorm(Replacement):
    """Of any known model: torch's takes several passes on a CPU. Its LayerNorm takes one."""

    uses = "rms_norm"

    @classmethod
    def assignments(cls, module: nn.Module) -> Iterable[Assignment]:
        norm: Any = module
        if norm.weight is None or norm.weight.dim() != 1:
            raise Unfit("it has no weight, or is over more than one dimension")
        yield from super().assignments(module)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if not x.is_cpu or weight.dtype is not x.dtype or torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        return ops.rms_norm(x, weight, eps_or_default(self.eps, x))


#: what takes the place of torch's own layers in a model that is known
_LAYERS: dict[type, type[Replacement]] = {
    nn.Linear: Linear,
    nn.Conv2d: Conv2d,
    nn.RMSNorm: RMSNorm,
}


def patch(model: Any, *, fuse_loss: bool = False, freeze: bool = False) -> PatchReport:
    """Makes the parts of a stock model that this library knows call its operators, in place.

    model: a model of transformers (all of Llama, Mistral, Qwen2, Qwen3, Phi-3, SmolLM3, Granite,
           OLMo-2, Gemma-2, Gemma-3; of any other linear layers, norms and gates that are the same
           code, and attention by transformers' interface; of speech VITS, DAC, SpeechT5's and
           FastSpeech2Conformer's HiFi-GAN) or of diffusers (UNet2D, UNet2DCondition,
           AutoencoderKL, DiT, SD3, Flux, Wan; of its other transformers the layers that are
           known), any module that has one inside, such as PEFT's, or a pipeline of diffusers, all
           of whose models are patched. Any other model stays as it is.
    fuse_loss: whether a language model of transformers, in training and called with labels,
               computes its loss by `linear_cross_entropy`. Its output then has the loss, and None
               for the logits, which are never all in memory. In evaluation, and where the model
               has another loss, nothing changes.
    freeze:    a promise that the weights of convolutions stay as they are. On CPUs, where no
               gradient is wanted and a call has up to 1,024 pixels (64 where Winograd's algorithm
               serves), a second copy is then kept in oneDNN's packed format, until the model is
               moved. A weight that was loaded or changed in place is packed again; a write to
               `weight.data` is noticed only if it changes one of the 64 to 127 elements that each
               call compares.

    Modules, parameters, the names in state dicts and hooks stay. Outputs agree to rounding, in
    training too. Patching again changes nothing: `unpatch` first to choose other arguments. Within
    torch.compile the stock code runs, which the compiler fuses by itself. `unpatch` takes all of it
    back; a deep copy or pickle of a patched model is patched too. A module that would do the work
    of one with hooks (an activation inside a gated MLP, the norms of a residual block) is kept;
    hooks that come there later do not run while the model is patched. Of language models a call
    may ask for attention weights (`output_attentions=True`), not the config, which transformers
    allows to eager models alone. The convolutions of speech models are replaced on CPUs, where no
    gradient is wanted and they have no weight norm, hook or adapter.

    Dtype and memory order of results stay as well. The library's convolutions write channels_last,
    and copy the result where the model has another order: so move the model to channels_last
    first. On CPUs with bfloat16 instructions most of a convolutional model is faster still in
    bfloat16, by torch's own convolutions, which also prefer channels_last:

    >>> aigc_fast.patch(unet.to(torch.bfloat16).to(memory_format=torch.channels_last))

    Returns what was replaced, and what was not and why. Raises TypeError if `model` is neither a
    module nor a pipeline.
    """
    replaced: Counter[tuple[str, str]] = Counter()
    kept: Counter[tuple[str, str]] = Counter()
    asked = {name for name, wish in (("fuse_loss", fuse_loss), ("freeze", freeze)) if wish}
    for part in _models(model):
        _patch(part, asked, replaced, kept)
    return PatchReport.of(stock_class(model), replaced, kept)


def _patch(
    model: nn.Module,
    asked: set[str],
    replaced: Counter[tuple[str, str]],
    kept: Counter[tuple[str, str]],
) -> None:
    changes = []
    absorbed: set[nn.Module] = set()
    modules = list(model.modules())
    known = any(isinstance(module, Replacement) or _is_known(type(module)) for module in modules)
    for module in modules:
        if isinstance(module, Replacement):
            replaced[stock_class(module).__name__, module.uses] += 1
            absorbed.update(_inside(module, module.absorbs))
            continue
        rows = [] if module in absorbed else _rows(type(module))
        if known and module not in absorbed and type(module) in _LAYERS:
            rows.append(_LAYERS[type(module)])
        name = type(module).__name__
        try:
            row, planned = _fitting(module, rows, asked)
        except Unfit as reason:
            if not isinstance(module, _CONTAINERS) and module not in absorbed:
                kept[name, str(reason)] += 1
            continue
        changes += carry_out(planned)
        replaced[name, row.uses] += 1
        absorbed.update(_inside(module, row.absorbs))
    if changes:
        model.__dict__.setdefault(_RECORD, []).extend(changes)


def _fitting(
    module: nn.Module, rows: list[type[Replacement]], asked: set[str]
) -> tuple[type[Replacement], list[Assignment]]:
    """The first of the rows that fits, with its assignments; Unfit with the reason of the last."""
    unfit = Unfit("no replacement is known")
    for row in rows:
        if "freeze" in asked:
            row = row.frozen or row
        try:
            if row.opt_in and row.opt_in not in asked:
                raise Unfit(f"patch({row.opt_in}=True) replaces it")
            if "forward" in module.__dict__:
                raise Unfit("its forward was replaced on the object")
            return row, list(row.assignments(module))
        except Unfit as reason:
            unfit = reason
    raise unfit


def _inside(module: nn.Module, names: Iterable[str]) -> Iterator[nn.Module]:
    """The children of these names, with all that they hold."""
    for child in (getattr(module, name) for name in names):
        if child is not None:  # the norm of a branch that a block has not
            yield from child.modules()


def unpatch(model: Any) -> None:
    """Takes back what `patch` did to `model` or to a module inside it; else does nothing.

    Every attribute holds the very object that it held before, unless someone assigned to it since.
    TypeError if `model` is neither a module nor a pipeline.
    """
    for part in _models(model):
        if not take_back(part, _RECORD):
            continue
        for module in part.modules():
            # Made since by type(module)(...). A class that somebody derived from ours, as
            # parametrizations do, is theirs.
            if (stock := stock_class(module)) in type(module).__bases__:
                module.__class__ = stock


def _models(model: Any) -> list[nn.Module]:
    """The module itself, or those of a pipeline."""
    if isinstance(model, nn.Module):
        return [model]
    components = getattr(model, "components", None)
    if not isinstance(components, dict):
        raise TypeError(
            f"model must be a torch.nn.Module or a pipeline of them, got {type(model).__name__}"
        )
    return [part for part in components.values() if isinstance(part, nn.Module)]


def _integration(cls: type) -> Any:
    name = INTEGRATIONS.get(cls.__module__.partition(".")[0])
    return name and importlib.import_module(name)


def _rows(cls: type) -> list[type[Replacement]]:
    """What may take the place of a class, the best first."""
    integration = _integration(cls)
    return list(integration.rows_of(cls)) if integration else []


def _is_known(cls: type) -> bool:
    integration = _integration(cls)
    return bool(integration) and (issubclass(cls, integration.MODELS) or bool(_rows(cls)))


def stock_class(module: Any) -> type:
    return next(c for c in type(module).__mro__ if not issubclass(c, Replacement))


def check_as_written(module: nn.Module, name: str) -> None:
    """Unfit where calling the child of this name does more than its class says: whoever does its
    work would leave that out."""
    child = getattr(module, name)
    if child is not None and not runs_as_written(child):
        raise Unfit(f"its {name} has hooks or a forward of its own")


def become(replacement: type[Replacement], child: nn.Module) -> Assignment:
    """What makes `child` ours where its parent decides it, whose own class need not change."""
    if "forward" in child.__dict__:
        raise Unfit(f"the forward of its {stock_class(child).__name__} was replaced on the object")
    fast = fast_class(replacement, stock_class(child))  # type: ignore[arg-type]  # classes do hash
    return Assignment(child, "__class__", fast)
