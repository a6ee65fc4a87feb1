"""GPU tests: collected everywhere, run where a Hopper GPU and the CUDA extension are."""

from __future__ import annotations

import os

import pytest
import torch

# Before CUDA starts. Virtual ranks have a stream each; with the usual 8 queues of the GPU a stream's kernel
# would wait for kernels of another, which wait for it.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = "no CUDA GPU here" if not torch.cuda.is_available() else ""
    for item in items:
        if "gpu" in item.keywords and missing:
            item.add_marker(pytest.mark.skip(reason=missing))
