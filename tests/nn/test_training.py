"""ExpertParallelMoE inside ordinary training: mixed precision, wrappers, meta devices, checkpoints."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import deepep.nn as dnn
from deepep.errors import ArgumentError, ArgumentTypeError, RangeError
from deepep.gate import Routing, sigmoid_topk
from deepep.nn.experts import expert_rows, grouped_mm
from deepep.nn.precision import parameter_options

HIDDEN, EXPERTS, TOPK = 16, 8, 3


def layer_on(buffer: Any, **options: Any) -> dnn.ExpertParallelMoE:
    sizes = {
        "hidden": HIDDEN,
        "expert_hidden": 8,
        "num_experts": EXPERTS,
        "num_topk": TOPK,
        "shared_hidden": 8,
    }
    return dnn.ExpertParallelMoE(buffer, **(sizes | options))


def tokens(rank: int, count: int = 5, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(count + rank, HIDDEN, generator=generator).to(dtype)


class Lone:
    """Stands for the buffer of a world of one rank, for its weights alone."""

    rank, group_size, group = 0, 1, None


class OnCuda(Lone):
    """Stands for a buffer of CUDA kernels."""

    class runtime:
        class info:
            backend, device_type = "cuda", "cuda"


# mixed precision


def test_autocast_computes_experts_in_its_dtype_and_the_router_in_float32(on_ranks: Any) -> None:
    """The bits are those of a layer with bfloat16 experts and a float32 router."""

    def body(buffer: Any) -> None:
        logits = []

        def gate(z: torch.Tensor, k: int, bias: torch.Tensor) -> Routing:
            logits.append(z)
            return sigmoid_topk(z, k, bias=bias)

        layer = layer_on(buffer, gate=gate, dtype=torch.float32)
        low = deepcopy(layer).bfloat16()
        low.router.float()
        low.router.load_state_dict(layer.router.state_dict())
        x = tokens(buffer.rank, dtype=torch.bfloat16).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = layer(x)
        assert torch.equal(y, low(x))
        assert y.dtype == torch.bfloat16
        assert logits[0].dtype == torch.float32
        assert torch.equal(logits[0], x.float() @ layer.router.weight.t())
        y.float().square().sum().backward()
        assert all(p.grad.dtype == torch.float32 for p in layer.parameters())
        assert layer.experts.down.grad.abs().sum() > 0
        # float32 rows, as a norm gives them: they travel in bfloat16, and backward may run inside as well.
        seen: list[dnn.Exchange] = []
        with dnn.observe(seen.append), torch.autocast("cpu", dtype=torch.bfloat16):
            layer(tokens(buffer.rank).requires_grad_()).float().sum().backward()
        assert [e.row_bytes for e in seen] == [
            HIDDEN * 2 + TOPK * 12,
            HIDDEN * 2,
            HIDDEN * 2,
            HIDDEN * 2 + TOPK * 4,
        ]

    on_ranks(2, body)


def test_operators_compute_the_same_inside_autocast() -> None:
    idx = torch.tensor([[0, 1], [1, -1]])
    _, counts, _ = expert_rows(idx, 2)
    x, w = torch.randn(3, 4), torch.randn(2, 4, 4)
    expected = grouped_mm(x, w, counts)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = grouped_mm(x, w, counts)
    assert got.dtype == torch.float32
    assert torch.equal(got, expected)


@pytest.mark.parametrize("case", ["other dtype", "float16 autocast", "float16 weights"])
def test_rows_that_cannot_pass_are_refused_on_all_ranks_before_they_travel(on_ranks: Any, case: str) -> None:
    def body(buffer: Any) -> tuple[str, str]:
        layer = layer_on(buffer, dtype=torch.float32)
        x = tokens(buffer.rank)
        bad = buffer.rank == 1
        used, given, low = layer, x, torch.float32
        if bad and case == "other dtype":
            given = x.bfloat16()
        elif bad and case == "float16 autocast":
            low = torch.float16
        elif bad:
            used, given = deepcopy(layer).half(), x.half()
        with (
            pytest.raises(ArgumentTypeError) as caught,
            torch.autocast("cpu", low, enabled=low == torch.float16),
        ):
            used(given)
        assert torch.isfinite(layer(x)).all(), "the buffer works on"
        return caught.value.argument, str(caught.value)

    (argument, first), (_, second) = on_ranks(2, body)
    assert argument == "x"
    assert first == second
    assert first.startswith("rank 1: x: got ")


def test_the_bias_stays_float32_with_its_value_and_the_load_int64(on_ranks: Any) -> None:
    for cast in (
        lambda m: m.bfloat16(),
        lambda m: m.to(torch.float16),
        lambda m: m.double(),
        lambda m: m.to("cpu", torch.bfloat16),
        lambda m: torch.nn.Sequential(m).half()[0],
    ):
        layer = layer_on(Lone())
        layer.router.bias.copy_(torch.linspace(-5, 5, EXPERTS) + 1e-3)
        layer.router.load += 3
        before = layer.router.bias.clone()
        cast(layer)
        assert layer.router.bias.dtype == torch.float32
        assert torch.equal(layer.router.bias, before), "cast to 16 bits and back"
        assert layer.router.load.tolist() == [3] * EXPERTS
        assert layer.experts.down.dtype != torch.float32
        state = {k: v.bfloat16() if v.is_floating_point() else v for k, v in layer.state_dict().items()}
        layer.load_state_dict(state, assign=True)
        assert layer.router.bias.dtype == torch.float32
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        assert layer_on(Lone()).router.bias.dtype == torch.float32
    finally:
        torch.set_default_dtype(before)
    router = layer_on(Lone()).router
    for _ in range(1000):
        router.load.copy_(torch.tensor([100, 0, 0, 0, 0, 0, 0, 100]))
        router.bfloat16().rebalance(1e-3)
    assert router.bias[1].item() == pytest.approx(
        1.0, abs=1000 * 2.0**-25
    )  # steps of 0.001 each rounded once


def test_a_bias_that_a_wrapper_cast_is_refused() -> None:
    router = layer_on(Lone()).router
    router.bias.data = router.bias.data.bfloat16()  # as FSDP's and DDP's mixed precision cast buffers
    with pytest.raises(ArgumentTypeError, match=r"router\.bias"):
        router(tokens(0))


def test_the_default_dtype_is_that_of_the_exchange() -> None:
    assert layer_on(Lone()).experts.down.dtype == torch.float32
    assert layer_on(OnCuda(), device="meta").experts.down.dtype == torch.bfloat16
    assert layer_on(OnCuda(), device="meta").router.bias.dtype == torch.float32
    assert parameter_options(Lone(), "cuda", None)["dtype"] == torch.bfloat16
    for dtype in (torch.float32, torch.float64, torch.float16):
        with pytest.raises(ArgumentTypeError, match=r"bfloat16.*combine") as caught:
            layer_on(OnCuda(), device="meta", dtype=dtype)
        assert caught.value.argument == "dtype"
    with pytest.raises(ArgumentTypeError):
        layer_on(Lone(), dtype=torch.float16)


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


# other people's gates


def test_gates_may_give_int32_and_no_expert(on_ranks: Any) -> None:
    def body(buffer: Any, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        def gate(z: torch.Tensor, k: int, bias: torch.Tensor) -> Any:
            routing = sigmoid_topk(z, k, bias=bias)
            idx = routing.topk_idx.to(dtype, copy=True)
            idx[:, -1] = -1
            idx[0] = -1
            return Routing(idx, routing.topk_weights.bfloat16(), routing.scores)

        layer = layer_on(buffer, gate=gate)
        x = tokens(buffer.rank).requires_grad_()
        y = layer(x)
        y.sum().backward()
        assert torch.equal(y[0], layer.shared(x)[0]), "a token without an expert"
        assert int(layer.router.load.sum()) == (len(x) - 1) * (TOPK - 1)
        return y.detach(), x.grad

    narrow, wide = on_ranks(2, body, torch.int32), on_ranks(2, body, torch.int64)
    for a, b in zip(narrow, wide, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def bad_gates() -> dict[str, Any]:
    def changed(**parts: Any) -> Any:
        def gate(z: torch.Tensor, k: int, bias: torch.Tensor) -> Any:
            routing = sigmoid_topk(z, k, bias=bias)
            return routing._replace(
                **{name: change(getattr(routing, name)) for name, change in parts.items()}
            )

        return gate

    def raising(z: torch.Tensor, k: int, bias: torch.Tensor) -> Any:
        raise ZeroDivisionError("a gate's own fault")

    return {
        "a tuple": lambda z, k, bias: tuple(sigmoid_topk(z, k, bias=bias)),
        "float indices": changed(topk_idx=lambda t: t.float()),
        "int16 indices": changed(topk_idx=lambda t: t.short()),
        "other tokens": changed(topk_idx=lambda t: t[1:], topk_weights=lambda t: t[1:]),
        "other width": changed(topk_weights=lambda t: t[:, 1:]),
        "integer weights": changed(topk_weights=lambda t: t.long()),
        "no such expert": changed(topk_idx=lambda t: t + EXPERTS),
        "below no expert": changed(topk_idx=lambda t: t * 0 - 2),
        "raising": raising,
    }


@pytest.mark.parametrize("name", list(bad_gates()))
def test_a_gate_that_fails_on_one_rank_fails_on_all(on_ranks: Any, name: str) -> None:
    def body(buffer: Any, gate: Any) -> str:
        layer = layer_on(buffer, **({"gate": gate} if buffer.rank == 1 else {}))
        expected = ZeroDivisionError if buffer.rank == 1 and name == "raising" else ArgumentError
        with pytest.raises(expected) as caught:
            layer(tokens(buffer.rank))
        assert torch.isfinite(layer_on(buffer)(tokens(buffer.rank))).all(), "the buffer works on"
        return str(caught.value)

    here, cause = on_ranks(2, body, bad_gates()[name])
    assert here.startswith("rank 1: ")
    assert cause in here


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_experts_that_raise_on_one_rank_end_the_call_on_all(
    on_ranks: Any, error: type[BaseException]
) -> None:
    def body(buffer: Any) -> str:
        layer = layer_on(buffer)

        def failing(*_: Any) -> None:
            raise error("out of memory, say")

        hook = layer.experts.register_forward_pre_hook(failing) if buffer.rank == 1 else None
        with pytest.raises(error if hook else ArgumentError) as caught:
            layer(tokens(buffer.rank))
        if hook:
            hook.remove()
        assert torch.isfinite(layer(tokens(buffer.rank))).all(), "the buffer works on"
        return str(caught.value)

    here, _ = on_ranks(2, body)
    assert here.startswith("rank 1: experts: got " + error.__name__)


# gradients


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
