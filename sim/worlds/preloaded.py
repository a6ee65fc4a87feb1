"""Modules that the fork server imports once, so that no rank has to: worlds are rebuilt after every fault."""

import gc
import importlib
from contextlib import suppress

for _name in (
    "torch.distributed",
    "deepep.api.buffer",
    "deepep.backends.reference.engine",
    "deepep.sim.emulator.engine",
    "deepep.sim.fuzz.all_to_all_runs",
    "deepep.sim.fuzz.buffer_runs",
    "deepep.sim.faults.judge",
    "deepep.sim.worlds.rank_process",
):
    # A module that cannot be imported says so to whoever uses it; the fork server must not die of it.
    with suppress(Exception):
        importlib.import_module(_name)

# Collectors of ranks do not look at what is loaded here: each rank would copy nearly all of its memory.
gc.collect()
gc.freeze()
