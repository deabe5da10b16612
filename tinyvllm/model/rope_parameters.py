"""What config.json says about rotary position embeddings, in any of its spellings.

    older files   "rope_theta": 500000.0,  "rope_scaling": {"rope_type" (or "type"): "llama3", ...}
    newer files   "rope_parameters": {"rope_theta": 500000.0, "rope_type": "llama3", ...}

The tables made from it are in rope_table.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tinyvllm.errors import ConfigError

DEFAULT_THETA = 10000.0  # of a Llama config that gives none

# rope type -> the keys that it needs beside rope_theta
ROPE_TYPES: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
_SPELLED_TYPE = ("rope_type", "type")
_KNOWN_KEYS = {*_SPELLED_TYPE, "rope_theta", "factor", "low_freq_factor", "high_freq_factor",
               "original_max_position_embeddings"}  # fmt: skip


@dataclass(frozen=True)
class RopeParameters:
    """The rotary embedding of a model.

    rope_type: "default" (frequencies as they are), "linear" (all divided by `factor`) or "llama3" (slow ones
    divided by `factor`, fast ones kept, a blend between; see rope_table.inv_freq).
    theta: the base of the frequencies. The other fields matter to the types that name them in ROPE_TYPES;
    original_max_position_embeddings is the context length, in tokens, before llama3 scaling.
    """

    theta: float = DEFAULT_THETA
    rope_type: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 0

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "RopeParameters":
        """Read them from a config.json dict. Raises ConfigError if something is unknown or missing."""
        section, given = _rope_section(config)
        unknown = sorted(set(given) - _KNOWN_KEYS)
        if unknown:
            raise ConfigError(
                f"config.json: {section} has the key(s) {', '.join(map(repr, unknown))}, which are not "
                f"supported (known: {', '.join(sorted(_KNOWN_KEYS))})"
            )
        rope_type = _rope_type(section, given)
        missing = [key for key in ROPE_TYPES[rope_type] if given.get(key) is None]
        if missing:
            raise ConfigError(
                f"config.json: {section} of type {rope_type!r} lacks {', '.join(map(repr, missing))}"
            )
        if rope_type == "default" and given.get("factor") not in (None, 1, 1.0):
            raise ConfigError(
                f"config.json: {section} has factor {given['factor']!r} but type 'default', which does not "
                "scale: give the type ('linear' or 'llama3') or leave out the factor"
            )
        numbers = {
            key: _positive(section, key, given[key])
            for key in ("factor", "low_freq_factor", "high_freq_factor")
            if given.get(key) is not None
        }
        parameters = cls(
            theta=_theta(config, section, given),
            rope_type=rope_type,
            original_max_position_embeddings=_original_context(config, section, given, rope_type),
            **numbers,
        )
        if rope_type == "llama3" and parameters.high_freq_factor <= parameters.low_freq_factor:
            raise ConfigError(
                f"config.json: {section} has high_freq_factor {parameters.high_freq_factor:g}, which must be "
                f"above low_freq_factor {parameters.low_freq_factor:g}"
            )
        return parameters


def _rope_section(config: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """The one section that describes the rotary embedding, by name; empty if there is none."""
    sections = {name: config[name] for name in ("rope_scaling", "rope_parameters") if config.get(name)}
    for name, value in sections.items():
        if not isinstance(value, Mapping):
            raise ConfigError(f"config.json: {name} must be an object {{...}} or null, got {value!r}")
    if len(sections) == 2 and sections["rope_scaling"] != sections["rope_parameters"]:
        raise ConfigError("config.json: rope_scaling and rope_parameters are both there and differ: keep one")
    for name, value in sections.items():
        return name, value
    return "rope_parameters", {}


def _rope_type(section: str, given: Mapping[str, Any]) -> str:
    spelled = {given[key] for key in _SPELLED_TYPE if isinstance(given.get(key), str)}
    other = [
        given[key] for key in _SPELLED_TYPE if given.get(key) is not None and not isinstance(given[key], str)
    ]
    if len(spelled) > 1 or other:
        values = ", ".join(f"{key} {given[key]!r}" for key in _SPELLED_TYPE if key in given)
        raise ConfigError(f"config.json: {section} must name one type, got {values}")
    if not spelled and given.keys() - {"rope_theta"}:
        raise ConfigError(
            f"config.json: {section} does not say its rope_type (supported: {', '.join(ROPE_TYPES)})"
        )
    rope_type = spelled.pop() if spelled else "default"
    if rope_type not in ROPE_TYPES:
        raise ConfigError(
            f"config.json: rope type {rope_type!r} is not supported (supported: {', '.join(ROPE_TYPES)})"
        )
    return rope_type


def _theta(config: Mapping[str, Any], section: str, given: Mapping[str, Any]) -> float:
    top, inside = config.get("rope_theta"), given.get("rope_theta")
    if top is not None and inside is not None and top != inside:
        raise ConfigError(
            f"config.json: rope_theta is {top!r}, but {section} says {inside!r}: keep one of the two"
        )
    if inside is not None:
        return _positive(section, "rope_theta", inside)
    return DEFAULT_THETA if top is None else _positive("the top level", "rope_theta", top)


def _original_context(
    config: Mapping[str, Any], section: str, given: Mapping[str, Any], rope_type: str
) -> int:
    value = given.get("original_max_position_embeddings")
    if value is None and rope_type == "llama3":
        value = config.get("original_max_position_embeddings", config.get("max_position_embeddings"))
    return 0 if value is None else int(_positive(section, "original_max_position_embeddings", value))


def _positive(section: str, key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise ConfigError(f"config.json: {key} in {section} must be a number above 0, got {value!r}")
    return float(value)
