"""A codebook that learns by its gradient or by moving averages of the vectors that choose it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aigc_fast import ops
from aigc_fast.ops._checks import check_positive


class VectorQuantizer(nn.Module):
    """x to (quantized, indices, loss): the nearest of `embedding.weight` for every vector of x.

    num_codes, features: shape of the codebook.
    dim:   the dimension of x along which its vectors lie; 1 for images.
    beta:  weight of the commitment loss.
    decay: None where the optimizer learns the codebook. Else, in training mode, each call moves
           every code towards the mean of the vectors that chose it: counts and sums are averaged
           with this factor (the buffers ema_count and ema_sum), and a code is their ratio. A code
           that nobody has chosen for long stays where it is.
    restart_below: with `decay`, a code whose averaged count falls below this moves to a random
           vector of x; 0 for never.

    quantized and indices are those of `ops.vector_quantize`, gradients go straight through. loss is
    a scalar, the mean over all elements of x: without decay it is |sg(x) - e|^2, with the gradient
    of |sg(x) - e|^2 + beta |x - sg(e)|^2; with decay it is beta |x - sg(e)|^2. sg: stop-gradient.

    x may have a narrower dtype than the codebook, which is then rounded for the call. Keep the
    codebook in float32: averages move by less than 16 bits can tell apart. Processes that train
    together do not share their counts.

    Raises ValueError for a decay outside [0, 1) and for restart_below without decay.

    Source: van den Oord et al. 2017, arXiv:1711.00937; restarts: Dhariwal et al. 2020,
    arXiv:2005.00341.

    >>> quantized, indices, loss = VectorQuantizer(512, 64, decay=0.99)(images)
    """

    ema_count: Tensor
    ema_sum: Tensor

    def __init__(
        self,
        num_codes: int,
        features: int,
        *,
        dim: int = 1,
        beta: float = 0.25,
        decay: float | None = None,
        restart_below: float = 0.0,
    ) -> None:
        super().__init__()
        check_positive(num_codes=num_codes, features=features)
        if decay is not None and not 0 <= decay < 1:
            raise ValueError(f"decay must be from 0 to 1, 1 excluded, got {decay}")
        if restart_below and decay is None:
            raise ValueError("restart_below must be 0 without a decay")
        self.dim, self.beta, self.decay, self.restart_below = dim, beta, decay, restart_below
        self.embedding = nn.Embedding(num_codes, features)
        nn.init.uniform_(self.embedding.weight, -1 / num_codes, 1 / num_codes)
        if decay is not None:
            self.embedding.weight.requires_grad_(False)
            self.register_buffer("ema_count", torch.ones(num_codes))
            self.register_buffer("ema_sum", self.embedding.weight.detach().clone())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        codebook, follows = self.embedding.weight, self.decay is not None
        if follows and self.training:
            codebook = codebook.clone()  # which backward needs as it was
        quantized, indices, distances = ops.vector_quantize(
            x, codebook.to(x.dtype), dim=self.dim, beta=1.0 if follows else self.beta
        )
        loss = distances.mean() / codebook.shape[1]
        if not follows:
            return quantized, indices, loss
        if self.training and x.numel():
            self._follow(x.detach(), indices)
        return quantized, indices, self.beta * loss

    def lookup(self, indices: Tensor) -> Tensor:
        """The codes of int64 indices, their features along `dim`: quantized, from the indices."""
        return F.embedding(indices, self.embedding.weight).movedim(-1, self.dim)

    @torch.no_grad()
    def _follow(self, x: Tensor, indices: Tensor) -> None:
        codebook, count = self.embedding.weight, self.ema_count
        counts, sums = ops.codebook_moments(x, indices, len(codebook), dim=self.dim)
        count.lerp_(counts.to(count.dtype), 1 - self.decay)  # type: ignore[operator]
        self.ema_sum.lerp_(sums.to(count.dtype), 1 - self.decay)  # type: ignore[operator]
        info = torch.finfo(count.dtype)
        known = (count > info.tiny / info.eps)[:, None]  # of less the ratio loses its digits
        codebook.copy_(torch.where(known, self.ema_sum / count[:, None], codebook))
        if self.restart_below:
            vectors = x.movedim(self.dim, -1).flatten(0, -2)
            drawn = torch.randint(len(vectors), count.shape, device=x.device)
            dead = count < self.restart_below
            codebook.copy_(torch.where(dead[:, None], vectors[drawn].to(codebook.dtype), codebook))
            self.ema_sum.copy_(torch.where(dead[:, None], codebook, self.ema_sum))
            count.copy_(torch.where(dead, 1.0, count))

    def extra_repr(self) -> str:
        return f"dim={self.dim}, beta={self.beta}, decay={self.decay}"
