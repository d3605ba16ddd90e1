"""What modules refuse when they are made."""

import functools
import inspect
from typing import Any

from aigc_fast.ops._arguments import check_types


def check_constructor(module: type) -> None:
    """Makes the class name an argument of a wrong type, at a cost that is paid once a module."""
    init: Any = module.__init__  # type: ignore[misc]
    if hasattr(init, "__wrapped__"):  # that of a class before it
        return
    signature = inspect.signature(init)

    @functools.wraps(init)
    def checked(*args: Any, **kwargs: Any) -> None:
        # What the signature does not fit is refused in Python's own words.
        check_types(init, signature.bind_partial(*args, **kwargs).arguments)
        init(*args, **kwargs)

    module.__init__ = checked  # type: ignore[misc]
