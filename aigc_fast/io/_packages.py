"""Files that packages carry: found where these lie, and nothing of them imported."""

import importlib.util
from pathlib import Path


def package_folder(name: str, install: str) -> Path:
    """Where a package lies; ImportError that says what pip is to install where it does not.

    name:    what is imported of it.
    install: pip's options, and last what pip calls it.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ImportError(f"this needs the package {install.split()[-1]}: pip install {install}")
    return Path(spec.origin).parent
