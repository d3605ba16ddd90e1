"""Layer, norm and activation of any model as one layer of ours, reversibly."""

import copy
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import nn

from aigc_fast.nn._fused_layers import (
    BATCH_NORMS,
    CONVS,
    LAYERS,
    STOCK_ACTIVATIONS,
    TRANSPOSED,
    Absorbed,
    Fused,
    InstanceNorm,
)
from aigc_fast.nn._replacing import (
    Assignment,
    PatchReport,
    Unfit,
    carry_out,
    fast_class,
    runs_as_written,
    take_back,
)
from aigc_fast.nn._tracing import runs
from aigc_fast.nn.norm_act import Activated

_RECORD = "_aigc_fast_fused"
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


def fuse(model: nn.Module) -> PatchReport:
    """Makes layers apply the activation that follows them, in place.

    model: any module. Wherever an nn.Sequential, or another forward that torch.fx can trace, runs
           Linear, Conv or ConvTranspose (1d to 3d), or BatchNorm, InstanceNorm or GroupNorm, and
           then ReLU, LeakyReLU, Tanh, Sigmoid, ELU, SELU, Softplus, SiLU or GELU, the layer calls
           bias_act or a norm with the activation, and the activation returns what it is given. A
           dropout between them may stay there: ReLU and LeakyReLU commute with it.

    Modules, parameters, the names in state dicts and parametrizations stay; outputs and gradients
    of any order agree to rounding. What has hooks that would see another tensor, or is used in
    several places, is left alone. Where some arguments of a forward are optional, only what runs in
    the same way with and without them is fused. Apart from that, a forward is assumed to take the
    path that it takes now, and an nn.Sequential to run as a whole: one that is indexed or sliced
    between a layer and its activation returns the activation's result already. Within torch.compile
    the stock code runs. Fusing again changes nothing; `unfuse` takes all of it back.

    Returns what was replaced, and what was not and why. Raises TypeError if `model` is no module.
    """
    _check(model)
    places = Counter(child for _, _, child in _places(model))
    replaced: Counter[tuple[str, str]] = Counter()
    kept: Counter[tuple[str, str]] = Counter()
    changes, seen = [], set()
    for before, act in _in_order(model, _is_activation):
        seen.add(act)
        try:
            leader = _leader(before, act)
            if not isinstance(act, Absorbed):
                changes += carry_out(_plan(leader, act, places))
            replaced[f"{_stock(leader)}, {_stock(act)}", leader.uses] += 1
        except Unfit as reason:
            kept[_stock(act), str(reason)] += 1
    for module in model.modules():
        if module not in seen and _row(STOCK_ACTIVATIONS, module):
            why = "it stands in no nn.Sequential, and not once in a forward that torch.fx can trace"
            kept[_stock(module), why] += 1
    if changes:
        model.__dict__.setdefault(_RECORD, []).extend(changes)
    return PatchReport.of(type(model), replaced, kept)


def unfuse(model: nn.Module) -> None:
    """Takes back what `fuse` did to `model` or to a module inside it; else does nothing.

    Raises TypeError if `model` is no module.
    """
    _check(model)
    take_back(model, _RECORD)


def fold_batch_norm(model: nn.Module) -> nn.Module:
    """A copy of the model for evaluation, its batch norms folded into the layers before them.

    model: any module. Wherever an nn.Sequential inside, or another forward that torch.fx can trace,
           runs Linear, Conv or ConvTranspose and then BatchNorm with running statistics, the copy's
           layer has weight * s and (bias - mean) * s + shift, s = scale / sqrt(var + eps), and the
           norm is an nn.Identity. A Linear must get (N, features).

    What has hooks or is used in several places stays as it is. The copy is in evaluation mode, its
    parameters require no gradient, and its outputs agree with those of model.eval() to rounding.
    `fuse` may follow. Raises TypeError if `model` is no module.
    """
    _check(model)
    folded = copy.deepcopy(model)
    unfuse(folded)
    found = list(_places(folded))
    places = Counter(child for _, _, child in found)
    owners = {child: (parent, name) for parent, name, child in found}
    norms = dict.fromkeys(BATCH_NORMS, True)
    for before, norm in list(_in_order(folded, lambda m: _row(norms, m), modes=[False])):
        layer = before[-1] if before else norm  # which folds nothing
        if places[layer] == places[norm] == 1 and _folds(layer, norm):
            _fold(layer, norm)
            parent, name = owners[norm]
            parent._modules[name] = nn.Identity()
    return folded.eval().requires_grad_(False)


def _check(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


# ---- what is fused with what ----------------------------------------------------------------


def _row(table: dict[Any, Any], module: nn.Module) -> Any:
    """The table's row of a module with the forward of a stock class; None if there is none."""
    for stock, row in table.items():
        own = "forward" in module.__dict__ or type(module).forward is not stock.forward
        if isinstance(module, stock) and not own:
            return row
    return None


def _stock(module: nn.Module) -> str:
    ours = (Activated, Absorbed)
    return next(c.__name__ for c in type(module).__mro__ if not issubclass(c, ours))


def _sequences(model: nn.Module) -> Iterator[nn.Sequential]:
    for module in model.modules():
        if isinstance(module, nn.Sequential) and _row({nn.Sequential: True}, module):
            yield module


def _places(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """(parent, name, child) of all modules inside, once for each place."""
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is not None:
                yield parent, name, child


def _is_activation(module: nn.Module) -> bool:
    return isinstance(module, Absorbed) or _row(STOCK_ACTIVATIONS, module) is not None


def _in_order(
    model: nn.Module, is_end: Callable[[nn.Module], Any], modes: Collection[bool] = (True, False)
) -> Iterator[tuple[list[nn.Module], nn.Module]]:
    """The modules that are asked for, with what runs before them: in an nn.Sequential, and where
    another forward calls them and each of those once, whatever the mode."""
    ends = {module for module in model.modules() if is_end(module)}
    for sequence in _sequences(model):
        children = list(sequence)
        for i, child in enumerate(children):
            if is_end(child):
                ends.discard(child)
                yield children[:i], child
    found = list(runs(model, ends, modes)) if ends else []
    calls = Counter(run[-1] for run in found)
    for *before, last in found:
        if last in ends and all(calls[module] == 1 for module in (*before, last)):
            yield before, last


def _leader(before: list[nn.Module], act: nn.Module) -> Any:
    """The layer that can apply act."""
    for module in reversed(before):
        if isinstance(module, _DROPOUTS):
            if not isinstance(act, nn.ReLU | nn.LeakyReLU):
                raise Unfit("a dropout stands before it")
        elif not isinstance(module, nn.Identity):
            if isinstance(module, Fused) or _row(LAYERS, module):
                return module
            raise Unfit(f"a {_stock(module)} stands before it")
    raise Unfit("no module stands right before it")


def _plan(leader: Any, act: Any, places: Counter[nn.Module]) -> list[Assignment]:
    fused: type[Fused] = _row(LAYERS, leader)
    name, alpha = _row(STOCK_ACTIVATIONS, act)(act)
    if fused is None:
        raise Unfit(f"the {_stock(leader)} before it applies another one")
    if name not in fused.acts:
        raise Unfit(f"{fused.uses} has no such activation")
    for module in (leader, act):
        own = f"the {_stock(module)}"
        if places[module] > 1:
            raise Unfit(f"{own} is used in several places")
        if module._forward_hooks or module._backward_hooks or module._backward_pre_hooks:
            raise Unfit(f"{own} has hooks")
        if isinstance(module, nn.modules.lazy.LazyModuleMixin):
            raise Unfit(f"{own} is not initialised")
    if act._forward_pre_hooks:
        raise Unfit(f"the {_stock(act)} has hooks")
    if getattr(leader, "track_running_stats", False) and fused is InstanceNorm:
        raise Unfit(f"the {_stock(leader)} keeps running statistics")
    return [
        Assignment(leader, "act", name),
        Assignment(leader, "alpha", alpha),
        Assignment(leader, "__class__", fast_class(fused, type(leader))),  # type: ignore[arg-type]
        Assignment(act, "__class__", fast_class(Absorbed, type(act))),  # type: ignore[arg-type]
    ]


def _folds(layer: Any, norm: Any) -> bool:
    """Whether norm is the batch norm of what layer gives, and layer's weight its own."""
    pairs = zip((nn.Linear, *CONVS, *TRANSPOSED), (nn.BatchNorm1d, *BATCH_NORMS * 2), strict=True)
    return (
        any(_row({a: True}, layer) and _row({b: True}, norm) for a, b in pairs)
        and norm.running_mean is not None
        and "weight" in layer._parameters
        and runs_as_written(layer)
        and runs_as_written(norm)
    )


@torch.no_grad()
def _fold(layer: Any, norm: Any) -> None:
    # In float64: the result is rounded once.
    scale = torch.rsqrt(norm.running_var.double() + norm.eps)
    bias = -norm.running_mean.double()
    if norm.weight is not None:
        scale *= norm.weight.double()
    if layer.bias is not None:
        bias += layer.bias.double()
    bias *= scale
    if norm.bias is not None:
        bias += norm.bias.double()
    weight = layer.weight
    if isinstance(layer, TRANSPOSED):  # (in, out of a group, ...)
        by_group = weight.double().unflatten(0, (layer.groups, -1))
        over = scale.reshape(layer.groups, 1, -1, *[1] * (weight.dim() - 2))
        folded = (by_group * over).flatten(0, 1)
    else:
        folded = weight.double() * scale.reshape(-1, *[1] * (weight.dim() - 1))
    layer.weight = nn.Parameter(folded.to(weight.dtype))
    layer.bias = nn.Parameter(bias.to(weight.dtype))
