"""From what the user calls a model to the folder that holds it. Nothing is downloaded."""

import os
import re
from pathlib import Path

from tinyvllm.errors import ModelNotFoundError

DEMO_NAME = "demo"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def resolve_model(model: str | os.PathLike) -> Path:
    """The folder of a model, given as one of

    - "demo": the embedded model (for a folder of that name, write "./demo")
    - a folder in the Hugging Face layout
    - a hub id, such as "meta-llama/Llama-3.2-1B-Instruct", that is already in the local Hugging Face cache

    Raises ModelNotFoundError that says where it looked and how to get the model.
    """
    if not isinstance(model, (str, os.PathLike)) or not os.fspath(model):
        raise ModelNotFoundError(f"a model is a folder, a hub id, or {DEMO_NAME!r}, got {model!r}")
    name = os.fspath(model)
    if name == DEMO_NAME:
        return _demo_folder()
    folder = Path(name).expanduser()
    if os.path.isdir(folder):  # unlike Path.is_dir it does not raise for a name that is too long
        return folder
    if os.path.isfile(folder):
        raise ModelNotFoundError(f"{name} is a file: give the folder that holds config.json")
    if len(name) > 200 or not _HUB_ID.fullmatch(name):
        raise ModelNotFoundError(
            f"there is no folder {name[:200]!r}: give a model folder, a hub id, or {DEMO_NAME!r}"
        )
    return _cached_snapshot(name)


def demo_model_folder() -> Path:
    """Where the embedded model lies, or would lie."""
    return Path(__file__).resolve().parent.parent / "demo" / "model"


def hub_cache_folder() -> Path:
    """The local Hugging Face cache, by the same environment variables that the hub's own client reads."""
    for variable, below in (("HF_HUB_CACHE", ""), ("HUGGINGFACE_HUB_CACHE", ""), ("HF_HOME", "hub"),
                            ("XDG_CACHE_HOME", "huggingface/hub")):  # fmt: skip
        if os.environ.get(variable):
            return Path(os.environ[variable]).expanduser() / below
    return Path.home() / ".cache" / "huggingface" / "hub"


def _demo_folder() -> Path:
    folder = demo_model_folder()
    if not (folder / "config.json").is_file():
        raise ModelNotFoundError(
            f"the embedded model is not in this installation: {folder} has no config.json"
        )
    return folder


def _cached_snapshot(hub_id: str) -> Path:
    cache = hub_cache_folder()
    repository = cache / ("models--" + hub_id.replace("/", "--"))
    advice = f"download it with `hf download {hub_id}` (or `huggingface-cli download {hub_id}`)"
    if not repository.is_dir():
        raise ModelNotFoundError(
            f"no model {hub_id!r}: there is no such folder, and the local Hugging Face cache ({cache}) does "
            f"not have it. If it is a hub id, {advice}; nothing is downloaded here"
        )
    snapshots = sorted(path for path in (repository / "snapshots").glob("*") if path.is_dir())
    main = repository / "refs" / "main"
    if main.is_file():
        snapshot = repository / "snapshots" / main.read_text(encoding="utf-8").strip()
    elif len(snapshots) == 1:
        snapshot = snapshots[0]
    else:
        choices = f"one of {', '.join(map(str, snapshots))}" if snapshots else "none is there"
        raise ModelNotFoundError(
            f"the cache entry {repository} has no main revision: give the path of a snapshot ({choices}), or "
            f"{advice}"
        )
    if not (snapshot / "config.json").is_file():
        raise ModelNotFoundError(
            f"the cache entry of {hub_id!r} is incomplete: {snapshot} has no config.json; {advice} again"
        )
    return snapshot
