"""FSDP2 through its own setters: compressed reduce-scatters of a unit's gradients, and experts' divisors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from deepep.collectives import Communicator
from deepep.collectives.codecs import FIXED, LOSSY, PLAIN
from deepep.errors import ModeError
from deepep.parallel.config import ParallelConfig
from deepep.parallel.experts import check_replicas, expert_parameters, scale_gradients

_MEANS = {"RedOpType.SUM": False, "RedOpType.AVG": True}


class GradientScatter:
    """Called by a unit of FSDP2 in place of torch's reduce-scatter (`set_custom_reduce_scatter`)."""

    def __init__(self, comm: Communicator, config: ParallelConfig, number: int) -> None:
        self.comm, self.config, self.number, self.step = comm, config, number, 0

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Room for an addend or a result."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        """output_tensor [N]: this rank's part of the sum or mean of input_tensor [R * N] over the ranks."""
        if str(op) not in _MEANS:
            raise ModeError("op", str(op), "a sum or a mean: no factor inside the reduction")
        codec, dice = self._codec(input_tensor), None
        if codec in LOSSY and self.config.rounding == "stochastic":
            dice = (self.config.seed, self.step, self.number)
        self.step += 1
        self.comm.reduce_scatter(output_tensor, input_tensor, codec, mean=_MEANS[str(op)], dice=dice)

    def _codec(self, tensor: Tensor) -> str:
        config, size = self.config, tensor.numel() * tensor.element_size()
        if config.compression == "off" or size < config.min_compressed_bytes:
            return FIXED if config.reproducible else PLAIN
        return "fp8" if config.compression == "auto" else str(config.compression)


def optimize_sharded(model: nn.Module, config: ParallelConfig) -> None:
    """Has the units of an FSDP2 model reduce by `config`, and experts' gradients divided as the others are.

    Collective over the ranks of each mesh. Raises ModeError or RangeError, before anything is changed.
    """
    experts = dict(expert_parameters(model))
    owned = {id(parameter) for parameter in experts.values()}
    dense: list[tuple[Any, list[DTensor]]] = []
    own: list[tuple[Any, list[DTensor]]] = []
    for unit, parameters in _units(model):
        kinds = {id(parameter) in owned for parameter in parameters}
        if len(kinds) == 2:
            allowed = "experts in units of their own, or in ignored_params"
            raise ModeError("target", "a unit of FSDP with experts and other parameters", allowed)
        if kinds:
            (own if kinds == {True} else dense).append((unit, parameters))
    num_ranks = dense[0][1][0].device_mesh.size() if dense else dist.get_world_size()
    sharded = {id(parameter) for _, parameters in own for parameter in parameters}
    plain = [parameter for parameter in experts.values() if id(parameter) not in sharded]
    if own and plain:
        raise ModeError("target", "some experts sharded, and some not", "all of them, or none")
    if experts:
        num_replicas = own[0][1][0].device_mesh.size() if own else 1
        check_replicas(model, num_ranks, num_replicas)
    scale_gradients(plain, 1, num_ranks)
    for unit, _ in own:
        unit.set_gradient_divide_factor(float(num_ranks))
        unit.set_force_sum_reduction_for_comms(True)  # only NCCL has sums with a factor inside
    if config.is_torchs:
        return
    comms: dict[int, Communicator] = {}
    for number, (unit, parameters) in enumerate([*dense, *own]):
        mesh = parameters[0].device_mesh
        if mesh.size() == 1:
            continue
        group = mesh.get_group(mesh.ndim - 1)  # of (replicate, shard) the second
        if id(group) not in comms:
            comms[id(group)] = Communicator(
                group,
                device="cpu"
                if mesh.device_type == "cpu"
                else torch.device("cuda", torch.cuda.current_device()),
                timeout=config.seconds,
                statement={"config": repr(config)},
            )
        unit.set_custom_reduce_scatter(GradientScatter(comms[id(group)], config, number))


def _units(model: nn.Module) -> Iterator[tuple[Any, list[Any]]]:
    """Modules that fully_shard was called on, with the parameters that they shard themselves."""
    taken: set[int] = set()
    for unit in reversed(list(model.modules())):  # the innermost first
        if isinstance(unit, FSDPModule):
            mine = [p for p in unit.parameters() if isinstance(p, DTensor) and id(p) not in taken]
            taken.update(id(parameter) for parameter in mine)
            yield unit, mine
