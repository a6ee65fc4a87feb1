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
) -> Routing:
    """Softmax over all experts, then the top k (Switch, Mixtral with `normalize=True`, DeepSeek-V2).

    logits: [T, E] of a floating dtype. num_topk: 1 <= K <= E.
    bias: [E], added to the scores for the selection alone; weights never contain it.
    normalize: divide the K weights of a token by their sum. scale: a finite number that multiplies the
    weights, last.
    Raises ArgumentTypeError, ShapeError or RangeError.
    """
    _check(logits, num_topk, bias, normalize, scale)
    scores = torch.softmax(_wide(logits), dim=-1)  # [T, E]
    return _weigh(scores, _stable_topk(_biased(scores, bias), num_topk), normalize, scale)


def sigmoid_topk(
    logits: torch.Tensor,
    num_topk: int,
    *,
    bias: torch.Tensor | None = None,
    normalize: bool = True,
    scale: float = 1.0,
) -> Routing:
    """Sigmoid of every logit, then the top k by score plus bias (DeepSeek-V3 without groups).

    Arguments and errors are softmax_topk's.
    """
    _check(logits, num_topk, bias, normalize, scale)
    scores = torch.sigmoid(_wide(logits))  # [T, E]
    return _weigh(scores, _stable_topk(_biased(scores, bias), num_topk), normalize, scale)


def group_limited_topk(
    logits: torch.Tensor,
    num_topk: int,
    *,
    num_groups: int,
    num_kept_groups: int,
    bias: torch.Tensor | None = None,
    normalize: bool = True,
    scale: float = 1.0,
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

    Raises ArgumentTypeError, ShapeError or RangeError, also when the kept groups hold fewer than K experts.
    """
    _check(logits, num_topk, bias, normalize, scale)
    num_experts = logits.shape[1]
    check_int("num_groups", num_groups, 1, num_experts)
    if num_experts % num_groups:
        raise RangeError("num_groups", str(num_groups), f"a divisor of the number of experts, {num_experts}")
    check_int("num_kept_groups", num_kept_groups, 1, num_groups)
    group_size = num_experts // num_groups
    if num_topk > num_kept_groups * group_size:
        allowed = f"at most {num_kept_groups * group_size}, the experts of {num_kept_groups} groups"
        raise RangeError("num_topk", str(num_topk), allowed)

    scores = torch.sigmoid(_wide(logits))  # [T, E]
    grouped = _biased(scores, bias).unflatten(-1, (num_groups, group_size))  # [T, G, E/G]
    two_best = torch.sort(grouped, dim=-1, descending=True, stable=True).values[..., :2]
    kept = _stable_topk(two_best.sum(-1), num_kept_groups).sort(dim=-1).values  # [T, kept], ascending
    # Only the kept groups' experts stand for election, in ascending order of index: no masking value is
    # needed that a bias could undercut (zero would beat a kept expert with a negative bias), and ties stay
    # with the lowest index.
    candidates = grouped.gather(1, kept.unsqueeze(-1).expand(-1, -1, group_size)).flatten(
        1
    )  # [T, kept * E/G]
    chosen = _stable_topk(candidates, num_topk)  # [T, K]
    topk_idx = kept.gather(1, chosen // group_size) * group_size + chosen % group_size
    return _weigh(scores, topk_idx, normalize, scale)


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


def _check(logits: object, num_topk: object, bias: object, normalize: object, scale: object) -> None:
    found = _check_tensor("logits", logits)
    if found.ndim != 2:
        raise ShapeError("logits", str(list(found.shape)), "[tokens, experts]")
    num_experts = found.shape[1]
    check_int("num_topk", num_topk, 1, num_experts)
    if bias is not None:
        shape = _check_tensor("bias", bias).shape
        if shape != (num_experts,):
            raise ShapeError("bias", str(list(shape)), f"[{num_experts}]")
    if not isinstance(normalize, bool):
        raise ArgumentTypeError("normalize", type(normalize).__name__, "a bool")
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        raise ArgumentTypeError("scale", type(scale).__name__, "a number")
    if not (-_MOST_SCALE < scale < _MOST_SCALE):
        got = f"{scale:g}" if isinstance(scale, float) else f"a number of {scale.bit_length()} bits"
        raise RangeError("scale", got, f"a finite number, of less than {_MOST_SCALE:g}")


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
