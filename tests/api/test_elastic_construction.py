"""Construction of an ElasticBuffer: every argument has an effect or is refused; its numbers."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

from deepep import ElasticBuffer
from deepep.sim import World

HIDDEN, EXPERTS, TOKENS, TOPK = 64, 4, 6, 3
SIZES = {"num_max_tokens_per_rank": 8, "hidden": HIDDEN, "num_topk": 4}


def elastic_of(ctx: Any, **options: Any) -> Any:
    """This rank's buffer with these options, kept until its world is rebuilt."""
    from deepep import ElasticBuffer

    key = ("elastic arguments", tuple(sorted(options.items())))
    if key not in ctx.scratch:
        ctx.scratch[key] = ElasticBuffer(ctx.group, **{**SIZES, "num_gpu_timeout_secs": 30, **options})
    return ctx.scratch[key]


def rows_of(rank: int) -> dict[str, Any]:
    """Good arguments of a dispatch."""
    generator = torch.Generator().manual_seed(rank)
    return {
        "x": torch.randn(TOKENS, HIDDEN, generator=generator).bfloat16(),
        "topk_idx": torch.stack([torch.randperm(EXPERTS, generator=generator)[:TOPK] for _ in range(TOKENS)]),
        "topk_weights": torch.rand(TOKENS, TOPK, generator=generator),
        "num_experts": EXPERTS,
    }


# The constructor


def facts(ctx: Any, options: dict[str, Any]) -> Any:
    """Facts of a buffer with these options; or the error of its construction, by name and text."""
    from deepep import ArgumentError, ElasticBuffer

    try:
        with ElasticBuffer(ctx.group, **options) as buffer:
            got = buffer.dispatch(**rows_of(ctx.rank), num_max_tokens_per_rank=8, do_expand=True)
            scale = torch.arange(1, len(got.recv_x) + 1).bfloat16().unsqueeze(1)  # no lane like another
            sums, _, _ = buffer.combine(got.recv_x * scale, got.handle)
            return {
                "num_bytes": buffer.num_bytes,
                "memory": buffer.runtime.info.options.symmetric_bytes,
                "timeout": buffer.info.timeout,
                "most": buffer.num_max_tokens_per_rank,
                "qps": (buffer.num_allocated_qps, buffer.get_theoretical_num_qps(24)),
                "sms": (buffer.get_theoretical_num_sms(4, 2), got.handle.num_sms, buffer.info.num_sms),
                "sums": sums.view(torch.int16).tolist(),
                "hybrid": buffer.allow_hybrid_mode,
                "deterministic": buffer.deterministic,
                "multiple": buffer.allow_multiple_reduction,
                "domains": (buffer.get_physical_domain_size(), buffer.get_logical_domain_size()),
            }
    except ArgumentError as error:
        return type(error).__name__, error.argument


CHANGES: dict[str, tuple[dict[str, Any], set[str] | tuple[str, str]]] = {
    "num_bytes": ({"num_bytes": 64 << 20}, {"num_bytes", "memory"}),
    "num_bytes of 1": ({"num_bytes": 1}, ("RangeError", "num_bytes")),
    "num_cpu_bytes": ({"num_cpu_bytes": 2 << 20, "num_bytes": 64 << 20}, {"memory"}),
    "num_cpu_bytes alone": ({"num_cpu_bytes": 2 << 20}, ("ArgumentError", "num_cpu_bytes")),
    "num_max_tokens_per_rank": ({"num_max_tokens_per_rank": 1 << 16}, {"num_bytes", "most"}),
    "num_max_tokens_per_rank of 7": (
        {"num_max_tokens_per_rank": 7},
        ("CapacityError", "num_max_tokens_per_rank"),
    ),
    "no sizes": (
        {"num_max_tokens_per_rank": 0},
        ("ArgumentError", "num_max_tokens_per_rank, hidden"),
    ),
    "hidden": ({"hidden": 1 << 18}, {"num_bytes"}),
    "hidden of 32": ({"hidden": 32}, ("CapacityError", "x")),
    "num_topk": ({"num_topk": 1, "num_max_tokens_per_rank": 1 << 16}, ("CapacityError", "topk_idx")),
    "num_topk of 33": ({"num_topk": 33}, ("RangeError", "num_topk")),
    "use_fp8_dispatch": ({"use_fp8_dispatch": True, "hidden": 1 << 18}, {"num_bytes"}),
    "deterministic": ({"deterministic": True}, set()),  # they are
    "allow_hybrid_mode": ({"allow_hybrid_mode": False}, {"hybrid"}),
    "allow_multiple_reduction": (
        {"allow_multiple_reduction": False, "hidden": 1 << 18},
        {"sums", "multiple", "num_bytes"},
    ),
    "prefer_overlap_with_compute": ({"prefer_overlap_with_compute": False}, {"sms"}),
    "sl_idx": ({"sl_idx": 16}, ("RangeError", "sl_idx")),
    "num_allocated_qps": ({"num_allocated_qps": 4}, {"qps"}),
    "num_cpu_timeout_secs": ({"num_cpu_timeout_secs": 20}, {"timeout"}),
    "num_gpu_timeout_secs": ({"num_gpu_timeout_secs": 20}, {"timeout"}),
    "num_gpu_timeout_secs of 0": ({"num_gpu_timeout_secs": 0}, ("RangeError", "num_gpu_timeout_secs")),
    "explicitly_destroy of 2": ({"explicitly_destroy": 2}, ("ArgumentTypeError", "explicitly_destroy")),
}


def test_every_argument_of_the_constructor_has_a_case() -> None:
    import inspect

    given = {name for change, _ in CHANGES.values() for name in change}
    own = {"group", "backend", "device", "ranks_per_domain"}
    asked = set(inspect.signature(ElasticBuffer).parameters) - own
    assert given == asked


@pytest.mark.parametrize("name", CHANGES)
def test_the_constructors_arguments_mean_something(
    world_of: Callable[[int], World], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, effect = CHANGES[name]
    world = world_of(2)
    found = world.run(facts, {**SIZES, **change})
    if isinstance(effect, tuple):
        assert found == [effect, effect]
        return
    base = {**SIZES, **{option: value for option, value in change.items() if option != name}}
    for before, after in zip(world.run(facts, base), found, strict=True):
        assert {key for key in before if before[key] != after[key]} == effect


def test_what_one_rank_refuses_all_do(world_of: Callable[[int], World]) -> None:
    def construct(ctx: Any) -> Any:
        return facts(ctx, {**SIZES, "num_cpu_bytes": ctx.rank})

    assert world_of(2).run(construct) == [("RangeError", "num_cpu_bytes")] * 2


def test_a_forgotten_end_is_reminded_of(world_of: Callable[[int], World]) -> None:
    def forget(ctx: Any, **options: Any) -> list[str]:
        from deepep import ElasticBuffer

        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            buffer = ElasticBuffer(ctx.group, **SIZES, explicitly_destroy=True)
            del buffer
            gc.collect()
            with ElasticBuffer(ctx.group, **SIZES, explicitly_destroy=True):
                pass
            buffer = ElasticBuffer(ctx.group, **SIZES)
            del buffer
            gc.collect()
        return [str(warning.message) for warning in seen if warning.category is ResourceWarning]

    message = "an ElasticBuffer made with explicitly_destroy=True was not destroyed"
    for seen in world_of(2).run(forget):
        assert [text for text in seen if "ElasticBuffer" in text] == [message]


def test_the_environments_time_out_is_the_default(
    world_of: Callable[[int], World], monkeypatch: pytest.MonkeyPatch
) -> None:
    def timeouts(ctx: Any) -> list[float]:
        import os
        from unittest import mock

        from deepep import ElasticBuffer

        found = []
        with mock.patch.dict(os.environ, {"DEEPEP_TIMEOUT": "55"}):
            for given in ({}, {"num_gpu_timeout_secs": 40}):
                with ElasticBuffer(ctx.group, **SIZES, **given) as buffer:
                    found.append(buffer.info.timeout)
        return found

    assert world_of(2).run(timeouts) == [[55.0, 40.0]] * 2


# Sizes and numbers


def test_sizes_and_numbers(world_of: Callable[[int], World]) -> None:
    def ask(ctx: Any) -> None:
        from deepep import ElasticBuffer, RangeError

        hint = ElasticBuffer.get_buffer_size_hint
        assert hint(ctx.group, 4096, 7168, 8) % (2 << 20) == 0
        assert hint(ctx.group, 4096, 7168, 8) > hint(ctx.group, 4096, 7168, 8, use_fp8_dispatch=True)
        assert hint(ctx.group, 4096, 7168) > hint(ctx.group, 4096, 7168, 8)
        assert hint(ctx.group, 4096, 7168, 8, allow_multiple_reduction=False) > hint(ctx.group, 4096, 7168, 8)
        buffer = elastic_of(ctx)
        assert buffer.num_bytes == hint(ctx.group, 8, HIDDEN, 4)
        assert buffer.get_theoretical_num_sms(256, 8) == 24
        assert buffer.get_theoretical_num_sms(256, 8, nvlink_gbs=740) == 48
        assert buffer.get_theoretical_num_sms(256, 8, sm_write_gbs=25) == 48
        assert (
            buffer.get_theoretical_num_sms(num_experts=8, num_topk=8, sm_read_gbs=400, sm_write_gbs=100) == 12
        )
        for wrong in ((255, 8), (256, 0), (2, 3)):
            with pytest.raises(RangeError):
                buffer.get_theoretical_num_sms(*wrong)
        assert [buffer.get_theoretical_num_qps(sms) for sms in (4, 24)] == [4, 9]
        assert buffer.get_physical_domain_size() == buffer.get_logical_domain_size() == (1, 2)
        assert (buffer.num_ranks, buffer.rank_idx) == (2, ctx.rank)
        assert (buffer.scaleout_rank_idx, buffer.scaleup_rank_idx) == (0, ctx.rank)
        assert "ElasticBuffer: rank" in repr(buffer)
        assert buffer.get_comm_stream() is None
        buffer.barrier()
        buffer.barrier(use_comm_stream=False, with_cpu_sync=True, sequential=False)
        buffer.capture().current_stream_wait()

    world_of(2).run(ask)


def test_a_barrier_waits_for_all(world_of: Callable[[int], World]) -> None:
    def late(ctx: Any) -> list[float]:
        import time

        buffer = elastic_of(ctx)
        buffer.barrier()
        if ctx.rank == 1:
            time.sleep(0.3)
        came = time.monotonic()
        buffer.barrier()
        return [came, time.monotonic()]

    times = world_of(2).run(late)
    assert min(left for _, left in times) >= max(came for came, _ in times)
