"""Clear errors where the optional packages of the recipe are missing."""

import importlib

from tinyvllm.errors import TinyVLLMError


class MissingExtraError(TinyVLLMError, ImportError):
    """A package of the `train` extra is not installed."""


def require(*packages: str):
    """Import the `train` extra's packages (torch, transformers ...), the first of them returned.

    Raises MissingExtraError that names what is missing and how to get it.
    """
    modules = []
    for package in packages:
        try:
            modules.append(importlib.import_module(package))
        except ImportError as error:
            raise MissingExtraError(
                f"The demo model's recipe needs {package!r}, which is not installed ({error}). "
                "In the folder of tinyvllm: pip install -e '.[train]'. The shipped model runs without it."
            ) from error
    return modules[0]
