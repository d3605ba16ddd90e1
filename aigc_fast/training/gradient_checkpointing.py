"""Less memory for more time: what is inside a block is computed again for its gradients."""

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint


def checkpoint_blocks(model: nn.Module) -> int:
    """Of each block of `model`, an entry of one of its nn.ModuleLists, only the inputs are kept for
    the backward pass. State dicts stay as they are. Returns the number of blocks.

    Raises ValueError for a model without such lists.

    Source: Chen et al. 2016, arXiv:1604.06174.
    """
    blocks = [b for m in model.modules() if isinstance(m, nn.ModuleList) for b in m]
    inner = {m for block in blocks for m in list(block.modules())[1:]}
    blocks = [block for block in blocks if block not in inner]
    if not blocks:
        raise ValueError("gradient_checkpointing needs a model with its blocks in an nn.ModuleList")
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    return len(blocks)
