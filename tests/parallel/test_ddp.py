"""DistributedDataParallel in place of torch's: one line changes, and what it promises holds."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

from deepep.parallel.config import ParallelConfig
from deepep.sim import World

LONG = 300.0  # the first wrapper of a process imports the compiler of torch


def model_of(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(0)
    nn = torch.nn
    return nn.Sequential(nn.Linear(40, 200), nn.BatchNorm1d(200), nn.ReLU(), nn.Linear(200, 8)).to(dtype)


def batch_of(rank: int, step: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(6, 40, generator=torch.Generator().manual_seed(100 * step + rank)).to(dtype)


def gradients(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])


def train(model: torch.nn.Module, rank: int, steps: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Gradients of the last of some steps of SGD."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(steps):
        optimizer.zero_grad()
        model(batch_of(rank, step, dtype)).square().mean().backward()
        optimizer.step()
    return gradients(model)


def as_torch(context: Any, dtype: torch.dtype, options: dict[str, Any], exact: bool) -> bool:
    """Two ranks' sums have one order: torch's bits."""
    import deepep

    torch_ddp = torch.nn.parallel.DistributedDataParallel(
        model_of(dtype), process_group=context.group, **options
    )
    config = ParallelConfig(reproducible=False)
    ours = deepep.DistributedDataParallel(
        model_of(dtype), process_group=context.group, config=config, bucket_cap_mb=0.01, **options
    )
    assert isinstance(ours, torch.nn.parallel.DistributedDataParallel)
    a, b = (train(model, context.rank, 3, dtype) for model in (ours, torch_ddp))
    assert list(ours.state_dict()) == list(torch_ddp.state_dict())
    torch_ddp.load_state_dict(ours.state_dict())
    ours.load_state_dict(torch_ddp.state_dict())
    assert ours.report()["steps"] == 3
    ours.close()
    return torch.equal(a, b) if exact else bool((a - b).norm() <= 1e-6 * b.norm())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"find_unused_parameters": True},
        {"static_graph": True},
        {"gradient_as_bucket_view": True},
    ],
    ids=str,
)
def test_uncompressed_it_has_torchs_bits(world_of: Callable[[int], Any], options: dict[str, Any]) -> None:
    for dtype in (torch.float32, torch.float64):
        assert all(world_of(2).run(as_torch, dtype, options, True, timeout=LONG))


def reproducible(context: Any, topologies: list[str]) -> list[bytes]:
    import deepep

    found = []
    for topology in topologies:
        with deepep.configured(topology=topology, groups=[[1], [0]]):
            model = deepep.DistributedDataParallel(model_of(), process_group=context.group)
        found.append(train(model, context.rank, 2).numpy().tobytes())
        model.close()
    return found


def test_bits_do_not_depend_on_the_topology(world_of: Callable[[int], Any]) -> None:
    topologies = ["auto", "Native", "direct", "Ring", "Tree", "chain", "Hierarchical"]
    outcomes = world_of(2).run(reproducible, topologies, timeout=LONG)
    assert len({bits for found in outcomes for bits in found}) == 1


def compressed(context: Any) -> tuple[bytes, float, float]:
    import deepep

    sent, found = [], []
    for compression in ("off", "fp8"):
        config = ParallelConfig(compression, min_compressed_bytes=0, topology="direct", reproducible=False)
        model = deepep.DistributedDataParallel(model_of(), process_group=context.group, config=config)
        found.append(train(model, context.rank, 1))
        sent.append(model.report()["bytes_sent"])
        model.close()
    error = float((found[1] - found[0]).norm() / found[0].norm())
    return found[1].numpy().tobytes(), sent[1] / sent[0], error


def test_fp8_is_the_same_on_all_ranks_and_a_quarter_of_the_bytes(world_of: Callable[[int], Any]) -> None:
    outcomes = world_of(2).run(compressed, timeout=LONG)
    assert outcomes[0][0] == outcomes[1][0]
    for _, share, error in outcomes:
        assert share <= 0.27
        assert 0.005 < error < 0.1  # two roundings by dice of 3.7 % each


def accumulated(context: Any) -> bool:
    """Gradients of two backwards without communication, and one with, are the mean of all ranks' sums."""
    import deepep

    model = deepep.DistributedDataParallel(
        model_of(torch.float64).eval(), process_group=context.group, config=ParallelConfig(reproducible=False)
    )
    with model.no_sync():
        for step in range(2):
            model(batch_of(context.rank, step, torch.float64)).square().mean().backward()
    assert model.report()["steps"] == 0
    model(batch_of(context.rank, 2, torch.float64)).square().mean().backward()
    alone = model_of(torch.float64).eval()
    for rank in range(2):
        for step in range(3):
            (alone(batch_of(rank, step, torch.float64)).square().mean() / 2).backward()
    model.close()
    return torch.allclose(gradients(model), gradients(alone), rtol=1e-12, atol=1e-15)


def test_no_sync_accumulates(world_of: Callable[[int], Any]) -> None:
    assert all(world_of(2).run(accumulated, timeout=LONG))


def mixed(context: Any) -> bool:
    """Parameters of several dtypes: buckets of each."""
    import deepep

    class Narrowing(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.narrow = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8).bfloat16()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.narrow(self.wide(x).bfloat16()).float()

    layers = Narrowing()
    model = deepep.DistributedDataParallel(layers, process_group=context.group)
    model(torch.full((2, 8), 1.0 + context.rank)).sum().backward()
    dtypes = {p.grad.dtype for p in layers.parameters() if p.grad is not None}
    everyone = [torch.empty_like(gradients(layers)) for _ in range(2)]
    torch.distributed.all_gather(everyone, gradients(layers), group=context.group)
    model.close()
    return dtypes == {torch.float32, torch.bfloat16} and torch.equal(*everyone)


def test_parameters_of_several_dtypes(world_of: Callable[[int], Any]) -> None:
    assert all(world_of(2).run(mixed, timeout=LONG))


def compiled(context: Any) -> bool:
    """Gradients of the compiled wrapper are those of the wrapper."""
    import deepep

    model = deepep.DistributedDataParallel(model_of().eval(), process_group=context.group)
    found = []
    for call in (torch.compile(model, backend="aot_eager"), model):
        model.zero_grad()
        call(batch_of(context.rank, 0)).square().mean().backward()
        found.append(gradients(model))
    steps = model.report()["steps"]
    model.close()
    return steps == 2 and torch.allclose(*found, rtol=1e-6, atol=1e-9)


def test_the_wrapper_may_be_compiled(world_of: Callable[[int], Any]) -> None:
    assert all(world_of(2).run(compiled, timeout=LONG))


def joined(context: Any, compression: str) -> bool:
    """Rank 1 has a batch, rank 0 has three; who has none left takes part with zeros."""
    import deepep

    config = ParallelConfig(compression, min_compressed_bytes=0)
    model = deepep.DistributedDataParallel(
        model_of().eval(), process_group=context.group, config=config, bucket_cap_mb=0.01
    )
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with model.join():
        for step in range(1 if context.rank else 3):
            optimizer.zero_grad()
            model(batch_of(context.rank, step)).square().mean().backward()
            optimizer.step()
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    everyone = [torch.empty_like(weights) for _ in range(2)]
    torch.distributed.all_gather(everyone, weights, group=context.group)
    model.close()
    return torch.equal(*everyone)


@pytest.mark.parametrize("compression", ["off", "fp8"])
def test_ranks_may_run_out_of_batches(world_of: Callable[[int], Any], compression: str) -> None:
    assert all(world_of(2).run(joined, compression, timeout=LONG))


def sharded(context: Any) -> bool:
    """torch's optimizer whose states are spread over the ranks, against one that is not."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    import deepep

    weights = []
    for make in (torch.optim.AdamW, ZeroRedundancyOptimizer):
        model = deepep.DistributedDataParallel(model_of().eval(), process_group=context.group)
        how = {"optimizer_class": torch.optim.AdamW, "process_group": context.group}
        optimizer = make(model.parameters(), lr=0.01, **(how if make is ZeroRedundancyOptimizer else {}))
        for step in range(2):
            optimizer.zero_grad()
            model(batch_of(context.rank, step)).square().mean().backward()
            optimizer.step()
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        model.close()
    return torch.equal(*weights)


def test_states_may_be_sharded(world_of: Callable[[int], Any]) -> None:
    assert all(world_of(2).run(sharded, timeout=LONG))


def poisoned(context: Any) -> bool:
    """A NaN on one rank reaches all of them, as GradScaler needs it."""
    import deepep

    config = ParallelConfig("fp8", min_compressed_bytes=0)
    model = deepep.DistributedDataParallel(model_of().eval(), process_group=context.group, config=config)
    loss = model(batch_of(context.rank, 0)).square().mean()
    (loss * (float("inf") if context.rank == 1 else 1.0)).backward()
    model.close()
    return not bool(gradients(model).isfinite().all())


def test_what_is_not_finite_on_one_rank_is_so_on_all(world_of: Callable[[int], Any]) -> None:
    assert all(world_of(2).run(poisoned, timeout=LONG))


def scaled(context: Any, compression: str) -> list[tuple[bool, float, bytes]]:
    """Of steps by a GradScaler, an infinity on one rank in the first: changes, scales, and weights."""
    import deepep

    config = ParallelConfig(compression, min_compressed_bytes=0)
    model = deepep.DistributedDataParallel(model_of().eval(), process_group=context.group, config=config)
    optimizer, scaler = torch.optim.SGD(model.parameters(), 0.1), torch.amp.GradScaler("cpu", 64.0)
    found = []
    for step in range(2):
        before = [parameter.detach().clone() for parameter in model.parameters()]
        optimizer.zero_grad()
        loss = model(batch_of(context.rank, step)).square().mean()
        scaler.scale(loss * (float("inf") if (context.rank, step) == (1, 0) else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        after = list(model.parameters())
        is_changed = any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
        weights = b"".join(parameter.detach().numpy().tobytes() for parameter in after)
        found.append((is_changed, scaler.get_scale(), weights))
    model.close()
    return found


@pytest.mark.parametrize("compression", ["off", "fp8"])
def test_a_scaler_skips_the_same_step_on_all_ranks(world_of: Callable[[int], Any], compression: str) -> None:
    first, other = world_of(2).run(scaled, compression, timeout=LONG)
    assert first == other
    assert [(is_changed, scale) for is_changed, scale, _ in first] == [(False, 32.0), (True, 32.0)]


def refusals(context: Any) -> list[str]:
    """Names of errors: of a second hook, of options that differ at once, later, and no longer."""
    import deepep

    found = []

    def call(action: Callable[[], Any]) -> None:
        try:
            action()
            found.append("")
        except Exception as error:
            found.append(type(error).__name__)

    model = deepep.DistributedDataParallel(model_of(), process_group=context.group)
    call(lambda: model.register_comm_hook(None, lambda state, bucket: None))
    config = ParallelConfig(seed=context.rank)
    call(lambda: deepep.DistributedDataParallel(model_of(), process_group=context.group, config=config))
    call(lambda: train(model, context.rank, 1))
    model.reconfigure(compression="fp8" if context.rank else "bf16", min_compressed_bytes=0)
    call(lambda: train(model, context.rank, 1))
    model.reconfigure(compression="fp8")
    call(lambda: train(model, context.rank, 1))
    # Neither compresses any bucket, so the plans are the same: the options are not.
    model.reconfigure(min_compressed_bytes=(1 << 29) + context.rank)
    call(lambda: train(model, context.rank, 1))
    model.reconfigure(min_compressed_bytes=1 << 29)
    call(lambda: train(model, context.rank, 1))
    call(lambda: model.join_hook(divide_by_initial_world_size=False))
    model.close()
    cap = 0.01 * (1 + context.rank)
    call(lambda: deepep.DistributedDataParallel(model_of(), process_group=context.group, bucket_cap_mb=cap))
    return found


def test_ranks_that_differ_all_raise(world_of: Callable[[int], Any]) -> None:
    wanted = ["ModeError", *["MismatchError", ""] * 3, "RangeError", "MismatchError"]
    assert world_of(2).run(refusals, timeout=LONG) == [wanted, wanted]


def abandoned(context: Any) -> tuple[str, str]:
    import deepep
    from deepep.errors import PeerTimeoutError

    config = ParallelConfig(timeout=60.0)
    model = deepep.DistributedDataParallel(
        model_of(), process_group=context.group, config=config, bucket_cap_mb=0.01
    )
    train(model, context.rank, 2)
    loss = model(batch_of(context.rank, 3)).square().mean()
    if context.rank == 1:
        os._exit(7)
    try:
        loss.backward()
    except PeerTimeoutError as error:
        return error.record.operation, str(error.record.waited_on)
    return "", ""


def test_a_rank_that_dies_in_a_backward_is_named() -> None:
    with World(2, timeout=LONG) as world:
        assert world.try_run(abandoned)[0].value == ("all_reduce", "(1,)")


def optimised(context: Any) -> list[bool]:
    import torch.distributed as dist

    import deepep
    from deepep.parallel.ddp import DistributedDataParallel

    found = []
    plain = deepep.optimize(model_of())
    found.append(isinstance(plain, DistributedDataParallel) and deepep.optimize(plain) is plain)
    wrapped = torch.nn.parallel.DistributedDataParallel(model_of(), process_group=context.group)
    assert deepep.optimize(wrapped, config=ParallelConfig(reproducible=False)) is wrapped
    found.append(
        torch.allclose(train(wrapped, context.rank, 2), train(plain, context.rank, 2), rtol=1e-5, atol=1e-7)
    )
    default = dist.group.WORLD
    with deepep.optimize() as optimized:
        group = dist.group.WORLD
        found.append(group is optimized.group and group is not default)
        for op, wanted in ((dist.ReduceOp.SUM, 3.0), (dist.ReduceOp.AVG, 1.5), (dist.ReduceOp.MAX, 2.0)):
            tensor = torch.full((50_000,), 1.0 + context.rank)
            if op == dist.ReduceOp.AVG:
                work = dist.all_reduce(tensor, op, async_op=True)
                work.wait()
            else:
                dist.all_reduce(tensor, op)
            found.append(bool((tensor == wanted).all()))
        found.append(optimized.group.comm.bytes_sent > 2 * 50_000)
        counts = torch.tensor([context.rank + 1])
        dist.all_reduce(counts)
        everyone = [torch.empty(1, dtype=torch.int64) for _ in range(2)]
        dist.all_gather(everyone, counts)
        found.append(int(counts) == 3 and [int(entry) for entry in everyone] == [3, 3])
        dist.barrier()
        model = torch.nn.parallel.DistributedDataParallel(model_of())
        found.append(bool(train(model, context.rank, 1).isfinite().all()))
        on_top = deepep.DistributedDataParallel(model_of())
        found.append(bool(train(on_top, context.rank, 1).isfinite().all()))
        on_top.close()
    found.append(dist.group.WORLD is default)
    dist.all_reduce(torch.ones(3))
    return found


def test_optimize(world_of: Callable[[int], Any]) -> None:
    for found in world_of(2).run(optimised, timeout=LONG):
        assert all(found), found
