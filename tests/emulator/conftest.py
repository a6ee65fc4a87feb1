"""Runs of the emulator's litmus kernels (deepep.sim.explore.litmus)."""

from __future__ import annotations

import pytest
import torch

from deepep.sim.explore.litmus import Litmus


@pytest.fixture
def litmus() -> type[Litmus]:
    return Litmus


@pytest.fixture(autouse=True, scope="session")
def one_torch_thread() -> None:
    torch.set_num_threads(1)
