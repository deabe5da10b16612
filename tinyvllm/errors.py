"""Errors a user can act on. Each message says what was given, what is allowed, and what to do.

Every error that bad input can cause derives from `TinyVLLMError`, so that a notebook can catch all of them
with one `except`, and each also derives from the built-in exception that Python users expect (`ValueError`
for a bad value, `FileNotFoundError` for a missing file, ...).
"""


class TinyVLLMError(Exception):
    """Base of every error that tinyvllm raises on purpose."""


class ConfigError(TinyVLLMError, ValueError):
    """An engine option or a field of config.json that is unknown, contradictory or not supported."""


class ModelFileError(TinyVLLMError, ValueError):
    """A model file that exists but cannot be right: truncated, overlapping tensors, wrong shape or dtype."""


class ModelNotFoundError(TinyVLLMError, FileNotFoundError):
    """The model folder, or a file that it must hold, is not there."""


class TokenizerError(TinyVLLMError, ValueError):
    """The tokenizer or its chat template is missing or broken."""


class RequestError(TinyVLLMError, ValueError):
    """One request cannot be served (empty prompt, too long, bad sampling parameters); others are not affected."""


class DeviceError(TinyVLLMError, RuntimeError):
    """The device asked for is not there or is not able enough."""


class OutOfDeviceMemoryError(DeviceError, MemoryError):
    """An allocation did not fit: the message says how much was asked for and how much is free."""
