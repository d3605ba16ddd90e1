"""torch's autocast, as compiled code may ask for it too."""

import torch


def under_autocast(device: str) -> bool:
    """Whether autocast is on for this type of device. "meta" has none: `is_autocast_available`
    would tell, but torch 2.11's Dynamo cannot trace it."""
    return device != "meta" and torch.is_autocast_enabled(device)
