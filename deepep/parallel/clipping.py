"""clip_grad_norm_: torch's, of a model whose experts are spread over the ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from deepep.errors import ArgumentTypeError
from deepep.nn.moe import ExpertParallelMoE
from deepep.nn.precision import is_distributed
from deepep.parallel.experts import expert_parameters, group_of_replicas


@torch.no_grad()
def clip_grad_norm_(
    model: nn.Module,
    max_norm: float,
    norm_type: float = 2.0,
    *,
    error_if_nonfinite: bool = False,
    group: dist.ProcessGroup | None = None,
    expert_group: Any = None,
) -> Tensor:
    """Scales all gradients in place so that their norm is at most `max_norm`, as torch.nn.utils does it with
    a model that one process has whole: each expert counts once, whoever holds it. Collective.

    group: the ranks that hold the model together; by default those of the DistributedDataParallel that
        `model` is, else the default group.
    expert_group: of a model that is no deepep.DistributedDataParallel: the ranks that hold the same experts.
    In an attempt at a training step (`attempts`) it is a part of it: if a rank dies in it, all that are left
    clip, or the body runs again on all of them.

    Returns the norm before, a float64 scalar: the same bits on all ranks, which therefore clip alike. Raises
    RuntimeError if it is not finite and `error_if_nonfinite`, on all ranks; ArgumentTypeError.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError("model", type(model).__name__, "a module: experts are found by their layers")
    replicas = group_of_replicas(expert_group) or getattr(model, "expert_group", None)
    ranks: Any = group or getattr(model, "process_group", None) or dist.group.WORLD
    owned = {id(parameter) for _, parameter in expert_parameters(model)}
    gradients = [(id(p) in owned, p.grad) for p in model.parameters() if p.grad is not None]
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    dense = _norm([gradient for is_owned, gradient in gradients if not is_owned], norm_type, device)
    own = _norm(_counted(model, replicas), norm_type, device)
    norms = torch.stack([dense, own])
    gathered = [torch.empty_like(norms) for _ in range(dist.get_world_size(ranks))]
    steps = _steps_of(model) if group is None else None
    if steps is None:
        dist.all_gather(gathered, norms, group=ranks)
    else:  # dist.all_gather would have an error about the group in place of the group's own
        steps.after_sums(lambda: ranks.allgather([gathered], [norms]).wait())
    # All ranks have the same dense ones, of which the first rank's bits count; experts' norms go by rank.
    counted = torch.stack([gathered[0][0], *(found[1] for found in gathered)])
    total = torch.linalg.vector_norm(counted, norm_type)
    if error_if_nonfinite and not bool(total.isfinite()):
        raise RuntimeError(f"the norm of the gradients is {float(total)}; gradients are as they were")
    coefficient = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for _, gradient in gradients:
        _local_part(gradient).mul_(coefficient)
    return total


def _steps_of(model: nn.Module) -> Any:
    """The state of a DistributedDataParallel's attempts, if it takes its steps in such."""
    return getattr(getattr(model, "_bucket_reducer", None), "steps", None)


def _counted(model: nn.Module, replicas: dist.ProcessGroup | None) -> list[Tensor]:
    """Gradients of the experts that this rank counts: of those that several ranks hold, the first does."""
    is_first = replicas is None or replicas.rank() == 0
    rows: dict[int, list[int]] = {}  # of the experts that a layer has the first replica of, by parameter
    for part in model.modules():
        if isinstance(part, ExpertParallelMoE):
            rows.update((id(parameter), part.first_replicas()) for parameter in part.expert_parameters())
    counted = []
    for _, parameter in expert_parameters(model):
        gradient = parameter.grad
        if gradient is None:
            continue
        if is_distributed(gradient):  # shards: each rank counts its own
            counted.append(_local_part(gradient))
        elif is_first:
            counted.append(gradient[rows[id(parameter)]] if id(parameter) in rows else gradient)
    return counted


def _norm(gradients: list[Tensor], norm_type: float, device: torch.device) -> Tensor:
    """The norm of all of them as a float64 scalar."""
    norms = [torch.zeros((), dtype=torch.float64, device=device)]
    for gradient in gradients:
        wide = torch.promote_types(gradient.dtype, torch.float32)
        norm = torch.linalg.vector_norm(gradient, norm_type, dtype=wide)
        norms.append((norm.full_tensor() if is_distributed(norm) else norm).double())
    return torch.linalg.vector_norm(torch.stack(norms), norm_type)


def _local_part(tensor: Any) -> Tensor:
    """The tensor, or this rank's shard of a DTensor."""
    part: Tensor = tensor.to_local() if is_distributed(tensor) else tensor
    return part
