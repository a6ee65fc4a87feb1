"""GPU tests: collected everywhere, run where a Hopper GPU and the CUDA extension are."""

from __future__ import annotations

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = "no CUDA GPU here" if not torch.cuda.is_available() else ""
    for item in items:
        if "gpu" in item.keywords and missing:
            item.add_marker(pytest.mark.skip(reason=missing))
