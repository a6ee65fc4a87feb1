"""The layout kernel: the one operation that neither communicates nor needs symmetric memory."""

from __future__ import annotations

import torch

from deepep import _cuda
from deepep.backends.cuda.launch import MAX_BLOCKS, MAX_LOCAL_EXPERTS


class LayoutKernel:
    """Layouts of one rank on one device.

    They run one after the other, also on different streams: the workspace is one for all.
    """

    def __init__(self, num_ranks: int, device: torch.device) -> None:
        self._num_ranks = num_ranks
        self._device = device
        # Experts, ranks, domains, a counter: made here, for its zeros must not be part of a captured graph.
        self._workspace = torch.zeros(
            (MAX_LOCAL_EXPERTS + 2) * num_ranks + 1, dtype=torch.int32, device=device
        )
        #: a domain of one rank without memory: layouts touch none of it
        self.domain = _cuda.Domain(
            rank=0,
            heaps=[0],
            max_local_experts=MAX_LOCAL_EXPERTS,
            max_blocks=MAX_BLOCKS,
            staging_bytes=0,
            state=0,
            fault=0,
            timeout_seconds=0.0,
            turns=_cuda.Turns(),
        )
        torch.cuda.current_stream(device).synchronize()

    def launch(
        self, topk_idx: torch.Tensor, num_experts: int, ranks_per_domain: int, stream: int
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """Launches a layout of topk_idx [T, K].

        Returns tokens per rank [R] int32, per domain [D] int32 or None, per expert [E] int32, and
        token-in-rank [T, R] bool.
        """
        tokens, topk = topk_idx.shape
        ranks = self._num_ranks
        domains = -(-ranks // ranks_per_domain)
        ints = torch.empty(ranks + domains + num_experts, dtype=torch.int32, device=self._device)
        per_rank, per_domain, per_expert = ints.split([ranks, domains, num_experts])
        in_rank = torch.empty((tokens, ranks), dtype=torch.bool, device=self._device)
        wide = domains > 1
        self.domain.layout(
            num_blocks=max(1, min(8, tokens // 1024)),
            num_ranks=ranks,
            num_experts=num_experts,
            ranks_per_domain=ranks_per_domain,
            num_topk=topk,
            index_bytes=topk_idx.element_size(),
            num_tokens=tokens,
            topk_idx=topk_idx.data_ptr(),
            tokens_per_rank=per_rank.data_ptr(),
            tokens_per_domain=per_domain.data_ptr() if wide else 0,
            tokens_per_expert=per_expert.data_ptr(),
            is_token_in_rank=in_rank.data_ptr(),
            workspace=self._workspace.data_ptr(),
            stream=stream,
        )
        return per_rank, per_domain if wide else None, per_expert, in_rank
