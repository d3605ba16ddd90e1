"""The base of the operators' autograd Functions."""

from typing import Any

import torch
from torch.autograd import Function, forward_ad


def transforming() -> bool:
    """Whether torch.func or forward-mode differentiation is at work. They know rules for torch's
    own operators only, of which the references are made."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def wanted(*tensors: torch.Tensor | None) -> bool:
    """Whether a gradient with respect to one of these is asked for."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def asked_for(ctx: Any) -> list[bool]:
    """ctx.needs_input_grad in a Function's backward, less what the running one makes no use of: of
    a generator's loss, or of a penalty on gradients of the input, the gradients of a
    discriminator's weights would be thrown away, a third of the work."""
    if torch.compiler.is_compiling():  # which finds out by itself
        return list(ctx.needs_input_grad)
    nodes = (node for node, _ in ctx.next_functions if node is not None)
    return [required and _runs(next(nodes)) for required in ctx.needs_input_grad]


def _runs(node: Any) -> bool:
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # a leaf that torch.autograd.grad was asked for
        return True


#: Set while torch loops over a batch of gradients.
_BATCHES: Any = torch._C._parse_dispatch_key("VmapMode")


class OpFunction(Function):
    """An autograd Function to be entered by `call`, which is `apply` less 2 of its 7 us."""

    _apply: Any

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        # Function.apply prepares its arguments for functorch, then calls this.
        cls._apply = super(Function, cls).apply  # type: ignore[misc]

    @classmethod
    def call(cls, *args: Any) -> Any:
        if torch.compiler.is_compiling():
            return cls.apply(*args)
        if transforming():
            return cls.transformed(*args)
        if torch._C._dispatch_tls_is_dispatch_key_included(_BATCHES):
            # Called in a backward that is differentiated: torch would drop what this remembers.
            raise NotImplementedError(
                "is_grads_batched=True with create_graph=True is not supported: take the gradients "
                "one after another, or by torch.func"
            )
        return cls._apply(*args)

    @classmethod
    def transformed(cls, *args: Any) -> Any:
        """The same made of torch's own operators, as `transforming` asks for."""
        return cls.forward(_Unused(), *args)


class _Unused:
    """In place of the context of a forward whose derivative torch finds by itself."""

    def save_for_backward(self, *_: Any) -> None: ...
    def mark_non_differentiable(self, *_: Any) -> None: ...
    def set_materialize_grads(self, _: bool) -> None: ...
