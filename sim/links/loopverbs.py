"""Build of csrc/loopverbs, a libibverbs.so.1 over shared memory, and what it counted. For tests.

A process that has it preloaded finds one InfiniBand device; processes of one session see each other through
it. It is made for NVSHMEM's IBRC transport (docs/domains.md).
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

SOURCES = Path(__file__).resolve().parents[2] / "csrc" / "loopverbs"
FLAGS = (
    *("-std=c++20", "-O1", "-g", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall", "-Wextra"),
    *("-static-libstdc++", "-static-libgcc"),
)
#: Processes of a session, and where csrc/loopverbs/hub.hpp has its counters.
MAX_PROCESSES = 16
_COUNTERS_BEGIN, _COUNTERS_BYTES = 64, 64


class WireError(RuntimeError):
    """The wire cannot be built or started here."""


@dataclass(frozen=True)
class WireTraffic:
    """Totals of what one process sent another: work requests, pieces of writes, their bytes, atomics.

    late: writes that landed behind later ones. service_level, traffic_class: the lanes it asked for.
    """

    requests: int
    writes: int
    bytes: int
    atomics: int
    late: int
    service_level: int = 0
    traffic_class: int = 0


def why_not() -> str:
    """The reason why the wire cannot be built here; empty if it can."""
    if not SOURCES.is_dir():
        return "csrc/loopverbs is not here: it is part of a checkout, not of the installed package"
    if shutil.which(_compiler()[0]) is None:
        return f"there is no C++ compiler ({_compiler()[0]})"
    return ""


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "g++"))


def library() -> Path:
    """The library, built if its sources have changed since. Raises WireError."""
    reason = why_not()
    if reason:
        raise WireError(reason)
    files = sorted(path for path in SOURCES.iterdir() if path.suffix in (".cpp", ".hpp", ".map"))
    digest = hashlib.sha256(repr((_compiler(), FLAGS)).encode())
    for path in files:
        digest.update(path.read_bytes())
    folder = SOURCES.parents[1] / "build" / "loopverbs" / digest.hexdigest()[:16]
    target = folder / "libibverbs.so.1"
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one process builds it, the others wait
        if not target.exists():
            _build(files, target)
    return target


def _build(files: list[Path], target: Path) -> None:
    made = target.with_name(f"{target.name}.{os.getpid()}")
    command = [*_compiler(), *FLAGS, f"-I{SOURCES.parent}"]
    command += [str(path) for path in files if path.suffix == ".cpp"]
    command += ["-Wl,-soname,libibverbs.so.1", f"-Wl,--version-script={SOURCES / 'exports.map'}"]
    done = subprocess.run([*command, "-o", str(made), "-ldl", "-lpthread"], capture_output=True, text=True)
    if done.returncode:
        raise WireError(done.stderr[-2000:])
    os.replace(made, target)  # whole


def session_file(session: str) -> Path:
    """The shared memory of a session."""
    return Path("/dev/shm") / f"loopverbs.{session}"


def traffic(session: str) -> dict[tuple[int, int], WireTraffic]:
    """Totals by (from, to) of all pairs that exchanged anything in a session whose file is still there."""
    with session_file(session).open("rb") as file:
        file.seek(_COUNTERS_BEGIN)
        raw = file.read(MAX_PROCESSES * MAX_PROCESSES * _COUNTERS_BYTES)
    words = memoryview(raw).cast("Q")
    found = {}
    for pair in range(len(words) // 8):
        sent = WireTraffic(*words[8 * pair : 8 * pair + 7])
        if sent.requests:
            found[divmod(pair, MAX_PROCESSES)] = sent
    return found
