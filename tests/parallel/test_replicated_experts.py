"""Experts on several ranks: groups that exchange tokens, each with all experts, trained as one model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from deepep.errors import MismatchError, ModeError, RangeError
from deepep.parallel.config import ParallelConfig

LONG = 300.0  # the first wrapper of a process imports the compiler of torch
MOST = 0.05  # a norm that clips


def moe_of(buffer: Any, **options: Any) -> Any:
    from deepep.nn import ExpertParallelMoE

    sizes = {"hidden": 16, "expert_hidden": 8, "num_experts": 4, "num_topk": 2, "shared_hidden": 8}
    return ExpertParallelMoE(buffer, **{**sizes, "seed": 3, "dtype": torch.float64, **options})


def tokens_of(num_ranks: int, rank: int) -> torch.Tensor:
    tokens = torch.randn(24, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return tokens.tensor_split(num_ranks)[rank]


def mesh_of(context: Any, num_ranks: int) -> Any:
    """Ranks by replica and by the experts that they hold: [R / num_ranks, num_ranks]."""
    from torch.distributed.device_mesh import init_device_mesh

    shape = (context.num_ranks // num_ranks, num_ranks)
    return init_device_mesh("cpu", shape, mesh_dim_names=("replicas", "experts"))


def named_gradients(moe: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad.detach().clone() for name, p in moe.named_parameters() if p.grad is not None}


def trained(context: Any, num_ranks: int, gradient: str) -> dict[str, Any]:
    """Gradients of three backwards, the first of which only accumulates; their norm; as they are clipped."""
    import deepep

    mesh = mesh_of(context, num_ranks)
    group = mesh["experts"].get_group()
    with deepep.Buffer(group, device="cpu", timeout=60.0) as buffer:
        moe = moe_of(buffer)
        with torch.no_grad():  # replicas begin with the first one's weights
            moe.experts.down.add_(context.rank // num_ranks)
        expert_group = mesh["replicas"] if gradient == "mean" else mesh["replicas"].get_group()
        model = deepep.DistributedDataParallel(moe, gradient=gradient, expert_group=expert_group)
        x = tokens_of(context.num_ranks, context.rank)
        share = 1.0 if gradient == "mean" else 1.0 / context.num_ranks
        with model.no_sync():
            (model(x).square().mean() * share).backward()
        for _ in range(2):
            (model(x).square().mean() * share).backward()
        found = {"whole": named_gradients(moe)}
        found["norm"] = deepep.clip_grad_norm_(model, MOST)
        found["largest"] = deepep.clip_grad_norm_(model, 1e9, float("inf"))
        found["clipped"] = named_gradients(moe)
        model.close()
    return found


@pytest.mark.parametrize("gradient", ["mean", "sum"])
def test_replicas_have_one_process_gradients(world_of: Callable[[int], Any], gradient: str) -> None:
    (alone,) = world_of(1).run(trained, 1, gradient, timeout=LONG)
    outcomes = world_of(4).run(trained, 2, gradient, timeout=LONG)
    norm = torch.cat([g.flatten() for g in alone["whole"].values()]).norm()
    torch.testing.assert_close(alone["norm"], norm, rtol=1e-12, atol=0.0)
    for rank, found in enumerate(outcomes):
        assert torch.equal(found["norm"], outcomes[0]["norm"])
        for name in ("norm", "largest"):
            torch.testing.assert_close(found[name], alone[name], rtol=1e-12, atol=0.0)
        for when in ("whole", "clipped"):
            for name, wanted in alone[when].items():
                part = wanted[2 * (rank % 2) :][:2] if name.startswith("experts.") else wanted
                torch.testing.assert_close(found[when][name], part, rtol=1e-12, atol=1e-15)


def refused(context: Any) -> list[str]:
    """Errors of wrappers whose expert_group is missing, a mesh of two dimensions, or of other experts."""
    import deepep

    mesh, found = mesh_of(context, 2), []
    with deepep.Buffer(mesh["experts"].get_group(), device="cpu", timeout=60.0) as buffer:
        for expert_group in (None, mesh, mesh["experts"]):
            try:
                deepep.DistributedDataParallel(moe_of(buffer), expert_group=expert_group)
                found.append("")
            except (MismatchError, RangeError) as error:
                found.append(f"{type(error).__name__} {error}")
    return found


def test_a_wrong_group_of_replicas_is_told(world_of: Callable[[int], Any]) -> None:
    for missing, whole_mesh, others in world_of(4).run(refused, timeout=LONG):
        assert "RangeError" in missing
        assert "the group of the 2 ranks that hold the same experts" in missing
        assert "mesh['replicas']" in whole_mesh
        assert "MismatchError" in others
        assert "experts" in others


def redundant(context: Any, num_max_tokens: int) -> dict[str, Any]:
    """Experts replicated inside a layer: what a forgotten sum says; the norm, each expert counted once."""
    import deepep
    from deepep.placement import ExpertPlacement

    found: dict[str, Any] = {}
    with deepep.Buffer(context.group, device="cpu", timeout=60.0) as buffer:
        placement = ExpertPlacement(3, 2, (0, 1, 2, 1))
        moe = moe_of(buffer, num_experts=3, placement=placement, num_max_tokens=num_max_tokens)
        optimizer = torch.optim.SGD(moe.parameters(), 0.1)
        model = deepep.DistributedDataParallel(moe)
        model(tokens_of(2, context.rank)).square().mean().backward()
        before = [p.detach().clone() for p in moe.parameters()]
        try:
            optimizer.step()
        except ModeError as error:
            found["told"] = str(error)
        found["kept"] = all(torch.equal(a, b) for a, b in zip(before, moe.parameters(), strict=True))
        moe.sum_replica_gradients()
        found["norm"] = deepep.clip_grad_norm_(model, MOST)
        optimizer.step()
        found["moved"] = not torch.equal(before[-1], list(moe.parameters())[-1])
        model.close()
    return found


def plain_norm(context: Any) -> torch.Tensor:
    import deepep

    with deepep.Buffer(context.group, device="cpu", timeout=60.0) as buffer:
        moe = moe_of(buffer, num_experts=3)
        moe(tokens_of(1, 0)).square().mean().backward()
        return deepep.clip_grad_norm_(moe, 1e9, group=context.group)


@pytest.mark.parametrize("num_max_tokens", [0, 64], ids=["any shape", "fixed shapes"])
def test_a_forgotten_sum_of_replicas_is_told_before_they_part(
    world_of: Callable[[int], Any], num_max_tokens: int
) -> None:
    (norm,) = world_of(1).run(plain_norm, timeout=LONG)
    for found in world_of(2).run(redundant, num_max_tokens, timeout=LONG):
        assert "sum_replica_gradients()" in found["told"]
        assert found["kept"]
        assert found["moved"]
        torch.testing.assert_close(found["norm"], norm, rtol=1e-12, atol=0.0)


def sharded(context: Any, num_ranks: int, config: ParallelConfig) -> dict[str, Any]:
    """Whole gradients of two backwards: dense parameters over all ranks, experts over their replicas."""
    from torch.distributed.fsdp import fully_shard

    import deepep

    mesh = mesh_of(context, num_ranks)
    with deepep.Buffer(mesh["experts"].get_group(), device="cpu", timeout=60.0) as buffer:
        moe = moe_of(buffer)
        fully_shard(moe.experts, mesh=mesh["replicas"])
        fully_shard(moe, mesh=mesh._flatten("all"))
        assert deepep.optimize(moe, config=config) is moe
        for _ in range(2):
            moe(tokens_of(context.num_ranks, context.rank)).square().mean().backward()
        found = {name: p.grad.full_tensor() for name, p in moe.named_parameters()}
        norm = deepep.clip_grad_norm_(moe, MOST)
    return {"gradients": found, "norm": norm}


def unsharded(context: Any) -> dict[str, Any]:
    import deepep

    with deepep.Buffer(context.group, device="cpu", timeout=60.0) as buffer:
        moe = moe_of(buffer)
        for _ in range(2):
            moe(tokens_of(1, 0)).square().mean().backward()
        found = {name: p.grad.clone() for name, p in moe.named_parameters()}
        return {"gradients": found, "norm": deepep.clip_grad_norm_(moe, MOST, group=context.group)}


@pytest.mark.parametrize("topology", ["auto", "native"])
def test_shards_have_one_process_gradients(world_of: Callable[[int], Any], topology: str) -> None:
    (whole,) = world_of(1).run(unsharded, timeout=LONG)
    config = ParallelConfig(topology=topology, reproducible=topology == "auto")
    for rank, found in enumerate(world_of(4).run(sharded, 2, config, timeout=LONG)):
        torch.testing.assert_close(found["norm"], whole["norm"], rtol=1e-12, atol=0.0)
        for name, wanted in whole["gradients"].items():
            part = wanted[2 * (rank % 2) :][:2] if name.startswith("experts.") else wanted
            torch.testing.assert_close(found["gradients"][name], part, rtol=1e-12, atol=1e-15)
