"""Schedulers as diffusers' configurations: scheduler_config.json, read and written."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Self  # typing's own came with Python 3.11

CONFIG_NAME = "scheduler_config.json"
logger = logging.getLogger(__name__)


@dataclass
class Configured:
    """A scheduler's fields, to and from a configuration of diffusers."""

    @property
    def config(self) -> Self:
        """The fields; solvers read them here, where diffusers' classes keep theirs."""
        return self

    def to_dict(self) -> dict[str, Any]:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {"_class_name": type(self).__name__, **values}

    def save_config(self, folder: str | Path) -> None:
        """Writes scheduler_config.json, which diffusers reads too."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        (path / CONFIG_NAME).write_text(json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n")

    @classmethod
    def from_pretrained(
        cls, path: str | Path, subfolder: str | None = None, **changes: Any
    ) -> Self:
        """`from_config` of a scheduler_config.json, or of the folder that holds one.

        subfolder: where in `path` the folder is: "scheduler" in that of a pipeline.
        """
        return cls.from_config(Path(path) / (subfolder or ""), **changes)

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any] | Configured | str | Path, **changes: Any
    ) -> Self:
        """The scheduler of a configuration of diffusers or of this library.

        config: a dict, a scheduler, a scheduler_config.json or the folder that holds one. It may
            be that of another class: arguments that this one does not have are left out, with a
            warning if no scheduler has them; those that the other class was left to choose take
            this class's own defaults, as in diffusers.
        changes: arguments to replace. An unknown one is a TypeError.
        """
        if isinstance(config, str | Path):
            config = _read(Path(config))
        if not isinstance(config, Mapping | Configured):
            raise TypeError(
                f"config must be a dict, a scheduler or a path, got {type(config).__name__}"
            )
        values = config.to_dict() if isinstance(config, Configured) else dict(config)
        if not hasattr(cls, "advance"):
            raise TypeError(
                f"from_config is a method of each scheduler class, not of {cls.__name__}"
            )
        chosen = set(values.get("_use_default_values", ()))
        own = {f.name for f in fields(cls)}
        unknown = {
            name for name in values if not name.startswith("_") and name not in known_arguments()
        }
        if unknown:
            logger.warning(
                "%s: unknown arguments in the configuration are ignored: %s",
                cls.__name__, ", ".join(sorted(unknown)),
            )  # fmt: skip
        kept = {k: v for k, v in values.items() if k in own and k not in chosen}
        return cls(**{**kept, **changes})


def _read(path: Path) -> Any:
    """A configuration, from its file or the folder that holds it."""
    path = path / CONFIG_NAME if path.is_dir() else path
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path}: must hold a JSON object, got {type(config).__name__}")
    return config


def known_arguments() -> set[str]:
    """The arguments of all schedulers."""
    found, classes = set(), [Configured]
    while classes:
        cls = classes.pop()
        found |= {f.name for f in fields(cls)}
        classes += cls.__subclasses__()
    return found
