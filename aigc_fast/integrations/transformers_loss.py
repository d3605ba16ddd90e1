"""The loss of transformers' language models without their logits."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import (
    BaseModelOutputWithPastAndCrossAttentions,
    CausalLMOutputWithCrossAttentions,
    CausalLMOutputWithPast,
    MoeCausalLMOutputWithPast,
    MoeModelOutputWithPast,
)

from aigc_fast import ops
from aigc_fast.integrations._patching import Replacement, stock_class
from aigc_fast.nn._replacing import runs_as_written

#: what ForCausalLMLoss takes of a model's arguments
_OF_LOSS = ("num_items_in_batch", "ignore_index", "shift_labels")

#: output of the layers -> that of the model, where it is not CausalLMOutputWithPast
_OUTPUTS: dict[type, type] = {
    BaseModelOutputWithPastAndCrossAttentions: CausalLMOutputWithCrossAttentions,
    MoeModelOutputWithPast: MoeCausalLMOutputWithPast,
}


class CausalLM(Replacement):
    """While it is trained with labels, the loss comes from the hidden states, and the output has no
    logits."""

    uses = "linear_cross_entropy"
    opt_in = "fuse_loss"
    #: what its config calls the divisor and the softcap of its logits
    scaling = softcap = ""
    lm_head: Any

    def forward(self, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
        if not self._can_fuse(args, labels, kwargs):
            return super().forward(*args, labels=labels, **kwargs)
        out = self.base_model(*args, **kwargs)
        hidden = out.last_hidden_state
        if self.scaling:  # a power of two: no rounding here either
            hidden = hidden / getattr(self.config, self.scaling)
        loss = causal_lm_loss(
            hidden,
            self.lm_head.weight,
            labels,  # type: ignore[arg-type]  # _can_fuse
            bias=self.lm_head.bias,
            softcap=getattr(self.config, self.softcap) if self.softcap else None,
            **{name: kwargs[name] for name in _OF_LOSS if name in kwargs},
        )
        kept = {k: v for k, v in out.items() if k != "last_hidden_state"}
        return _OUTPUTS.get(type(out), CausalLMOutputWithPast)(loss=loss, **kept)

    def _can_fuse(self, args: tuple, labels: Tensor | None, kwargs: dict) -> bool:
        head = self.lm_head
        return (
            self.training
            and labels is not None
            and len(args) <= 1  # input_ids; what comes next differs from model to model
            and kwargs.get("return_dict", self.config.return_dict)
            and "logits_to_keep" not in kwargs
            and not self._balances_experts(kwargs)
            and self.loss_function is ForCausalLMLoss
            # Adapters, hooks and sharded weights have work to do in the head's own forward.
            and stock_class(head) is nn.Linear
            and runs_as_written(head)
            and type(head.weight) in (nn.Parameter, Tensor)
        )

    def _balances_experts(self, kwargs: dict) -> bool:
        """Whether a loss of the routers is added."""
        asked = kwargs.get("output_router_logits")
        return getattr(self.config, "output_router_logits", False) if asked is None else asked


class GraniteCausalLM(CausalLM):
    scaling = "logits_scaling"


class GemmaCausalLM(CausalLM):
    softcap = "final_logit_softcapping"


def causal_lm_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
) -> Tensor:
    """transformers' ForCausalLMLoss of the logits softcap * tanh((hidden @ weight.T + bias) /
    softcap), which are never all there: each position's label is the token after it.

    hidden: (batch, seq, features); weight: (vocab, features); labels: (batch, seq), ignore_index
    where there is none; num_items_in_batch: what the sum of the losses is divided by, or None for
    their mean; shift_labels: the labels moved already.
    """
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    loss = ops.linear_cross_entropy(
        hidden,
        weight,
        shift_labels.to(hidden.device),
        linear_bias=bias,
        reduction="mean" if num_items_in_batch is None else "sum",
        ignore_index=ignore_index,
        softcap=softcap,
    )
    if num_items_in_batch is None:
        return loss
    if isinstance(num_items_in_batch, torch.Tensor):
        num_items_in_batch = num_items_in_batch.to(loss.device)
    return loss / num_items_in_batch
