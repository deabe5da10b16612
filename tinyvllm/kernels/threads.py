"""How many threads the CPU kernels get, how they wait, and who may use them.

Count: one for each physical core that this process may run on. The second hardware thread of a core shares
its arithmetic units, which these kernels keep busy already. A container's CPU quota counts too.
NUMBA_NUM_THREADS overrules.

Waiting: between two parallel loops a thread first spins, ready at once, then sleeps. GNU OpenMP would spin
for milliseconds. That is right on an idle machine; on a busy one (a browser beside the notebook) the spinning
thread holds the core on which the thread that it waits for would run, and steps take a hundred times as long.
So: spin for some 20 microseconds, longer than what lies between two operations. GOMP_SPINCOUNT and
OMP_WAIT_POLICY overrule.

Who: numba's fallback pool, "workqueue", ends the process when two Python threads use it at once.
`KERNEL_LOCK` is held around each forward pass and around packing, whatever the pool: two passes at once would
only take each other's cores.
"""

import os
import threading
from pathlib import Path

import numba

__all__ = ["KERNEL_LOCK", "available_cores", "configure_threads"]

KERNEL_LOCK = threading.RLock()
SPIN_COUNT = "1000"

_configured = threading.local()  # numba keeps the number of threads per Python thread

# libgomp reads these when it is loaded, which is when numba starts its first parallel loop.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)


def available_cores() -> int:
    """Physical cores that this process may use, at least 1."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    siblings = {_read(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list", default=str(cpu))
                for cpu in allowed}
    cores = len(siblings)
    quota, _, period = _read("/sys/fs/cgroup/cpu.max", default="max").partition(" ")
    if quota.isdigit() and period.isdigit():
        cores = min(cores, -(-int(quota) // int(period)))
    return max(1, cores)


def configure_threads(count: int | None = None) -> None:
    """Set the number of threads of the calling Python thread's parallel loops.

    Without a count: `available_cores()`, unless this thread was configured before.
    """
    if count is None:
        if getattr(_configured, "done", False):
            return
        count = available_cores()
        if "NUMBA_NUM_THREADS" in os.environ:
            count = numba.config.NUMBA_NUM_THREADS
    numba.set_num_threads(min(count, numba.config.NUMBA_NUM_THREADS))
    _configured.done = True


def _read(path: str, default: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return default
