"""tinyvllm: an LLM inference engine you can see inside.

    from tinyvllm import LLM, SamplingParams

The public names are loaded on first use, so that `import tinyvllm` is instant.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_EXPORTS = {
    "LLM": "tinyvllm.llm",
    "SamplingParams": "tinyvllm.sampling_params",
    "EngineConfig": "tinyvllm.config",
    "LLMEngine": "tinyvllm.engine.llm_engine",
    "LiveEngine": "tinyvllm.engine.live",
    "ReplayEngine": "tinyvllm.engine.replay",
    "ModelConfig": "tinyvllm.model.config",
    "RequestOutput": "tinyvllm.outputs",
    "CompletionOutput": "tinyvllm.outputs",
    "TinyVLLMError": "tinyvllm.errors",
}
__all__ = [*_EXPORTS, "__version__"]

if TYPE_CHECKING:
    from tinyvllm.config import EngineConfig
    from tinyvllm.engine.live import LiveEngine
    from tinyvllm.engine.llm_engine import LLMEngine
    from tinyvllm.engine.replay import ReplayEngine
    from tinyvllm.errors import TinyVLLMError
    from tinyvllm.llm import LLM
    from tinyvllm.model.config import ModelConfig
    from tinyvllm.outputs import CompletionOutput, RequestOutput
    from tinyvllm.sampling_params import SamplingParams


def __getattr__(name: str):
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'tinyvllm' has no attribute {name!r}")


def __dir__():
    return __all__
