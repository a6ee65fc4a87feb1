"""ExpertParallelMoE inside ordinary training: wrappers, meta devices, checkpoints, gradients, balancing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness.layers import EXPERTS, HIDDEN, TOPK, Lone, layer_on, tokens
from torch.utils.checkpoint import checkpoint

import deepep.nn as dnn
from deepep.errors import ArgumentError, ArgumentTypeError, RangeError
from deepep.nn.grouped import grouped_mm
from deepep.nn.rows import expert_rows

# wrappers, devices, checkpoints


def test_loads_survive_data_parallel_wrappers(on_ranks: Any) -> None:
    """DDP broadcasts buffers before a forward; the load is this rank's own and no buffer."""

    def body(buffer: Any) -> tuple[int, int]:
        from torch.nn.parallel import DistributedDataParallel

        layer = layer_on(buffer)
        own = [name for name, _ in layer.named_parameters() if name.startswith("experts.")]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(layer, own)
        wrapped, sent = DistributedDataParallel(layer, process_group=buffer.group), 0
        for micro_batch in range(3):
            x = tokens(buffer.rank, 3 + micro_batch)
            sent += len(x) * TOPK
            wrapped(x).square().mean().backward()
        return sent, int(layer.rebalance().sum())

    got = on_ranks(2, body)
    assert {load for _, load in got} == {sum(sent for sent, _ in got)}


def test_fully_sharded_replicated_parts_and_meta_devices(on_ranks: Any) -> None:
    """Made on the meta device, sharded, given memory and values: the same layer, and it trains as before."""

    def body(buffer: Any) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        plain = layer_on(buffer, seed=3)
        with torch.device("meta"):
            layer = layer_on(buffer, seed=3)
        assert all(p.is_meta for p in layer.parameters())
        mesh = init_device_mesh("cpu", (buffer.group_size,))
        fully_shard(layer.router, mesh=mesh)
        fully_shard(layer.shared, mesh=mesh)
        layer.to_empty(device="cpu")
        for module in layer.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        assert torch.equal(layer.experts.down, plain.experts.down)
        assert torch.equal(layer.router.weight.full_tensor(), plain.router.weight)
        assert layer.router.load.device.type == "cpu"
        x = tokens(buffer.rank)
        for model in (plain, layer):
            model(x).square().sum().backward()
        assert torch.equal(layer.experts.down.grad, plain.experts.down.grad)
        assert torch.equal(layer.rebalance(), plain.rebalance())

    on_ranks(2, body)


def test_every_part_draws_itself_anew_without_arguments() -> None:
    whole = layer_on(Lone(), seed=7)
    with torch.device("meta"):
        made = layer_on(Lone(), seed=7)
    made.to_empty(device="cpu")
    for module in (made.router, made.experts, made.shared):
        module.reset_parameters()
    for name, value in whole.state_dict().items():
        assert torch.equal(made.state_dict()[name], value)
    assert torch.equal(made.router.load, torch.zeros(EXPERTS, dtype=torch.int64))
    assert not torch.equal(layer_on(Lone(), seed=8).experts.down, whole.experts.down)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_does_not_count_load_twice(on_ranks: Any, reentrant: bool) -> None:
    def body(buffer: Any) -> None:
        layer = layer_on(buffer)
        x = tokens(buffer.rank).requires_grad_()
        checkpoint(layer, x, use_reentrant=reentrant).sum().backward()
        assert int(layer.router.load.sum()) == len(x) * TOPK
        first = x.grad.clone()
        x.grad = None
        layer(x).sum().backward()
        assert int(layer.router.load.sum()) == 2 * len(x) * TOPK
        assert torch.equal(x.grad, first)

    on_ranks(2, body)


# gradients


def test_recomputed_experts_keep_less_and_dispatch_nothing_twice(on_ranks: Any) -> None:
    """The same bits of outputs and gradients, and of the forward no tensor with a row for each pair."""

    def body(buffer: Any) -> None:
        found, exchanges, kept = [], [], []
        for recompute in (False, True):
            layer = layer_on(buffer, recompute=recompute, expert_hidden=24)
            x = tokens(buffer.rank, 40).requires_grad_()
            names: list[str] = []
            saved: list[int] = []

            def pack(tensor: torch.Tensor, saved: list[int] = saved) -> torch.Tensor:
                saved.append(tensor.numel())
                return tensor

            with dnn.observe(lambda exchange, names=names: names.append(exchange.name)):
                with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                    y = layer(x)
                (y * y.detach().cos()).sum().backward()
            found.append([y.detach(), x.grad, *(p.grad for p in layer.parameters())])
            exchanges.append(names)
            kept.append(sum(saved))
        for plain, repeated in zip(*found, strict=True):
            assert torch.equal(plain, repeated)
        assert exchanges == [["dispatch", "combine", "combine_backward", "dispatch_backward"]] * 2
        weights = sum(p.numel() for p in layer.experts.parameters())
        assert kept[1] < kept[0] - weights  # those of every row and pair went as well

    on_ranks(2, body)


def test_the_shared_expert_is_issued_before_the_dispatch(on_ranks: Any) -> None:
    """So that the device is busy while the host waits for counts; exchanges and bits are those of after."""

    def body(buffer: Any) -> None:
        layer = layer_on(buffer)
        order: list[str] = []
        x = tokens(buffer.rank).requires_grad_()
        handle = layer.shared.register_forward_hook(lambda *_: order.append("shared"))
        with dnn.observe(lambda exchange: order.append(exchange.name)):
            y = layer(x)
            y.square().sum().backward()
        handle.remove()
        assert order == ["shared", "dispatch", "combine", "combine_backward", "dispatch_backward"]
        found = [y.detach(), x.grad, *(p.grad.clone() for p in layer.parameters())]
        layer.zero_grad()
        x.grad = None
        routing = layer.router(x)
        received = dnn.dispatch(buffer, x, routing.topk_idx, routing.topk_weights, EXPERTS)
        rows = dnn.apply_experts(
            layer.experts, received.x, received.topk_idx, received.topk_weights, received.expert_counts
        )
        after = dnn.combine(rows, received.route) + layer.shared(x)
        after.square().sum().backward()
        wanted = [after.detach(), x.grad, *(p.grad for p in layer.parameters())]
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))

    on_ranks(2, body)


def test_recompute_is_a_bool() -> None:
    with pytest.raises(ArgumentTypeError, match="recompute"):
        layer_on(Lone(), recompute=1)


@pytest.mark.parametrize("frozen", ["router", "all"])
def test_backward_is_collective_whatever_requires_gradients_here(on_ranks: Any, frozen: str) -> None:
    """Rank 1 has no tokens, and nothing that needs a gradient: it exchanges as rank 0 does."""

    def body(buffer: Any) -> list[str]:
        layer = layer_on(buffer, shared_hidden=0)
        (layer if frozen == "all" else layer.router).requires_grad_(False)
        x = tokens(0).requires_grad_() if buffer.rank == 0 else torch.empty(0, HIDDEN)
        seen: list[str] = []
        with dnn.observe(lambda exchange: seen.append(exchange.name)):
            layer(x).sum().backward()
            with torch.no_grad():
                assert not layer(x).requires_grad
        if buffer.rank == 0:
            assert x.grad.abs().sum() > 0
        return seen

    for seen in on_ranks(2, body):
        assert seen == ["dispatch", "combine", "combine_backward", "dispatch_backward", "dispatch", "combine"]


def test_second_derivatives_are_refused_on_all_ranks(on_ranks: Any) -> None:
    def body(buffer: Any) -> str:
        layer = layer_on(buffer, dtype=torch.float64)
        x = tokens(buffer.rank, dtype=torch.float64).requires_grad_()
        (first,) = torch.autograd.grad(layer(x).square().sum(), x)
        with pytest.raises(ArgumentError) as caught:
            torch.autograd.grad(layer(x).square().sum(), x, create_graph=buffer.rank == 1)
        (again,) = torch.autograd.grad(layer(x).square().sum(), x)
        assert torch.equal(first, again), "the buffer works on"
        return str(caught.value)

    messages = on_ranks(2, body)
    assert messages[0] == messages[1]
    assert messages[0].startswith("rank 1: create_graph: got True")


def test_experts_alone_are_differentiable_twice() -> None:
    idx = torch.tensor([[0, 1], [1, -1], [0, 0]])
    _, counts, _ = expert_rows(idx, 2)
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    w = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x, w: grouped_mm(x, w, counts), (x, w))


def test_dtensor_rows_are_refused_on_all_ranks(on_ranks: Any) -> None:
    def body(buffer: Any) -> str:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import DTensor, Shard

        mesh = init_device_mesh("cpu", (buffer.group_size,))
        layer, x = layer_on(buffer), tokens(buffer.rank)
        given = DTensor.from_local(x, mesh, [Shard(0)]) if buffer.rank == 1 else x
        with pytest.raises(ArgumentTypeError) as caught:
            layer(given)
        with pytest.raises(ArgumentTypeError):
            dnn.dispatch(
                buffer, given, torch.zeros(len(x), 1, dtype=torch.int64), torch.ones(len(x), 1), EXPERTS
            )
        layer(x)
        return str(caught.value)

    messages = on_ranks(2, body)
    assert messages[0] == messages[1]
    assert "rank 1: x: got a DTensor" in messages[0]


# balancing


@pytest.mark.parametrize("rate", [float("nan"), float("inf"), "fast", None, True, torch.ones(2), 1 << 2000])
def test_a_bad_rate_on_one_rank_is_refused_on_all(on_ranks: Any, rate: Any) -> None:
    def body(buffer: Any) -> None:
        layer = layer_on(buffer)
        layer(tokens(buffer.rank))
        before = layer.router.bias.clone()
        with pytest.raises(ArgumentError) as caught:
            layer.rebalance(rate if buffer.rank == 1 else 0.5)
        assert caught.value.argument == "rate"
        assert torch.equal(layer.router.bias, before)
        assert int(layer.rebalance(0.5).sum()) == sum(len(tokens(r)) * TOPK for r in range(buffer.group_size))

    on_ranks(2, body)


def test_different_rates_would_part_the_ranks_biases(on_ranks: Any) -> None:
    on_ranks(3, body_of_three)


def body_of_three(buffer: Any) -> None:
    layer = dnn.ExpertParallelMoE(buffer, hidden=16, expert_hidden=8, num_experts=9, num_topk=2)
    for rates in ((0.1, 0.2, 0.3), (0.5, 0.5, -0.5), (1.0, 2.0, 1.0)):
        with pytest.raises(ArgumentError, match="rate"):
            layer.rebalance(rates[buffer.rank])
    layer.rebalance(0.1)


def test_a_rate_of_a_router_alone() -> None:
    router = layer_on(Lone()).router
    with pytest.raises(RangeError):
        router.rebalance(float("nan"))
    with pytest.raises(ArgumentTypeError):
        router.rebalance(torch.ones(2))


# torch's ambient modes


@pytest.mark.parametrize("mode", ["device", "dtype", "inference", "no grad", "autocast off", "deterministic"])
def test_torchs_ambient_modes_change_nothing(on_ranks: Any, mode: str) -> None:
    def body(buffer: Any) -> None:
        from contextlib import contextmanager, nullcontext

        @contextmanager
        def deterministic() -> Any:
            torch.use_deterministic_algorithms(True)
            try:
                yield
            finally:
                torch.use_deterministic_algorithms(False)

        @contextmanager
        def default_dtype() -> Any:
            torch.set_default_dtype(torch.float64)
            try:
                yield
            finally:
                torch.set_default_dtype(torch.float32)

        ambient = {
            "device": torch.device("meta"),
            "dtype": default_dtype(),
            "inference": torch.inference_mode(),
            "no grad": torch.no_grad(),
            "autocast off": torch.autocast("cpu", torch.bfloat16, enabled=False),
            "deterministic": deterministic(),
        }[mode]
        layer = layer_on(buffer, device="cpu", dtype=torch.float32)
        x = tokens(buffer.rank)
        with torch.no_grad():
            expected = layer(x)
        with ambient:
            made = layer_on(buffer, device="cpu", dtype=torch.float32)
            got = made(x)
            assert torch.equal(got, expected)
            load = made.rebalance(0.5)
        assert load.device.type == "cpu"
        with nullcontext():  # what was made inside trains outside
            y = made(x)
            y.square().sum().backward()
            assert made.experts.down.grad is not None
            made.rebalance()

    on_ranks(2, body)
