"""optimize: has what is there, a model, a group or all of torch.distributed, communicate by this library."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed import distributed_c10d as c10d
from torch.nn.parallel import DistributedDataParallel as TorchDistributedDataParallel

from deepep.errors import ArgumentTypeError, ModeError
from deepep.parallel.config import ParallelConfig, get_config
from deepep.parallel.ddp import DistributedDataParallel, attach
from deepep.parallel.experts import expert_parameters
from deepep.parallel.group import CommGroup


def optimize(
    target: Any = None, *, config: ParallelConfig | None = None, compress_collectives: bool = False
) -> Any:
    """Has `target` communicate through deepep, by `config` or the options that hold here. Collective.

    a module: becomes a DistributedDataParallel; one that is torch's gets this library's hook and is returned
        as it is; one of this library's is returned as it is; of one that fully_shard was called on, the
        reduce-scatters of gradients become ours, and experts are divided as the others are (once it is
        sharded whole, before the first step).
    a process group: a group over the same ranks, to be passed as `group=`, whose all-reduces are ours.
    None: the default process group's all-reduces, from now on. Returns an `Optimized`, which ends it, by
        `restore()` or at the end of its `with` block.

    Collectives of groups are compressed only with `compress_collectives`: the all-reduce of a metric must not
    lose bits by surprise. Operations, dtypes and reductions that have no schedule here are the group's own.
    Raises ArgumentTypeError for anything else, ModeError without a default group, for models of FSDP1, and
    for a torch DDP that has a hook, or averages experts.
    """
    options = config or get_config()
    if isinstance(target, DistributedDataParallel):
        return target
    if isinstance(target, TorchDistributedDataParallel):
        if target._comm_hooks:
            raise ModeError("target", "a model with a communication hook", "one without")
        if any(name not in target.parameters_to_ignore for name, _ in expert_parameters(target.module)):
            allowed = "deepep.DistributedDataParallel: torch's averages over ranks with different experts"
            raise ModeError("target", "torch's DistributedDataParallel of a model with experts", allowed)
        object.__setattr__(target, "_bucket_reducer", attach(target, options))
        return target
    if isinstance(target, nn.Module):
        if hasattr(target, "_fsdp_wrapped_module"):
            raise ModeError("target", type(target).__name__, "models sharded by fully_shard, or plain ones")
        if any(hasattr(part, "set_custom_reduce_scatter") for part in target.modules()):
            from deepep.parallel.sharded import optimize_sharded  # torch's takes seconds to import

            optimize_sharded(target, options)
            return target
        return DistributedDataParallel(target, config=options)
    if isinstance(target, dist.ProcessGroup):
        return CommGroup(target, options, compress_collectives)
    if target is not None:
        allowed = "a module, a torch.distributed process group, or None"
        raise ArgumentTypeError("target", type(target).__name__, allowed)
    if not dist.is_initialized():
        raise ModeError("target", "None, without a default process group", "init_process_group called before")
    return Optimized(CommGroup(c10d._get_default_group(), options, compress_collectives))


class Optimized:
    """The default process group, replaced in torch's own registry until `restore`."""

    def __init__(self, group: CommGroup) -> None:
        self.group = group
        for table in _registries():
            if group.beneath in table:
                table[group] = table[group.beneath]
        c10d._world.default_pg = group

    def restore(self) -> None:
        """Puts back the group as it was. Collective, idempotent."""
        if c10d._world.default_pg is self.group:
            c10d._world.default_pg = self.group.beneath
            for table in _registries():
                table.pop(self.group, None)
            self.group.close()

    def __enter__(self) -> Optimized:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.restore()


def _registries() -> list[dict[Any, Any]]:
    """torch's tables of what it knows of a group."""
    world: Any = c10d._world
    return [
        *(world.pg_map, world.pg_names, world.pg_group_ranks, world.pg_backend_config, world.pg_to_tag),
    ]
