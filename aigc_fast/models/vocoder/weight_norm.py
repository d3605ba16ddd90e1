"""Weight norm for training: what checkpoints of vocoders hold, and `fold_weight_norm` undoes."""

from typing import TypeVar

from torch import nn
from torch.nn.utils import parametrizations

Model = TypeVar("Model", bound=nn.Module)


def weight_norm(model: Model) -> Model:
    """Makes the weight of every convolution g v / ||v||, as Salimans and Kingma 2016
    (arXiv:1602.07868) have it; in place, and returns the model.

    The length g and the direction v of each row are what is trained then. State dicts have torch's
    names for them; those of its older function, weight_g and weight_v, load too.
    """
    for module in model.modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d)):
            parametrizations.weight_norm(module)
    return model
