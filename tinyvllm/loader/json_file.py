"""Reading the small JSON files of a model folder, with errors that name the file and the place in it."""

import json
from pathlib import Path
from typing import Any

from tinyvllm.errors import ModelFileError, ModelNotFoundError, TinyVLLMError


def read_json_object(path: str | Path, error: type[TinyVLLMError] = ModelFileError) -> dict[str, Any]:
    """The JSON object in the file `path`.

    Raises ModelNotFoundError if there is no such file, and `error` if it is not UTF-8, not JSON, or not an
    object.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise ModelNotFoundError(f"{path} does not exist") from None
    except OSError as problem:
        raise error(f"{path} cannot be read: {problem.strerror or problem}") from problem
    try:
        value = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as problem:
        raise error(f"{path} is not UTF-8 text (byte {problem.start}): it must be a JSON file") from None
    except json.JSONDecodeError as problem:
        raise error(
            f"{path} is not valid JSON: {problem.msg} at line {problem.lineno}, column {problem.colno}"
        ) from None
    except (
        ValueError,
        RecursionError,
    ) as problem:  # a number of thousands of digits, thousands of nested lists
        raise error(f"{path} is not usable JSON: {problem}") from None
    if not isinstance(value, dict):
        raise error(f"{path} must hold a JSON object {{...}}, but it holds a {type(value).__name__}")
    return value


def refuse_dangling_link(path: Path) -> None:
    """Raise ModelNotFoundError if `path` is a link whose target is gone, as in a cache that was tidied up."""
    if path.is_symlink() and not path.exists():
        raise ModelNotFoundError(f"{path} is a link to a file that is not there any more: download the model again")
