"""Looking into a running engine between two steps: see probe.py."""

from tinyvllm.probe.errors import ProbeError
from tinyvllm.probe.probe import Probe

__all__ = ["Probe", "ProbeError"]
