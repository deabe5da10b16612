"""What a measurement was taken on: figures without hardware and versions are worth nothing."""

import datetime
import importlib.metadata
import os
import platform


def describe_environment(*extra_packages: str) -> dict[str, str | int]:
    """Processor, cores, operating system, Python, and the versions of the packages that matter."""
    found = {"date": datetime.date.today().isoformat(), "processor": processor_name(), "cores": os.cpu_count() or 0,
             "system": platform.system(), "python": platform.python_version()}
    for name in ("tinyvllm", "numpy", "numba", "llvmlite", *extra_packages):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass
    return found


def processor_name() -> str:
    """The model name, with the instruction sets that decide which kernels run."""
    try:
        with open("/proc/cpuinfo") as info:
            fields = dict(line.split(":", 1) for line in info if ":" in line)
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    fields = {name.strip(): value.strip() for name, value in fields.items()}
    flags = set(fields.get("flags", "").split()) & {"avx2", "avx512f", "avx512_bf16"}
    return f"{fields.get('model name', platform.machine())} (family {fields.get('cpu family', '?')}: " \
           f"{', '.join(sorted(flags))})"
