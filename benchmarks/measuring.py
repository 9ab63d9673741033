"""Resources used by a process, and the machine it ran on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np


def cpu_seconds() -> float:
    """User and system seconds of this process and its ended children."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def memory(field: str) -> int:
    """Bytes of this process from /proc: VmRSS now, VmHWM at its peak (ru_maxrss starts with the parent's)."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def machine() -> dict[str, Any]:
    """Machine and versions of a measurement."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "av": av.__version__,
        "libraries": {name: ".".join(map(str, version)) for name, version in av.library_versions.items()},
        "opencv": cv2.__version__,
        "numpy": np.__version__,
        "pillow": importlib.metadata.version("pillow"),
    }
