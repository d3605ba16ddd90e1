"""What stands behind attention in a layer: an MLP, or a mixture of such experts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aigc_fast import ops
from aigc_fast.nn import Linear, QuantizedLinear
from aigc_fast.nn._experts import through_experts
from aigc_fast.nn._replacing import runs_as_written
from aigc_fast.ops._groups import groups

from .config import DecoderConfig

_FORWARDS = nn.Linear.forward, Linear.forward, QuantizedLinear.forward


class MLP(nn.Module):
    """down(act(gate(x)) * up(x)), gate and up one product; or down(act(up(x)))."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.activation = config.activation
        if self.activation == "gelu_tanh":
            self.up_proj = Linear(hidden, inner, bias=bias)
        else:
            self.gate_up_proj = Linear(hidden, 2 * inner, bias=bias)
        self.down_proj = Linear(inner, hidden, bias=bias)

    def forward(self, hidden: Tensor) -> Tensor:
        if self.activation == "gelu_tanh":
            return self.down_proj(ops.gelu(self.up_proj(hidden), "tanh"))
        return self.down_proj(_gated(self.gate_up_proj(hidden), self.activation))


def _gated(gate_up: Tensor, activation: str) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    if activation == "geglu_tanh":
        return ops.geglu(gate, up, approximate="tanh")
    return ops.swiglu(gate, up)


class Router(nn.Module):
    """softmax(weight @ x), of which the largest count."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        experts, per_token = config.num_experts, config.experts_per_token
        assert experts is not None and per_token is not None
        self.weight = nn.Parameter(torch.zeros(experts, config.hidden_size))
        self.per_token, self.normalize = per_token, config.normalize_experts

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Factors and numbers of the experts of each row, (rows, experts_per_token)."""
        wide = torch.promote_types(x.dtype, torch.float32)
        factors, experts = F.linear(x, self.weight).softmax(1, wide).topk(self.per_token)
        if self.normalize:
            factors = factors / factors.sum(1, keepdim=True)
        return factors, experts


class MixtureOfExperts(nn.Module):
    """The sum of factor * down(act(gate(x)) * up(x)) over the experts that the router chooses.

    gate_up_proj: the rows of gate and then those of up, expert by expert.
    down_proj:    the rows of one expert after those of another.

    Both are read part by part and never called: TypeError for hooks or adapters on them.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        assert config.num_experts is not None
        self.num_experts, self.activation = config.num_experts, config.activation
        self.router = Router(config)
        self.gate_up_proj = Linear(hidden, self.num_experts * 2 * inner, bias=False)
        self.down_proj = Linear(inner, self.num_experts * hidden, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.flatten(0, -2)
        factors, experts = self.router(x)

        def run(rows: Tensor, factors: Tensor, ends: Tensor) -> Tensor:
            inner = _gated(self._multiply(self.gate_up_proj, rows, ends), self.activation)
            # Scaled here, where rows are shortest.
            return self._multiply(self.down_proj, inner * factors.to(inner.dtype), ends)

        return through_experts(x, experts, factors, self.num_experts, run).view_as(hidden)

    def _multiply(self, linear: nn.Module, rows: Tensor, ends: Tensor) -> Tensor:
        if type(linear).forward not in _FORWARDS or not runs_as_written(linear):
            raise TypeError(
                "the projections of experts must be Linear or QuantizedLinear, without hooks or "
                f"adapters, got {type(linear).__name__}"
            )
        if isinstance(linear, QuantizedLinear):
            return torch.cat([linear.part(x, e, self.num_experts) for e, x in groups(rows, ends)])
        weight: Tensor = linear.weight  # type: ignore[assignment]
        return ops.grouped_linear(rows, weight.unflatten(0, (self.num_experts, -1)), ends)
