"""What takes the place of what in the models of transformers."""

import functools
import importlib
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from aigc_fast import ops
from aigc_fast.integrations._patching import Assignment, Linear, Replacement, Unfit
from aigc_fast.integrations._same_code import code_of
from aigc_fast.integrations.transformers_attention import (
    Attention,
    CappedAttention,
    FusedAttention,
    JointNormAttention,
    RotaryAttention,
    UnclippedAttention,
    asks_the_interface,
)
from aigc_fast.integrations.transformers_audio import ARCHITECTURES
from aigc_fast.integrations.transformers_loss import CausalLM, GemmaCausalLM, GraniteCausalLM
from aigc_fast.nn._experts import through_experts

_geglu_tanh = functools.partial(ops.geglu, approximate="tanh")
#: class of an activation -> itself times another tensor
GATES: dict[type, Callable[[Tensor, Tensor], Tensor]] = {
    type(ACT2FN["silu"]): ops.swiglu,
    type(ACT2FN["gelu"]): ops.geglu,
    type(ACT2FN["gelu_pytorch_tanh"]): _geglu_tanh,
    type(ACT2FN["gelu_new"]): _geglu_tanh,
    type(ACT2FN["gelu_fast"]): _geglu_tanh,
}


class Norm(Replacement):
    weight: Tensor

    @classmethod
    def assignments(cls, module: Any) -> Iterable[Assignment]:
        if module.weight.dim() != 1:
            raise Unfit("its weight is of more than one dimension")
        yield from super().assignments(module)


class RMSNorm(Norm):
    uses = "rms_norm"
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        # Autocast brings hidden states of another dtype.
        if hidden_states.dtype != self.weight.dtype:
            return super().forward(hidden_states)
        return ops.rms_norm(hidden_states, self.weight, self.variance_epsilon)


class OffsetRMSNorm(Norm):
    """Gemma's: the factor is one plus the weight, which bfloat16 would round."""

    uses = "rms_norm"
    eps: float

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        return ops.rms_norm(x.to(wide), 1 + self.weight.to(wide), self.eps).to(x.dtype)


class LayerNorm(Norm):
    """Cohere's, without a bias: torch has it, and Cohere eight operators."""

    uses = "layer_norm"
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        if hidden_states.dtype != self.weight.dtype:
            return super().forward(hidden_states)
        return ops.layer_norm(hidden_states, self.weight, None, self.variance_epsilon)


class TanhGELU(Replacement):
    """Eight operators in some of the activations, and a slow one in the other."""

    uses = "gelu"

    def forward(self, input: Tensor) -> Tensor:
        return ops.gelu(input, "tanh")


class Conv1D(Linear):
    """GPT-2's layers: linear, their weight the other way round."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight.t(), self.bias)


class AnyGatedMLP(Replacement):
    """One whose gate has an activation of its own, a child of this name."""

    uses = "swiglu or geglu"
    absorbs = ("act_fn",)

    @classmethod
    def assignments(cls, module: Any) -> Iterable[Assignment]:
        (name,) = cls.absorbs
        activation = type(getattr(module, name))
        if activation not in GATES:
            raise Unfit(f"its activation is {activation.__name__}")
        yield from super().assignments(module)

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        """activation(gate) * up"""
        (name,) = self.absorbs
        activation = getattr(self, name)
        # Adapters may bring another dtype.
        same = gate.dtype == up.dtype
        return GATES[type(activation)](gate, up) if same else activation(gate) * up


class GatedMLP(AnyGatedMLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.gated(self.gate_proj(x), self.up_proj(x)))


class FusedGatedMLP(AnyGatedMLP):
    """Phi-3's: gate and up are one product."""

    absorbs = ("activation_fn",)

    def forward(self, hidden_states: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(hidden_states).chunk(2, dim=-1)
        return self.down_proj(self.gated(gate, up))


class Experts(AnyGatedMLP):
    """Those of a mixture, their weights in one tensor."""

    uses = "grouped_linear, swiglu or geglu"

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        if self._is_expert_parallel:
            return super().forward(hidden_states, top_k_index, top_k_weights)

        def run(rows: Tensor, factors: Tensor, ends: Tensor) -> Tensor:
            gate, up = ops.grouped_linear(rows, self.gate_up_proj, ends).chunk(2, dim=-1)
            inner = self.gated(gate, up)
            return ops.grouped_linear(inner * factors.to(inner.dtype), self.down_proj, ends)

        return through_experts(hidden_states, top_k_index, top_k_weights, self.num_experts, run)


class T5GatedMLP(AnyGatedMLP):
    absorbs = ("act",)

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden = self.dropout(self.gated(self.wi_0(hidden_states), self.wi_1(hidden_states)))
        weight = self.wo.weight  # which transformers keeps in float32 where the others are float16
        if isinstance(weight, Tensor) and weight.dtype not in (hidden.dtype, torch.int8):
            hidden = hidden.to(weight.dtype)
        return self.wo(hidden)


def _table(**architectures: dict[str, type[Replacement]]) -> dict[str, type[Replacement]]:
    return {
        f"transformers.models.{name}.modeling_{name}.{cls}": replacement
        for name, rows in architectures.items()
        for cls, replacement in rows.items()
    }


#: class -> what takes its place, and that of every class whose forward is the same code
COPIED = _table(
    llama=dict(LlamaRMSNorm=RMSNorm, LlamaMLP=GatedMLP, LlamaForCausalLM=CausalLM),
    mixtral=dict(MixtralExperts=Experts, MixtralForCausalLM=CausalLM),
    phi3=dict(Phi3MLP=FusedGatedMLP),
    granite=dict(GraniteForCausalLM=GraniteCausalLM),
    olmo2=dict(Olmo2RMSNorm=RMSNorm),
    gemma2=dict(Gemma2RMSNorm=OffsetRMSNorm, Gemma2ForCausalLM=GemmaCausalLM),
    t5=dict(T5LayerNorm=RMSNorm, T5DenseGatedActDense=T5GatedMLP),
    cohere=dict(CohereLayerNorm=LayerNorm),
)
#: class -> what takes the place of it alone: of attention, because the angles come from elsewhere
TABLE = _table(
    llama=dict(LlamaAttention=RotaryAttention),
    mistral=dict(MistralAttention=RotaryAttention),
    qwen2=dict(Qwen2Attention=RotaryAttention),
    mixtral=dict(MixtralAttention=RotaryAttention),
    qwen3=dict(Qwen3Attention=RotaryAttention),
    qwen3_moe=dict(Qwen3MoeAttention=RotaryAttention),
    olmoe=dict(OlmoeAttention=UnclippedAttention),
    phi3=dict(Phi3Attention=FusedAttention),
    smollm3=dict(SmolLM3Attention=RotaryAttention),
    granite=dict(GraniteAttention=RotaryAttention),
    olmo2=dict(Olmo2Attention=JointNormAttention),
    gemma2=dict(Gemma2Attention=CappedAttention),
    gemma3=dict(Gemma3Attention=RotaryAttention),
    gpt2=dict(GPT2LMHeadModel=CausalLM),
    falcon=dict(FalconLinear=Linear),
    **ARCHITECTURES,
) | {
    "transformers.pytorch_utils.Conv1D": Conv1D,
    "transformers.activations.NewGELUActivation": TanhGELU,
    "transformers.activations.FastGELUActivation": TanhGELU,
    "transformers.activations.GELUTanh": TanhGELU,
}
#: Every model: its linear layers and convolutions are torch's.
MODELS = (PreTrainedModel,)


@functools.cache
def rows_of(cls: type) -> tuple[type[Replacement], ...]:
    """What may take the place of a class, the best first."""
    path = f"{cls.__module__}.{cls.__qualname__}"
    rows = [TABLE.get(path) or COPIED.get(path) or _by_code().get(code_of(cls))]
    if asks_the_interface(cls):
        rows.append(Attention)
    return tuple(row for row in rows if row is not None)


@functools.cache
def _by_code() -> dict[Hashable, type[Replacement]]:
    found = {}
    for path, row in COPIED.items():
        module, _, name = path.rpartition(".")
        found[code_of(getattr(importlib.import_module(module), name))] = row
    return found
