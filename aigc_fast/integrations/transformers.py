"""What takes the place of what in the models of transformers."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from transformers.activations import ACT2FN

from aigc_fast import ops
from aigc_fast.integrations._patching import Assignment, Replacement, Unfit
from aigc_fast.integrations.transformers_attention import (
    Attention,
    CappedAttention,
    FusedAttention,
    JointNormAttention,
    RotaryAttention,
    UnclippedAttention,
)
from aigc_fast.integrations.transformers_audio import ARCHITECTURES
from aigc_fast.integrations.transformers_loss import CausalLM
from aigc_fast.nn._experts import through_experts

#: class of an activation -> itself times another tensor
GATES: dict[type, Callable[[Tensor, Tensor], Tensor]] = {
    type(ACT2FN["silu"]): ops.swiglu,
    type(ACT2FN["gelu"]): ops.geglu,
    type(ACT2FN["gelu_pytorch_tanh"]): functools.partial(ops.geglu, approximate="tanh"),
}


class RMSNorm(Replacement):
    uses = "rms_norm"
    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        # Autocast brings hidden states of another dtype.
        if hidden_states.dtype != self.weight.dtype:
            return super().forward(hidden_states)
        return ops.rms_norm(hidden_states, self.weight, self.variance_epsilon)


class OffsetRMSNorm(Replacement):
    """Gemma's: the factor is one plus the weight, which bfloat16 would round."""

    uses = "rms_norm"
    weight: Tensor
    eps: float

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        return ops.rms_norm(x.to(wide), 1 + self.weight.to(wide), self.eps).to(x.dtype)


class GatedMLP(Replacement):
    uses = "swiglu or geglu"
    absorbs = ("act_fn",)

    @classmethod
    def assignments(cls, module: Any) -> Iterable[Assignment]:
        if type(module.act_fn) not in GATES:
            raise Unfit(f"its activation is {type(module.act_fn).__name__}")
        yield from super().assignments(module)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        if gate.dtype != up.dtype:
            return self.down_proj(self.act_fn(gate) * up)
        return self.down_proj(GATES[type(self.act_fn)](gate, up))


class FusedGatedMLP(Replacement):
    """Phi-3's: gate and up are one product."""

    uses = "swiglu or geglu"
    absorbs = ("activation_fn",)

    @classmethod
    def assignments(cls, module: Any) -> Iterable[Assignment]:
        if type(module.activation_fn) not in GATES:
            raise Unfit(f"its activation is {type(module.activation_fn).__name__}")
        yield from super().assignments(module)

    def forward(self, hidden_states: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(hidden_states).chunk(2, dim=-1)
        return self.down_proj(GATES[type(self.activation_fn)](gate, up))


class Experts(Replacement):
    """Those of a mixture, their weights in one tensor."""

    uses = "grouped_linear, swiglu or geglu"
    absorbs = ("act_fn",)

    @classmethod
    def assignments(cls, module: Any) -> Iterable[Assignment]:
        if type(module.act_fn) not in GATES:
            raise Unfit(f"its activation is {type(module.act_fn).__name__}")
        yield from super().assignments(module)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        if self._is_expert_parallel:
            return super().forward(hidden_states, top_k_index, top_k_weights)

        def run(rows: Tensor, pairs: Tensor, ends: Tensor) -> Tensor:
            gate, up = ops.grouped_linear(rows, self.gate_up_proj, ends).chunk(2, dim=-1)
            inner = GATES[type(self.act_fn)](gate, up)
            inner = inner * top_k_weights.flatten()[pairs, None].to(inner.dtype)
            return ops.grouped_linear(inner, self.down_proj, ends)

        return through_experts(hidden_states, top_k_index, self.num_experts, run)


class TanhMLP(Replacement):
    """GPT-2's: its tanh form of gelu is eight operators."""

    uses = "gelu"
    absorbs = ("act",)

    @classmethod
    def assignments(cls, module: Any) -> Iterable[Assignment]:
        if type(module.act) is not type(ACT2FN["gelu_new"]):
            raise Unfit(f"its activation is {type(module.act).__name__}")
        yield from super().assignments(module)

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden = ops.gelu(self.c_fc(hidden_states), "tanh")
        return self.dropout(self.c_proj(hidden))


def _table(**architectures: dict[str, type[Replacement]]) -> dict[str, type[Replacement]]:
    return {
        f"transformers.models.{name}.modeling_{name}.{cls}": replacement
        for name, rows in architectures.items()
        for cls, replacement in rows.items()
    }


def _llama_like(name: str, **others: type[Replacement]) -> dict[str, type[Replacement]]:
    rows = dict(RMSNorm=RMSNorm, MLP=GatedMLP, Attention=RotaryAttention, ForCausalLM=CausalLM)
    return {name + part: replacement for part, replacement in (rows | others).items()}


#: model_type: class -> what takes its place
TABLE = _table(
    llama=_llama_like("Llama"),
    mistral=_llama_like("Mistral"),
    qwen2=_llama_like("Qwen2"),
    mixtral=_llama_like("Mixtral", Experts=Experts),
    qwen3=_llama_like("Qwen3"),
    qwen3_moe=_llama_like("Qwen3Moe", Experts=Experts),
    olmoe=_llama_like("Olmoe", Experts=Experts, Attention=UnclippedAttention),
    phi3=_llama_like("Phi3", MLP=FusedGatedMLP, Attention=FusedAttention),
    smollm3=_llama_like("SmolLM3"),
    granite=_llama_like("Granite"),
    olmo2=_llama_like("Olmo2", Attention=JointNormAttention),
    gemma2=_llama_like("Gemma2", RMSNorm=OffsetRMSNorm, Attention=CappedAttention),
    gemma3=_llama_like("Gemma3", RMSNorm=OffsetRMSNorm),
    gpt2=dict(GPT2MLP=TanhMLP, GPT2Attention=Attention, GPT2LMHeadModel=CausalLM),
    **ARCHITECTURES,
)
