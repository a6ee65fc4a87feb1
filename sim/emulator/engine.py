"""The emulator backend: the kernels' own source on the CPU, behind the same calls.

Operations run on emulated machines (deepep.sim.emulator.all_to_all, low_latency_exchange); everything around
them, and what kernels do not do, are the reference's. For tests: an operation takes milliseconds to seconds.
"""

from __future__ import annotations

import os
from dataclasses import replace

import torch
from torch import Tensor

from deepep import _emulator
from deepep.backends.reference import high_throughput
from deepep.backends.reference.engine import ReferenceEngine
from deepep.backends.reference.low_latency import LowLatencyOperations
from deepep.errors import ArgumentTypeError, ModeError
from deepep.runtime import checks
from deepep.runtime.completion import Completion
from deepep.runtime.control.issue import ControlPlane
from deepep.runtime.control.lines import LineRecorder
from deepep.runtime.engine import EngineOptions
from deepep.runtime.low_latency_checks import has_gateways
from deepep.runtime.requests import (
    Combined,
    CombineRequest,
    Dispatched,
    DispatchRequest,
    Layout,
    Operation,
    Route,
    Schedule,
)
from deepep.sim.emulator.all_to_all import EmulatedAllToAll
from deepep.sim.emulator.local_rows import EmulatedRows
from deepep.sim.emulator.low_latency_exchange import EmulatedLowLatencyExchange


class EmulatorEngine(ReferenceEngine):
    """See `Engine`."""

    def __init__(self, options: EngineOptions, control: ControlPlane) -> None:
        super().__init__(options, control)
        names = (
            *("layout", "dispatch", "cached dispatch", "combine"),
            *("low-latency dispatch", "low-latency combine"),
        )
        operations = {**self.info.operations, **dict.fromkeys(names, "emulated kernels")}
        self.info = replace(self.info, backend="emulator", operations=operations)
        self._control.waits.rows = False  # they travel to the leader, which every rank would wait for
        per_domain = options.ranks_per_domain
        if options.low_latency and self.info.num_ranks > _emulator.MAX_RANKS:
            raise ModeError("low_latency_mode", "True", f"False with more than {_emulator.MAX_RANKS} ranks")
        domains = per_domain if per_domain < self.info.num_ranks else 0
        self.lines = None if domains else LineRecorder(self.info.rank)
        self._kernels = EmulatedAllToAll(self._control.waits, domains, self.lines)
        self._is_one_domain = per_domain >= self.info.num_ranks or per_domain == 0
        self.local_rows = EmulatedRows()
        seed = int(os.environ.get("DEEPEP_EMULATOR_SEED", "0"))
        exchange = EmulatedLowLatencyExchange(
            *(seed, self._control.waits, domains, self.lines),
            has_gateways=has_gateways(options, self.info.num_ranks),
        )
        self._low_latency = LowLatencyOperations(self._control, self, exchange)

    def _layout(
        self, topk_idx: Tensor, num_experts: int, schedule: Schedule
    ) -> tuple[Layout, Completion | None]:
        num_ranks, per_domain = self.info.num_ranks, self.info.ranks_per_domain
        checks.check_topk_idx(topk_idx, self.info.device_type)
        checks.check_num_experts(num_experts, num_ranks)
        topk_idx = topk_idx.detach()
        layout = high_throughput.empty_layout(topk_idx, num_experts, num_ranks, per_domain)

        def job() -> None:
            checks.check_index_range(topk_idx, num_experts)
            made = self._kernels.layout(topk_idx, num_experts, num_ranks, per_domain)
            for target, got in zip(high_throughput.layout_tensors(layout), made, strict=True):
                if target is not None and got is not None:
                    target.copy_(got)

        tensors = (topk_idx, *high_throughput.layout_tensors(layout))
        completion = self._control.locally(job, schedule, tensors)
        return layout, self._control.finish(schedule, completion)

    def _dispatch_cached(self, request: DispatchRequest, route: Route, schedule: Schedule) -> Dispatched:
        return high_throughput.dispatch_cached(self._control, request, route, schedule, self._kernels)

    def _dispatch_fresh(self, request: DispatchRequest, schedule: Schedule) -> Dispatched:
        assert request.layout is not None
        in_rank, per_expert = request.layout.is_token_in_rank, request.layout.num_tokens_per_expert
        route = Route(self, request.x.shape[0], per_expert.numel(), in_rank)
        return high_throughput.dispatch_fresh(self._control, request, route, schedule, self._kernels)

    def combine(self, request: CombineRequest, schedule: Schedule) -> Combined:
        with self._control.issuing:
            with self._issuing(Operation.COMBINE, schedule):
                self._check_combine(request)
            kernels = self._kernels
            if request.slots is not None:
                kernels = kernels.summing(request.slots, request.factors)
            return high_throughput.combine(self._control, request, schedule, kernels)

    def sums_expanded(self, x: Tensor, num_sms: int = 0) -> bool:
        return self._is_one_domain and x.dtype == torch.bfloat16 and x.is_contiguous() and not x.is_neg()

    def _check_combine(self, request: CombineRequest) -> None:
        super()._check_combine(request)
        if request.x.dtype != torch.bfloat16:
            raise ArgumentTypeError("x", str(request.x.dtype), "torch.bfloat16")
