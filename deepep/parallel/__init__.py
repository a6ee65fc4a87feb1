"""Data parallelism: torch's DistributedDataParallel over this library's collectives, and its options.

DistributedDataParallel          gradients reduced as the options say; experts left to their ranks
optimize                         a model, a group, or the default group
clip_grad_norm_                  gradients' norm, each expert counted once
ElasticSampler                   which samples a rank takes, by the step and who is there
newcomer_group                   for the buffers of a process that joins with experts
set_config, configured           options of the process, of a block; ParallelConfig has their names
"""

from deepep.collectives.plan import ReductionPlan
from deepep.parallel.clipping import clip_grad_norm_
from deepep.parallel.config import ParallelConfig, configured, get_config, set_config
from deepep.parallel.ddp import DistributedDataParallel
from deepep.parallel.joining import newcomer_group
from deepep.parallel.optimize import Optimized, optimize
from deepep.parallel.sampler import ElasticSampler

__all__ = [
    "DistributedDataParallel",
    "ElasticSampler",
    "Optimized",
    "ParallelConfig",
    "ReductionPlan",
    "clip_grad_norm_",
    "configured",
    "get_config",
    "newcomer_group",
    "optimize",
    "set_config",
]
