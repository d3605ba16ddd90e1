"""Compiled kernels and fast model variants for generative AI."""

from typing import Any

from aigc_fast import ops
from aigc_fast.ops._explain import Explanation, explain, list_ops
from aigc_fast.ops._registry import FallbackError, backend

__version__ = "0.1.0"
__all__ = [
    "Explanation",
    "FallbackError",
    "backend",
    "explain",
    "list_ops",
    "ops",
    "patch",
    "unpatch",
]


def __getattr__(name: str) -> Any:
    if name in ("patch", "unpatch"):
        from aigc_fast import integrations

        return getattr(integrations, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
