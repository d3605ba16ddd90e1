"""Compiled kernels and fast model variants for generative AI."""

from aigc_fast import ops
from aigc_fast.ops._registry import Explanation, FallbackError, backend, explain, list_ops

__version__ = "0.1.0"
__all__ = ["Explanation", "FallbackError", "backend", "explain", "list_ops", "ops"]
