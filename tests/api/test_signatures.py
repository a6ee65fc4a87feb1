"""The whole V1 interface: names, order and defaults of every parameter, as clients call and inspect them."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

import deepep
from deepep import config

REQUIRED = inspect.Parameter.empty

# Written out from the interface's description; None stands for itself, REQUIRED for "no default".
BUFFER: dict[str, dict[str, Any]] = {
    "__init__": {
        "group": REQUIRED,
        "num_nvl_bytes": 0,
        "num_rdma_bytes": 0,
        "low_latency_mode": False,
        "num_qps_per_rank": 24,
        "allow_nvlink_for_low_latency_mode": True,
        "allow_mnnvl": False,
        "explicitly_destroy": False,
        "enable_shrink": False,
        "comm": None,
    },
    "destroy": {},
    "is_sm90_compiled": {},
    "set_num_sms": {"new_num_sms": REQUIRED},
    "capture": {},
    "get_low_latency_rdma_size_hint": {
        "num_max_dispatch_tokens_per_rank": REQUIRED,
        "hidden": REQUIRED,
        "num_ranks": REQUIRED,
        "num_experts": REQUIRED,
    },
    "get_comm_stream": {},
    "get_local_buffer_tensor": {
        "dtype": REQUIRED,
        "size": None,
        "offset": 0,
        "use_rdma_buffer": False,
    },
    "get_dispatch_config": {"num_ranks": REQUIRED},
    "get_combine_config": {"num_ranks": REQUIRED},
    "get_dispatch_layout": {
        "topk_idx": REQUIRED,
        "num_experts": REQUIRED,
        "previous_event": None,
        "async_finish": False,
        "allocate_on_comm_stream": False,
    },
    "dispatch": {
        "x": REQUIRED,
        "handle": None,
        "num_tokens_per_rank": None,
        "num_tokens_per_rdma_rank": None,
        "is_token_in_rank": None,
        "num_tokens_per_expert": None,
        "topk_idx": None,
        "topk_weights": None,
        "expert_alignment": 1,
        "num_worst_tokens": 0,
        "config": None,
        "previous_event": None,
        "async_finish": False,
        "allocate_on_comm_stream": False,
    },
    "combine": {
        "x": REQUIRED,
        "handle": REQUIRED,
        "topk_weights": None,
        "bias": None,
        "config": None,
        "previous_event": None,
        "async_finish": False,
        "allocate_on_comm_stream": False,
    },
    "internode_dispatch": {
        "x": REQUIRED,
        "handle": None,
        "num_tokens_per_rank": None,
        "num_tokens_per_rdma_rank": None,
        "is_token_in_rank": None,
        "num_tokens_per_expert": None,
        "topk_idx": None,
        "topk_weights": None,
        "expert_alignment": 1,
        "config": None,
        "previous_event": None,
        "async_finish": False,
        "allocate_on_comm_stream": False,
    },
    "internode_combine": {
        "x": REQUIRED,
        "handle": REQUIRED,
        "topk_weights": None,
        "bias": None,
        "config": None,
        "previous_event": None,
        "async_finish": False,
        "allocate_on_comm_stream": False,
    },
    "clean_low_latency_buffer": {
        "num_max_dispatch_tokens_per_rank": REQUIRED,
        "hidden": REQUIRED,
        "num_experts": REQUIRED,
    },
    "low_latency_dispatch": {
        "x": REQUIRED,
        "topk_idx": REQUIRED,
        "num_max_dispatch_tokens_per_rank": REQUIRED,
        "num_experts": REQUIRED,
        "cumulative_local_expert_recv_stats": None,
        "dispatch_wait_recv_cost_stats": None,
        "use_fp8": True,
        "round_scale": False,
        "use_ue8m0": False,
        "async_finish": False,
        "return_recv_hook": False,
    },
    "low_latency_combine": {
        "x": REQUIRED,
        "topk_idx": REQUIRED,
        "topk_weights": REQUIRED,
        "handle": REQUIRED,
        "use_logfmt": False,
        "zero_copy": False,
        "async_finish": False,
        "return_recv_hook": False,
        "out": None,
        "combine_wait_recv_cost_stats": None,
    },
    "get_next_low_latency_combine_buffer": {"handle": REQUIRED},
    "low_latency_update_mask_buffer": {"rank_to_mask": REQUIRED, "mask": False},
    "low_latency_query_mask_buffer": {"mask_status": REQUIRED},
    "low_latency_clean_mask_buffer": {},
}

# Of no DeepEP, and of both classes here.
SHARED: dict[str, dict[str, Any]] = {
    "count_experts": {"counts": REQUIRED},
    "gather_expert_counts": {"counts": REQUIRED, "zero": False},
    "release_memory": {},
}

# Not of V1.
OWN: dict[str, dict[str, Any]] = {
    "invite": {"ranks": REQUIRED},
    "admit": {"invitation": REQUIRED},
    "dismiss": {"ranks": REQUIRED},
    "join": {"invitation": REQUIRED, "rank": REQUIRED},
}

# This library's own, and those of DeepEP's forks; by keyword alone.
KEYWORDS: dict[str, dict[str, Any]] = {
    "join": {
        **dict.fromkeys(("store", "device", "timeout")),
        **dict.fromkeys(("num_nvl_bytes", "num_rdma_bytes"), 0),
    },
    "__init__": {
        **dict.fromkeys(("backend", "device", "timeout", "symmetric_bytes", "ranks_per_domain")),
        "max_num_ranks": None,
        **dict.fromkeys(("service_level", "traffic_class")),
        "reduction": "expert_rank",
        "use_fabric": False,
    },
    "dispatch": {"num_experts": None},
    "get_low_latency_rdma_size_hint": {
        "ranks_per_domain": None,
        "reduction": "expert_rank",
        "num_topk": None,
    },
    "low_latency_dispatch": {
        "topk_weights": None,
        "num_sms": 0,
        "use_nvfp4": False,
        "x_global_scale": None,
        "align_fp8_quantization": True,
    },
    "low_latency_combine": {
        "num_sms": 0,
        "overlap": False,
        **dict.fromkeys(("packed_recv_count", "comp_signal", "src_signals")),
        **dict.fromkeys(("block_m", "threshold", "src_signal_expect_value"), 0),
    },
}

ELASTIC: dict[str, dict[str, Any]] = {
    "__init__": {
        "group": REQUIRED,
        "num_bytes": None,
        "num_cpu_bytes": 0,
        "num_max_tokens_per_rank": 0,
        "hidden": 0,
        "num_topk": 0,
        "use_fp8_dispatch": False,
        "deterministic": False,
        "allow_hybrid_mode": True,
        "allow_multiple_reduction": True,
        "prefer_overlap_with_compute": True,
        "sl_idx": 3,
        "num_allocated_qps": 0,
        "num_cpu_timeout_secs": 300,
        "num_gpu_timeout_secs": 100,
        "explicitly_destroy": False,
    },
    "destroy": {},
    "get_buffer_size_hint": {
        "group": REQUIRED,
        "num_max_tokens_per_rank": REQUIRED,
        "hidden": REQUIRED,
        "num_topk": 0,
        "use_fp8_dispatch": False,
        "allow_hybrid_mode": True,
        "allow_multiple_reduction": True,
    },
    "get_theoretical_num_sms": {
        "num_experts": REQUIRED,
        "num_topk": REQUIRED,
        "num_scaleout_topk": 0,
        "rdma_gbs": 0,
        "nvlink_gbs": 0,
        "sm_read_gbs": 200,
        "sm_write_gbs": 50,
    },
    "get_theoretical_num_qps": {"num_sms": REQUIRED},
    "get_engram_storage_size_hint": {
        "num_entries": REQUIRED,
        "hidden": REQUIRED,
        "num_max_tokens_per_rank": REQUIRED,
        "dtype": torch.bfloat16,
    },
    "get_pp_buffer_size_hint": {"num_max_tensor_bytes": REQUIRED, "num_max_inflight_tensors": REQUIRED},
    "get_agrs_num_max_session_bytes": {"group": REQUIRED, "shapes": REQUIRED, "dtype": REQUIRED},
    "get_agrs_buffer_size_hint": {"group": REQUIRED, "num_max_session_bytes": REQUIRED},
    "engram_write": {"storage": REQUIRED, "sf": None},
    "engram_fetch": {"indices": REQUIRED, "num_qps": 0, "use_tma_aligned_col_major_sf": False},
    "pp_set_config": {"num_max_tensor_bytes": REQUIRED, "num_max_inflight_tensors": REQUIRED},
    "pp_send": {"t": REQUIRED, "dst_rank_idx": REQUIRED, "num_sms": 0},
    "pp_recv": {"t": REQUIRED, "src_rank_idx": REQUIRED, "num_sms": 0},
    "agrs_set_config": {"num_max_session_bytes": REQUIRED, "num_max_all_gathers_per_session": REQUIRED},
    "create_agrs_session": {},
    "destroy_agrs_session": {},
    "agrs_new_session": {"enabled": True},
    "agrs_get_inplace_tensor": {"shapes": REQUIRED, "dtype": REQUIRED},
    "all_gather": {"t": REQUIRED},
    "get_physical_domain_size": {},
    "get_logical_domain_size": {},
    "get_comm_stream": {},
    "capture": {},
    "barrier": {"use_comm_stream": True, "with_cpu_sync": False, "sequential": True},
    "dispatch": {
        "x": REQUIRED,
        "topk_idx": None,
        "topk_weights": None,
        "cumulative_local_expert_recv_stats": None,
        "num_experts": None,
        "num_max_tokens_per_rank": None,
        "expert_alignment": None,
        "num_sms": 0,
        "num_qps": 0,
        "previous_event": None,
        "previous_event_before_epilogue": None,
        "async_with_compute_stream": False,
        "allocate_on_comm_stream": False,
        "handle": None,
        "do_handle_copy": True,
        "do_cpu_sync": None,
        "do_expand": False,
        "do_zero_padding": False,
        "use_tma_aligned_col_major_sf": False,
    },
    "combine": {
        "x": REQUIRED,
        "handle": REQUIRED,
        "topk_weights": None,
        "bias": None,
        "num_sms": 0,
        "num_qps": 0,
        "previous_event": None,
        "previous_event_before_epilogue": None,
        "async_with_compute_stream": False,
        "allocate_on_comm_stream": False,
    },
}

ELASTIC_KEYWORDS: dict[str, dict[str, Any]] = {
    "__init__": {"backend": None, "device": None, "ranks_per_domain": None},
    "dispatch": {"num_max_expanded_tokens": None},
}

OTHERS: dict[Any, dict[str, Any]] = {
    deepep.Config: {
        "num_sms": 20,
        "num_max_nvl_chunked_send_tokens": 6,
        "num_max_nvl_chunked_recv_tokens": 256,
        "num_max_rdma_chunked_send_tokens": 6,
        "num_max_rdma_chunked_recv_tokens": 256,
    },
    deepep.Config.get_nvl_buffer_size_hint: {"hidden_bytes": REQUIRED, "num_ranks": REQUIRED},
    deepep.Config.get_rdma_buffer_size_hint: {"hidden_bytes": REQUIRED, "num_ranks": REQUIRED},
    deepep.EventOverlap: {"event": None, "extra_tensors": None},
    deepep.EventOverlap.current_stream_wait: {"release_handle": False},
}


def parameters(function: Any, keyword_only: bool = False) -> dict[str, Any]:
    kinds = {inspect.Parameter.POSITIONAL_OR_KEYWORD}
    if keyword_only:
        kinds = {inspect.Parameter.KEYWORD_ONLY}
    found = inspect.signature(function).parameters.values()
    assert all(p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in found)
    return {p.name: p.default for p in found if p.kind in kinds and p.name != "self"}


@pytest.mark.parametrize("name", BUFFER)
def test_buffers_methods(name: str) -> None:
    method = getattr(deepep.Buffer, name)
    assert list(parameters(method).items()) == list(BUFFER[name].items())
    assert parameters(method, keyword_only=True) == KEYWORDS.get(name, {})


@pytest.mark.parametrize("name", ELASTIC)
def test_elastic_buffers_methods(name: str) -> None:
    method = getattr(deepep.ElasticBuffer, name)
    assert list(parameters(method).items()) == list(ELASTIC[name].items())
    assert parameters(method, keyword_only=True) == ELASTIC_KEYWORDS.get(name, {})


WAITS = ("measure_waits", "wait_statistics", "gather_wait_statistics", "record_warps")
"""This library's own, of either class: tests/runtime/test_waits.py, tests/api/test_warp_lines.py."""


def test_nothing_public_beside_elastic_buffers() -> None:
    public = {name for name in dir(deepep.ElasticBuffer) if not name.startswith("_")}
    assert public - {"info", *WAITS} == {*ELASTIC, *SHARED} - {"__init__"}


def test_nothing_public_beside_it() -> None:
    public = {name for name in dir(deepep.Buffer) if not name.startswith("_")}
    own = {"num_sms", "info", *OWN, *SHARED, *WAITS}
    assert public - own == set(BUFFER) - {"__init__"}


@pytest.mark.parametrize("name", OWN)
def test_methods_of_this_library_alone(name: str) -> None:
    method = getattr(deepep.Buffer, name)
    assert list(parameters(method).items()) == list(OWN[name].items())
    assert parameters(method, keyword_only=True) == KEYWORDS.get(name, {})


@pytest.mark.parametrize("kind", [deepep.Buffer, deepep.ElasticBuffer])
@pytest.mark.parametrize("name", SHARED)
def test_what_both_buffers_have(kind: Any, name: str) -> None:
    assert list(parameters(getattr(kind, name)).items()) == list(SHARED[name].items())


@pytest.mark.parametrize("thing", OTHERS, ids=lambda thing: thing.__qualname__)
def test_the_other_classes(thing: Any) -> None:
    assert list(parameters(thing).items()) == list(OTHERS[thing].items())


def test_static_methods() -> None:
    for name in (
        "is_sm90_compiled",
        "set_num_sms",
        "capture",
        "get_low_latency_rdma_size_hint",
        "get_dispatch_config",
        "get_combine_config",
    ):
        assert isinstance(inspect.getattr_static(deepep.Buffer, name), staticmethod), name


def test_values() -> None:
    assert deepep.topk_idx_t == torch.int64
    assert deepep.Buffer.num_sms == config.DEFAULT_NUM_SMS == 24  # V1 has 20; ours was measured best with 24
    assert deepep.Config().num_sms == 20
    assert deepep.Buffer.get_dispatch_config(8).num_sms == deepep.Buffer.get_combine_config(8).num_sms == 24
    assert isinstance(deepep.Buffer.is_sm90_compiled(), bool)


def attributes(ctx: Any) -> None:
    buffer = deepep.Buffer(ctx.group, 256, 1280, True, 4, explicitly_destroy=True, timeout=30.0)
    assert (buffer.rank, buffer.group, buffer.group_size) == (ctx.rank, ctx.group, ctx.num_ranks)
    assert (buffer.num_nvl_bytes, buffer.num_rdma_bytes) == (256, 1280)
    assert (buffer.low_latency_mode, buffer.explicitly_destroy, buffer.enable_shrink) == (True, True, False)
    assert buffer.runtime is not None
    assert buffer.get_comm_stream() is None

    # Local memory: by bytes, kept, one for each buffer.
    whole = buffer.get_local_buffer_tensor(torch.bfloat16)
    assert (whole.dtype, whole.shape) == (torch.bfloat16, (128,))
    whole.copy_(torch.arange(128))
    part = buffer.get_local_buffer_tensor(torch.bfloat16, torch.Size((2, 4)), offset=16)
    assert torch.equal(part, torch.arange(8, 16).bfloat16().view(2, 4))
    assert buffer.get_local_buffer_tensor(torch.int64, use_rdma_buffer=True).shape == (160,)
    for size, offset in ((torch.Size((129,)), 0), (None, 257), (None, -1)):
        with pytest.raises(deepep.RangeError):
            buffer.get_local_buffer_tensor(torch.bfloat16, size, offset)
    buffer.destroy()


def test_attributes_and_local_memory(world_of: Any) -> None:
    world_of(2).run(attributes)


def test_num_sms_from_one_upwards() -> None:
    try:
        for count in (1, 7, 24):
            deepep.Buffer.set_num_sms(count)
            assert deepep.Buffer.get_dispatch_config(2).num_sms == count
            assert deepep.Buffer.get_combine_config(2).num_sms == count
        with pytest.raises(deepep.RangeError):
            deepep.Buffer.set_num_sms(0)
        with pytest.raises(deepep.ArgumentTypeError):
            deepep.Buffer.set_num_sms(2.0)
    finally:
        deepep.Buffer.set_num_sms(config.DEFAULT_NUM_SMS)
