"""The router of an MoE layer: a linear map to logits, a gate, and balancing by bias (deepep.nn.balance)."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from deepep._core import MAX_TOPK
from deepep.errors import ArgumentError, ArgumentTypeError, ShapeError
from deepep.gate import Routing, sigmoid_topk
from deepep.nn.balance import count_load, rate_problem, summed_load
from deepep.nn.experts import MAX_EXPERTS, MAX_HIDDEN, MAX_SEED, fill, generator_of, normal, parameter
from deepep.nn.logits import router_logits
from deepep.nn.precision import check_input, without_autocast
from deepep.runtime.checks import INDEX_DTYPES, check_int, check_ints, dtype_names
from deepep.runtime.engine import Engine

#: Maps logits [T, E], K and `bias=` [E] to a Routing, or to anything with its `topk_idx` [T, K], int32 or
#: int64 with -1 for no expert, and `topk_weights` [T, K]: deepep.gate's functions, or a functools.partial.
Gate = Callable[..., Routing]


class Router(nn.Module):
    """Logits x W^T in float32 (float64 for float64 rows), then `gate(logits, num_topk, bias=self.bias)`.

    Computes so under torch.autocast, too. weight: [E, H] parameter. bias: [E] float32 buffer, saved with
    the model; it stays float32 when the model is cast: steps of 0.001 would be lost otherwise. load: [E]
    int64, top-k entries per expert since the last `rebalance`, of this rank's tokens, counted by every
    forward in training mode, once also where a checkpoint repeats it. It is this rank's own, so it is no
    buffer: wrappers for data parallelism take buffers for replicated. Not saved. alive: [E] bool, the experts
    that the gate chooses among, or None: all (`choose_among`). Not saved either.
    """

    bias: Tensor
    load: Tensor
    alive: Tensor | None = None

    def __init__(
        self,
        hidden: int,
        num_experts: int,
        num_topk: int,
        *,
        gate: Gate = sigmoid_topk,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_int("hidden", hidden, 1, MAX_HIDDEN)
        check_int("num_experts", num_experts, 1, MAX_EXPERTS)
        check_int("num_topk", num_topk, 1, min(num_experts, MAX_TOPK))
        if not callable(gate):
            raise ArgumentTypeError("gate", type(gate).__name__, "a function of logits, num_topk and bias=")
        self.num_topk, self.gate, self.seed = num_topk, gate, seed
        self.weight = parameter((num_experts, hidden), device, dtype)
        with torch.inference_mode(False):
            self.register_buffer("bias", torch.zeros(num_experts, device=device, dtype=torch.float32))
            self.load = torch.zeros(num_experts, device=device, dtype=torch.int64)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, seed: int | None = None) -> None:
        """Draws the weight from `seed`, or from that of before; forgets biases and load."""
        self.seed = check_int("seed", self.seed if seed is None else seed, -MAX_SEED, MAX_SEED)
        if not self.weight.is_meta:
            fill(self.weight, normal(self.weight.shape, self.weight.shape[1], generator_of(self.seed)))
        self.bias.zero_()
        self.load.zero_()

    def forward(self, x: Tensor) -> Routing:
        """x [T, H] -> Routing: topk_idx [T, K], topk_weights [T, K], scores [T, E].

        Raises ArgumentTypeError, ShapeError or DeviceError.
        """
        check_input(x, self.weight, self.weight.shape[1], ndim=2)
        if self.bias.dtype != torch.float32:
            allowed = "float32: leave the bias out of what casts buffers"
            raise ArgumentTypeError("router.bias", dtype_names([self.bias.dtype]), allowed)
        with without_autocast(x):
            logits = router_logits(x, self.weight)  # [T, E]
            routing = self.gate(logits, self.num_topk, bias=self.bias, **self._restriction())
        _check_routing(routing, x.shape[0])
        if self.training:
            if self.load.device != x.device:  # moved by something that moves parameters and buffers alone
                self.load = self.load.to(x.device)
            count_load(self.load, routing.topk_idx)
        return routing

    @torch.no_grad()
    def rebalance(self, rate: float, group: Any = None) -> Tensor:
        """Moves every bias by `rate` towards an even load, and forgets the load.

        Collective over `group` (None: this rank's load alone), whose loads are added up first, so that all
        ranks keep the same biases; of an engine, its members. Returns that load, [E] int64. Loads are
        integers: the result does not depend on the order of the sum. DeepSeek-V3 used a rate of 0.001. While
        experts are missing (`choose_among`), the mean is that of those there are, and others' biases stay.
        Raises ArgumentTypeError or RangeError for what is no finite number, MismatchError for different
        rates; on all ranks.
        """
        if group is None:
            problem = rate_problem(rate)
            if problem is not None:
                raise problem
            load = self.load.clone()
        else:
            if not isinstance(group, torch.distributed.ProcessGroup | Engine):
                raise ArgumentTypeError("group", type(group).__name__, "a process group or None")
            load = summed_load(self.load, rate, group)
        num_alive: Tensor | int = load.numel()
        if self.alive is not None:
            load, num_alive = load * self.alive, self.alive.sum()
        # sign(mean - load) without a division: sum - E * load has the same sign, exactly.
        change = rate * torch.sign(load.sum() - num_alive * load).to(self.bias.dtype)
        self.bias += change if self.alive is None else change * self.alive
        self.load.zero_()
        return load

    def choose_among(self, alive: Collection[int]) -> None:
        """Has the gate choose among these experts alone from now on, on all ranks alike: the others are as if
        the model did not have them, in weights, groups and balance; all of them: as before.

        Raises RangeError for fewer than the gate needs, ArgumentTypeError where it takes no `alive=`.
        """
        num_experts = self.weight.shape[0]
        chosen = set(check_ints("alive", alive, 0, num_experts - 1))
        mask = torch.tensor([expert in chosen for expert in range(num_experts)], device="cpu")
        if bool(mask.all()):
            self.alive = None
            return
        try:  # on the host, where the gate can count them
            bias = self.bias.to("cpu", torch.float32)
            self.gate(torch.zeros(1, num_experts, device="cpu"), self.num_topk, bias=bias, alive=mask)
        except ArgumentError:
            raise
        except TypeError as error:
            allowed = "a function that takes alive= [E] bool, as those of deepep.gate"
            raise ArgumentTypeError("gate", str(error), allowed) from error
        self.alive = mask.to(self.bias.device)

    def _restriction(self) -> dict[str, Tensor]:
        """Arguments of the gate, while experts are missing."""
        return {} if self.alive is None else {"alive": self.alive}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        """Moves and casts, as `.to` and its kind: the bias keeps its dtype and values, the load its dtype."""
        bias = self.bias
        super()._apply(fn, recurse)
        with torch.inference_mode(False):
            if self.bias.dtype != torch.float32:
                self.bias = bias.to(self.bias.device)
            if self.load.is_meta and not self.bias.is_meta:
                self.load = torch.zeros_like(self.load, device=self.bias.device)
            else:
                self.load = self.load.to(self.bias.device)
            if self.alive is not None and not self.bias.is_meta:
                self.alive = self.alive.to(self.bias.device)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if self.bias.dtype != torch.float32:  # put in place of the old one, by assign=True
            self.bias = self.bias.float()


def _check_routing(routing: Any, num_tokens: int) -> None:
    """Raises ArgumentTypeError or ShapeError for what a gate of somebody else's returned."""
    for name in ("topk_idx", "topk_weights"):
        found = getattr(routing, name, None)
        if not isinstance(found, Tensor):
            raise ArgumentTypeError("gate", f"a {type(routing).__name__} without {name}", "a Routing")
        if found.ndim != 2 or found.shape[0] != num_tokens:
            raise ShapeError(f"gate's {name}", str(list(found.shape)), "[tokens, top-k]")
    if routing.topk_idx.dtype not in INDEX_DTYPES:
        got = dtype_names([routing.topk_idx.dtype])
        raise ArgumentTypeError("gate's topk_idx", got, dtype_names(INDEX_DTYPES))
    if not routing.topk_weights.is_floating_point():
        got = dtype_names([routing.topk_weights.dtype])
        raise ArgumentTypeError("gate's topk_weights", got, "a floating-point tensor")
    if routing.topk_idx.shape != routing.topk_weights.shape:
        got = f"{list(routing.topk_idx.shape)}, topk_weights {list(routing.topk_weights.shape)}"
        raise ShapeError("gate's topk_idx", got, "the same shapes")
