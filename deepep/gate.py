"""Gates: pure functions that choose each token's experts and weights from router logits; no communication.

Every gate maps router logits [T, E] to a `Routing`: `topk_idx` [T, K] int64, best choice first, and
`topk_weights` [T, K] in the precision of the scores (float32; float64 for float64 logits), differentiable
with respect to the logits. What `deepep.Buffer` takes is exactly this pair.

Ties are broken by index: among equal scores the lowest expert (and the lowest group) wins, on every device
and for every batch split, because the selection is a stable sort and not `torch.topk`. A NaN score sorts
above every number.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from deepep.errors import ArgumentTypeError, DeviceError, LayoutError, RangeError, ShapeError
from deepep.runtime.checks import check_int

#: Added to the sum of a token's sigmoid weights before dividing by it, so that K zero scores give zero
#: weights, not NaN.
WEIGHT_SUM_FLOOR = 1e-20

_MOST_SCALE = 1e38


class Routing(NamedTuple):
    """A gate's decision for T tokens.

    topk_idx: [T, K] int64, global expert indices, best first.
    topk_weights: [T, K] float32 (float64 for float64 logits), the weights of those experts.
    scores: [T, E], the unbiased scores the weights were taken from.
    """

    topk_idx: torch.Tensor
    topk_weights: torch.Tensor
    scores: torch.Tensor


def stable_topk(values: torch.Tensor, k: int) -> torch.Tensor:
    """Indices [..., k] int64 of the k largest along the last dimension, largest first.

    Ties go to the lowest index. Raises ArgumentTypeError, ShapeError or RangeError.
    """
    _check_tensor("values", values)
    if values.ndim == 0:
        raise ShapeError("values", "[]", "[.., n]")
    check_int("k", k, 1, values.shape[-1])
    return _stable_topk(values, k)


def _stable_topk(values: torch.Tensor, k: int) -> torch.Tensor:
    if values.is_cuda:
        from deepep.nn.selection import select_topk  # deepep.nn imports this module

        return select_topk(values.detach(), k)
    return torch.sort(values, dim=-1, descending=True, stable=True).indices[..., :k].contiguous()


def softmax_topk(
    logits: torch.Tensor,
    num_topk: int,
    *,
    bias: torch.Tensor | None = None,
    normalize: bool = False,
    scale: float = 1.0,
    alive: torch.Tensor | None = None,
) -> Routing:
    """Softmax over all experts, then the top k (Switch, Mixtral with `normalize=True`, DeepSeek-V2).

    logits: [T, E] of a floating dtype. num_topk: 1 <= K <= E.
    bias: [E], added to the scores for the selection alone; weights never contain it.
    normalize: divide the K weights of a token by their sum. scale: a finite number that multiplies the
    weights, last.
    alive: [E] bool, the experts there are; None: all. The others are as if the model did not have them: not
    chosen, no part of the softmax, a score of 0.
    Raises ArgumentTypeError, ShapeError or RangeError, also for fewer experts alive than K.
    """
    _check(logits, num_topk, bias, normalize, scale, alive)
    wide = _wide(logits)
    scores = torch.softmax(wide if alive is None else wide.masked_fill(~alive, -torch.inf), dim=-1)  # [T, E]
    return _weigh(scores, _topk_alive(_biased(scores, bias), num_topk, alive), normalize, scale)


def sigmoid_topk(
    logits: torch.Tensor,
    num_topk: int,
    *,
    bias: torch.Tensor | None = None,
    normalize: bool = True,
    scale: float = 1.0,
    alive: torch.Tensor | None = None,
) -> Routing:
    """Sigmoid of every logit, then the top k by score plus bias (DeepSeek-V3 without groups).

    Arguments and errors are softmax_topk's.
    """
    _check(logits, num_topk, bias, normalize, scale, alive)
    scores = _sigmoid(logits, alive)  # [T, E]
    return _weigh(scores, _topk_alive(_biased(scores, bias), num_topk, alive), normalize, scale)


def group_limited_topk(
    logits: torch.Tensor,
    num_topk: int,
    *,
    num_groups: int,
    num_kept_groups: int,
    bias: torch.Tensor | None = None,
    normalize: bool = True,
    scale: float = 1.0,
    alive: torch.Tensor | None = None,
) -> Routing:
    """Top k inside the best groups of experts, as DeepSeek-V3 routes.

    (There: 256 experts, 8 groups, 4 kept, top 8, scale 2.5.)

    Experts form `num_groups` contiguous groups of equal size. Scores are sigmoids; `bias` [E] is added for
    both selections and never enters a weight. A group's score is the sum of its two best biased scores (of
    its one, where groups have one expert); the `num_kept_groups` best groups stay; the K best experts by
    biased score are taken from these and from no other, however negative their biases are.

    Contract: where `num_groups` is a multiple of the number of nodes and experts are laid out contiguously,
    a token's experts lie on at most `num_kept_groups` nodes (`nodes_per_token`), which bounds its crossings
    between nodes.

    alive: [E] bool, the experts there are; None: all. A group's score is of those, and a group that has none
    is not picked, though fewer than `num_kept_groups` be left.

    Raises ArgumentTypeError, ShapeError or RangeError, also when the kept groups hold fewer than K experts,
    or those with the fewest alive do.
    """
    _check(logits, num_topk, bias, normalize, scale, alive)
    num_experts = logits.shape[1]
    check_int("num_groups", num_groups, 1, num_experts)
    if num_experts % num_groups:
        raise RangeError("num_groups", str(num_groups), f"a divisor of the number of experts, {num_experts}")
    check_int("num_kept_groups", num_kept_groups, 1, num_groups)
    group_size = num_experts // num_groups
    if num_topk > num_kept_groups * group_size:
        allowed = f"at most {num_kept_groups * group_size}, the experts of {num_kept_groups} groups"
        raise RangeError("num_topk", str(num_topk), allowed)

    if alive is not None:
        _check_alive_in_groups(alive.unflatten(0, (num_groups, group_size)), num_topk, num_kept_groups)

    scores = _sigmoid(logits, alive)  # [T, E]
    biased = _biased(scores, bias)
    grouped = biased.unflatten(-1, (num_groups, group_size))  # [T, G, E/G]
    there = None if alive is None else alive.unflatten(0, (num_groups, group_size))  # [G, E/G]
    kept = _best_groups(grouped, there, num_kept_groups)  # [T, kept], ascending
    # Only the kept groups' experts stand for election, in ascending order of index: no masking value is
    # needed that a bias could undercut (zero would beat a kept expert with a negative bias), and ties stay
    # with the lowest index.
    candidates = _of_groups(grouped, kept)  # [T, kept * E/G]
    among = None if there is None else _of_groups(there.expand_as(grouped), kept)
    chosen = _topk_alive(candidates, num_topk, among)  # [T, K]
    topk_idx = kept.gather(1, chosen // group_size) * group_size + chosen % group_size
    return _weigh(scores, topk_idx, normalize, scale)


def _of_groups(grouped: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Entries of grouped [T, G, E/G] that belong to the groups kept [T, g]: [T, g * E/G]."""
    return grouped.gather(1, kept.unsqueeze(-1).expand(-1, -1, grouped.shape[-1])).flatten(1)


def _best_groups(grouped: torch.Tensor, there: torch.Tensor | None, num_kept: int) -> torch.Tensor:
    """Groups with the best sums of their two best scores, of grouped [T, G, E/G], ascending: [T, kept].

    there: [G, E/G] bool, which experts count; a group without any is not taken, if there are enough others.
    """
    if there is None:
        two_best = torch.sort(grouped, dim=-1, descending=True, stable=True).values[..., :2]
        return _stable_topk(two_best.sum(-1), num_kept).sort(dim=-1).values
    best = _topk_alive(grouped, min(2, grouped.shape[-1]), there)  # [T, G, 2]
    counts = there.expand_as(grouped).gather(-1, best)
    sums = torch.where(counts, grouped.gather(-1, best), 0).sum(-1)
    return _topk_alive(sums, num_kept, there.any(-1)).sort(dim=-1).values


def nodes_per_token(topk_idx: torch.Tensor, num_experts: int, num_nodes: int) -> torch.Tensor:
    """Distinct nodes each token is sent to: [T] int64. Experts lie on nodes in contiguous, equal blocks.

    topk_idx: [T, K] integers, -1 for no expert. Raises ArgumentTypeError, ShapeError or RangeError.
    """
    _check_tensor("topk_idx", topk_idx, floating=False)
    if topk_idx.ndim != 2:
        raise ShapeError("topk_idx", str(list(topk_idx.shape)), "[tokens, top-k]")
    if topk_idx.is_meta:
        raise DeviceError("topk_idx", "meta", "a device with memory: its values are checked")
    check_int("num_experts", num_experts, 1, 2**31 - 1)
    check_int("num_nodes", num_nodes, 1, num_experts)
    if num_experts % num_nodes:
        raise RangeError("num_nodes", str(num_nodes), f"a divisor of the number of experts, {num_experts}")
    wide = topk_idx.long()  # the number of experts need not fit into 8 or 16 bits
    if wide.numel():
        low, high = (int(v) for v in wide.aminmax())
        if low < -1 or high >= num_experts:
            raise RangeError("topk_idx", str(low if low < -1 else high), f"-1 to {num_experts - 1}")
    node = torch.where(wide >= 0, wide // (num_experts // num_nodes), num_nodes)  # [T, K]
    visited = torch.zeros(len(wide), num_nodes + 1, dtype=torch.bool, device=wide.device)
    return visited.scatter(1, node, True)[:, :num_nodes].sum(1)


def _wide(logits: torch.Tensor) -> torch.Tensor:
    """Scores are computed in float32 at least: bf16 scores tie by the dozen."""
    return logits if logits.dtype == torch.float64 else logits.float()


def _sigmoid(logits: torch.Tensor, alive: torch.Tensor | None) -> torch.Tensor:
    scores = torch.sigmoid(_wide(logits))
    return scores if alive is None else scores.masked_fill(~alive, 0)


def _topk_alive(values: torch.Tensor, k: int, alive: torch.Tensor | None) -> torch.Tensor:
    """`_stable_topk` with entries that are alive (broadcast to values) before all others, whatever they are:
    a mask's value would tie with a bias of minus infinity, and a NaN sorts above all.
    """
    if alive is None:
        return _stable_topk(values, k)
    order = torch.sort(values, dim=-1, descending=True, stable=True).indices
    is_dead = ~alive.expand_as(values).gather(-1, order)
    return order.gather(-1, torch.sort(is_dead, dim=-1, stable=True).indices)[..., :k].contiguous()


def _biased(scores: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The scores that select: no gradient flows through a selection."""
    return scores.detach() if bias is None else scores.detach() + bias.detach().to(scores.dtype)


def _weigh(scores: torch.Tensor, topk_idx: torch.Tensor, normalize: bool, scale: float) -> Routing:
    weights = scores.gather(1, topk_idx)  # [T, K]
    if normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + WEIGHT_SUM_FLOOR)
    if scale != 1.0:
        weights = weights * float(scale)
    return Routing(topk_idx, weights, scores)


def _check(
    logits: object, num_topk: int, bias: object, normalize: object, scale: object, alive: object
) -> None:
    found = _check_tensor("logits", logits)
    if found.ndim != 2:
        raise ShapeError("logits", str(list(found.shape)), "[tokens, experts]")
    num_experts = found.shape[1]
    check_int("num_topk", num_topk, 1, num_experts)
    if bias is not None:
        shape = _check_tensor("bias", bias).shape
        if shape != (num_experts,):
            raise ShapeError("bias", str(list(shape)), f"[{num_experts}]")
    if alive is not None:
        _check_alive(alive, num_experts, num_topk)
    if not isinstance(normalize, bool):
        raise ArgumentTypeError("normalize", type(normalize).__name__, "a bool")
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        raise ArgumentTypeError("scale", type(scale).__name__, "a number")
    if not (-_MOST_SCALE < scale < _MOST_SCALE):
        got = f"{scale:g}" if isinstance(scale, float) else f"a number of {scale.bit_length()} bits"
        raise RangeError("scale", got, f"a finite number, of less than {_MOST_SCALE:g}")


def _check_alive(alive: object, num_experts: int, num_topk: int) -> None:
    if not isinstance(alive, torch.Tensor) or alive.dtype != torch.bool:
        got = str(getattr(alive, "dtype", type(alive).__name__)).removeprefix("torch.")
        raise ArgumentTypeError("alive", got, "a tensor of bools")
    if alive.shape != (num_experts,):
        raise ShapeError("alive", str(list(alive.shape)), f"[{num_experts}]")
    if _can_count(alive) and int(alive.sum()) < num_topk:
        raise RangeError("alive", f"{int(alive.sum())} experts", f"at least {num_topk}, the top k")


def _check_alive_in_groups(there: torch.Tensor, num_topk: int, num_kept: int) -> None:
    """there: [G, E/G]. Raises RangeError if a token could find fewer than K experts in its groups."""
    if not _can_count(there):
        return
    fewest = sorted(count for count in there.sum(-1).tolist() if count)[:num_kept]
    if sum(fewest) < num_topk:
        got = f"{sum(fewest)} experts in the {len(fewest)} groups that have the fewest"
        raise RangeError("alive", got, f"at least {num_topk}, the top k, in any {num_kept} groups")


def _can_count(alive: torch.Tensor) -> bool:
    """True if the values can be looked at without waiting for a device, or breaking a compiled graph."""
    return alive.device.type == "cpu" and not torch.compiler.is_compiling()


def _check_tensor(name: str, value: object, floating: bool = True) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        raise ArgumentTypeError(name, type(value).__name__, "a tensor")
    if value.layout != torch.strided:
        raise LayoutError(name, str(value.layout).removeprefix("torch."), "a dense tensor")
    integral = not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
    if not (value.is_floating_point() if floating else integral):
        allowed = "a floating-point tensor" if floating else "a tensor of integers"
        raise ArgumentTypeError(name, str(value.dtype).removeprefix("torch."), allowed)
    return value
