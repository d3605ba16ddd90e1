"""Our operators inside models of other libraries."""

from aigc_fast.integrations._patching import PatchReport, patch, unpatch

__all__ = ["PatchReport", "patch", "unpatch"]
