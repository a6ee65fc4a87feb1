"""Surroundings of the code in pages, by page: a model, rows, a buffer, as each rank of a world makes them."""

from __future__ import annotations

import ctypes
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

import deepep
import deepep.nn
import deepep.placement
from deepep.trace import TraceWriter

TOKENS, HIDDEN, EXPERTS = 8, 64, 8


def _routing() -> dict[str, torch.Tensor]:
    topk_idx = torch.arange(2 * TOKENS).view(TOKENS, 2) % EXPERTS
    return {"topk_idx": topk_idx, "topk_weights": torch.full((TOKENS, 2), 0.5)}


def _mean_square(y: torch.Tensor, *ignored: Any) -> Any:
    return y.square().mean()


def layers(context: Any) -> dict[str, Any]:
    buffer = deepep.Buffer(context.group)
    experts = deepep.nn.GroupedSwiGLU(EXPERTS // buffer.group_size, HIDDEN, 32)
    x = torch.randn(TOKENS, HIDDEN)
    return {"deepep": deepep, "torch": torch, **_routing(), **locals(), "num_experts": EXPERTS}


def placement(context: Any) -> dict[str, Any]:
    buffer = deepep.Buffer(context.group)
    x, rows = torch.randn(TOKENS, HIDDEN).bfloat16(), torch.randn(TOKENS, HIDDEN)
    sizes = {"R": buffer.group_size, "E": EXPERTS, "H": HIDDEN, "layers": 2, "layer": 1}
    w, loads = _routing()["topk_weights"], torch.arange(EXPERTS)
    device = torch.device("cpu")
    return {"deepep": deepep, "torch": torch, **_routing(), **locals(), **sizes}


def trace(context: Any) -> dict[str, Any]:
    writer = TraceWriter(num_layers=1, num_experts=EXPERTS, num_topk=2, num_ranks=2)
    given = _routing()
    writer.add(0, 0, [given["topk_idx"]] * 2, [given["topk_weights"]] * 2)
    folder = Path("demo-output")
    if context.rank == 0:
        folder.mkdir()
        writer.finish().save(folder / "routing.safetensors")
    torch.distributed.barrier(context.group)
    return {"rank": context.rank}


def operations(context: Any) -> dict[str, Any]:
    return {"deepep": deepep, "group": context.group, "D": 1}


def interop(context: Any) -> dict[str, Any]:
    buffer = deepep.Buffer(context.group)
    arrays = {name: tensor.numpy() for name, tensor in _routing().items()}
    return {"deepep": deepep, "buffer": buffer, "x": torch.randn(TOKENS, HIDDEN).numpy(), **arrays}


def jax(context: Any) -> dict[str, Any]:
    """Of interop.md, for its blocks on JAX."""
    import jax

    import deepep.interop.jax

    given: dict[str, Any] = {"deepep": deepep, "jax": jax, **interop(context), "E": EXPERTS}
    given |= {"parameters": jax.numpy.ones(HIDDEN), "experts": lambda received: jax.numpy.tanh(received.x)}

    def loss(parameters: Any, x: Any) -> Any:
        return given["layer"](x * parameters, given["topk_idx"], given["topk_weights"]).sum()

    given |= {"loss": loss, "ctypes": ctypes, "values": jax.numpy.ones(256), "num_bytes": 258}
    return given  # the same, to which the page adds its layer


class _Model(nn.Module):
    """A layer of experts behind a projection; given a buffer it makes the layer itself."""

    def __init__(self, of: Any) -> None:
        super().__init__()
        kind = {"hidden": HIDDEN, "expert_hidden": 32, "num_experts": EXPERTS, "num_topk": 2}
        self.moe = of if isinstance(of, nn.Module) else deepep.nn.ExpertParallelMoE(of, **kind)
        self.project = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: torch.Tensor) -> Any:
        return self.moe(self.project(x))


class _Data:
    """512 samples, and targets that nobody asks for."""

    def __len__(self) -> int:
        return 512

    def __getitem__(self, indices: Any) -> tuple[torch.Tensor, None]:
        return torch.randn(len(indices), HIDDEN), None


def parallel(context: Any) -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    sizes = {"R": context.num_ranks, "D": context.num_ranks, "E": EXPERTS, "H": HIDDEN, "steps": 2}
    names = {"rank": context.rank, "num_ranks": context.num_ranks, "device": torch.device("cpu")}
    names |= {"batch_of": lambda step: torch.randn(TOKENS, HIDDEN), "loss_of": _mean_square}
    names |= {"data": _Data(), "room": [320] * context.num_ranks, "takes_the_place_of_a_rank": False}
    names |= {"model": nn.Linear(HIDDEN, HIDDEN), "Model": _Model}
    tools = {"init_device_mesh": init_device_mesh, "fully_shard": fully_shard}
    return {"deepep": deepep, "torch": torch, **names, **sizes, **tools}


def before_block(page: str, number: int, names: dict[str, Any]) -> None:
    """Changes what a page's block finds, beyond what the blocks before it have made."""
    if (page, number) == (
        "operations",
        1,
    ):  # lanes, which CUDA between domains has alone: the arguments are taken
        made = inspect.signature(deepep.Buffer.__init__)
        names["deepep"] = SimpleNamespace(Buffer=lambda *words, **named: made.bind(None, *words, **named))
    if page != "parallel":
        return
    if number == 1:  # the one before set it for the process
        deepep.set_config(compression=False, topology="direct", probe_seconds=0)
    if number == 2:
        names["moe"] = (model := names["model"].module).moe
        names["all_ranks"], names["model"] = names["mesh"]._flatten("all"), model
    if number in (3, 6):
        names["module"] = names["model"] = nn.Linear(HIDDEN, HIDDEN)
        names["optimizer"] = torch.optim.AdamW(names["model"].parameters())
    if number == 5:  # of all ranks
        names["buffer"] = deepep.Buffer(torch.distributed.group.WORLD)


SURROUNDINGS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "observing": lambda context: {},
    "layers": layers,
    "placement": placement,
    "trace": trace,
    "operations": operations,
    "interop": interop,
    "jax": jax,
    "parallel": parallel,
}


def run_page(context: Any, page: str, blocks: list[str], numbers: list[int], folder: str) -> None:
    """On a rank: the blocks with these numbers, one after another, in a folder."""
    os.chdir(folder)
    names = SURROUNDINGS[page](context)
    for number in numbers:
        before_block(page, number, names)
        exec(compile(blocks[number], f"{page}, block {number}", "exec"), names)
