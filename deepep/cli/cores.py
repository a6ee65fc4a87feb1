"""Cores that this process may use, whatever limits it: affinity, or the quota of a container."""

from __future__ import annotations

import os
from pathlib import Path


def usable_cores(groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Cores that this process may run on, or fewer if its control group has a quota, as `docker --cpus` and a
    Kubernetes limit set it. At least 1. groups: where control groups are mounted, of either version.
    """
    present = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = _text(groups / "cpu.max").partition(" ")  # "200000 100000", or "max 100000"
    if not quota:
        quota, period = (_text(groups / "cpu" / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
    if not (quota.isdigit() and period.isdigit() and int(period)):
        return present  # "max" or -1: no quota
    return max(1, min(present, round(int(quota) / int(period))))


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
