"""Commands whose options are the fields of a dataclass, so that each stands in one place."""

import functools
import inspect
from collections.abc import Callable
from typing import Any


def takes(options: type) -> Callable[[Callable[[Any], None]], Callable[..., None]]:
    """Makes a function of one such object a command of its fields, which typer reads."""

    def decorate(run: Callable[[Any], None]) -> Callable[..., None]:
        @functools.wraps(run)
        def command(**values: Any) -> None:
            run(options(**values))

        command.__signature__ = inspect.signature(options)  # type: ignore[attr-defined]
        return command

    return decorate
