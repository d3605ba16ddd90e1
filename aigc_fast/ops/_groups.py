"""Groups of rows, one after another."""

from itertools import pairwise

from torch import Tensor


def groups(x: Tensor, ends: Tensor) -> list[tuple[int, Tensor]]:
    """The number and the rows of each group that has any; group g ends before row ends[g].

    Raises ValueError for ends that fall, or end elsewhere than at the last row.
    """
    bounds = [0, *ends.tolist()]
    sizes = [end - start for start, end in pairwise(bounds)]
    if min(sizes) < 0 or bounds[-1] != len(x):
        raise ValueError(f"ends must not fall and end at the {len(x)} rows of x, got {bounds[1:]}")
    numbers = [g for g, size in enumerate(sizes) if size]
    return list(zip(numbers, x.split([sizes[g] for g in numbers]), strict=True))
