"""Layers: dispatch and combine with gradients,
and an expert-parallel MoE layer, all traceable by torch.compile.
"""

from deepep.nn.buffers import BufferLike, buffer_number
from deepep.nn.exchange import Received, RouteTensors, combine, dispatch
from deepep.nn.experts import GroupedSwiGLU, SwiGLU
from deepep.nn.moe import ExpertParallelMoE, apply_experts
from deepep.nn.observe import Exchange, observe
from deepep.nn.placing import move_experts
from deepep.nn.router import Gate, Router

__all__ = [
    "BufferLike",
    "Exchange",
    "ExpertParallelMoE",
    "Gate",
    "GroupedSwiGLU",
    "Received",
    "RouteTensors",
    "Router",
    "SwiGLU",
    "apply_experts",
    "buffer_number",
    "combine",
    "dispatch",
    "move_experts",
    "observe",
]
