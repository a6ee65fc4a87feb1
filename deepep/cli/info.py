"""`deepep info`: what this machine offers, and which backends can be used."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import platform
import shutil
import subprocess
from typing import Annotated

import torch
import torch.distributed as dist
import typer
from rich.table import Table

from deepep.backends.cuda.memory.nvshmem4py import PACKAGES, installed
from deepep.backends.cuda.memory.nvshmem_settings import in_force
from deepep.backends.cuda.memory.remote import why_not
from deepep.cli.cores import usable_cores
from deepep.cli.terminal import make_console
from deepep.runtime.backends import backends as registered_backends
from deepep.runtime.capabilities import compiled
from deepep.version import __version__

#: Extension module -> what it is for.
EXTENSIONS = {
    "_core": "layout rules (C++)",
    "_emulator": "the kernels' source, run on the CPU",
    "_cuda": "the kernels",
}
Section = dict[str, str]


def command(as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False) -> None:
    """Says what this machine offers, and for every backend whether it can be used and if not, why."""
    sections = {
        "software": software(),
        "extensions": extensions(),
        "cuda": cuda(),
        "nvshmem": nvshmem(),
        "backends": backends(),
    }
    if as_json:
        print(json.dumps(sections, indent=2))
        return
    console = make_console()
    for title, section in sections.items():
        table = Table(title=title, title_justify="left", title_style="bold", show_header=False, box=None)
        table.add_column(style="cyan", no_wrap=True)
        table.add_column()
        for name, value in section.items():
            table.add_row(name, value)
        console.print(table)
        console.print()


def software() -> Section:
    """Versions, and the transports of torch.distributed."""
    transports = [
        name
        for name, there in (
            ("gloo", dist.is_available() and dist.is_gloo_available()),
            ("nccl " + nccl_version(), dist.is_available() and dist.is_nccl_available()),
            ("mpi", dist.is_available() and dist.is_mpi_available()),
        )
        if there
    ]
    return {
        "deepep": __version__,
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "torch.distributed": ", ".join(transports) or "none",
        "cores": str(usable_cores()),
    }


def nccl_version() -> str:
    """As "2.27.3"; empty without NCCL."""
    if not (dist.is_available() and dist.is_nccl_available()):
        return ""
    return ".".join(map(str, torch.cuda.nccl.version()))


def extensions() -> Section:
    """Each compiled module: built, and does it load."""
    return {f"deepep.{name}": f"{_extension(name)} ({purpose})" for name, purpose in EXTENSIONS.items()}


def _extension(name: str) -> str:
    if importlib.util.find_spec(f"deepep.{name}") is None:
        return "not built"
    try:
        importlib.import_module(f"deepep.{name}")
    except ImportError as error:
        return f"built, does not load: {error}"
    if name == "_cuda":
        return f"built for {', '.join(compiled())}, loads"
    return "built, loads"


def cuda() -> Section:
    """GPUs, and how they reach each other."""
    if torch.version.cuda is None:
        return {"torch": "built without CUDA"}
    if not torch.cuda.is_available():
        return {"torch": f"built for CUDA {torch.version.cuda}", "devices": "none"}
    found = {"torch": f"built for CUDA {torch.version.cuda}"}
    count = torch.cuda.device_count()
    for index in range(count):
        device = torch.cuda.get_device_properties(index)
        peers = [j for j in range(count) if j != index and torch.cuda.can_device_access_peer(index, j)]
        reach = f"; reaches GPU {', '.join(map(str, peers))} directly" if peers else ""
        found[f"GPU {index}"] = (
            f"{device.name}, sm_{device.major}{device.minor}, {device.multi_processor_count} SMs, "
            f"{device.total_memory / 2**30:.0f} GiB{reach}"
        )
    links = nvlinks()
    if links:
        found["links"] = links
    return found


def nvlinks() -> str:
    """nvidia-smi's table of links between the GPUs; empty without nvidia-smi."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ""
    try:
        done = subprocess.run([tool, "topo", "-m"], capture_output=True, text=True, timeout=30, check=False)
    except subprocess.TimeoutExpired:
        return "nvidia-smi did not answer within 30 s"
    rows = [line for line in done.stdout.splitlines() if line.startswith(("GPU", "\tGPU", "\x1b"))]
    return "\n".join(rows)


def nvshmem() -> Section:
    """The Python binding and the host library, what is missing of them, and the variables that are set."""
    found: Section = {}
    for package in ("nvshmem4py-cu13", "nvshmem4py-cu12", "nvidia-nvshmem-cu13", "nvidia-nvshmem-cu12"):
        version = installed(package)
        if version:
            tested = PACKAGES.get(package, version)
            found[package] = version + (f" (tested: {tested})" if version != tested else "")
    lacking = why_not()
    found["usable"] = f"no: {lacking}; needed between nodes alone" if lacking else "yes: nothing is missing"
    return {**found, **in_force()}


def backends() -> Section:
    """Each backend: usable or why not."""
    found: Section = {}
    for backend in registered_backends():
        able, why = backend.available()
        found[backend.name] = f"{'yes' if able else 'no'}: {why}"
    wanted = os.environ.get("DEEPEP_BACKEND")
    if wanted:
        found["DEEPEP_BACKEND"] = f"{wanted} (set: it overrides the choice)"
    return found
