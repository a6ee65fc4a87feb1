"""The routing trace: what is written is read back exactly, and a file that lies is refused."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from deepep.errors import ArgumentError, ArgumentTypeError, RangeError
from deepep.trace import RoutingTrace, TraceError, TraceWriter

RANKS, LAYERS, EXPERTS, TOPK = 3, 2, 12, 4
STEPS = (0, 5, 6)


def batch(step: int, layer: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Uneven tokens per rank, none on rank 1 in step 5; -1 entries."""
    generator = torch.Generator().manual_seed(step * 10 + layer)
    sizes = [4 + layer, 0 if step == 5 else 3, 7]
    idx = [torch.randint(-1, EXPERTS, (t, TOPK), generator=generator) for t in sizes]
    return idx, [torch.rand(t, TOPK, generator=generator) for t in sizes]


def written(experts: int = EXPERTS) -> RoutingTrace:
    writer = TraceWriter(
        num_layers=LAYERS, num_ranks=RANKS, num_experts=experts, num_topk=TOPK, notes={"producer": "a test"}
    )
    for step in STEPS:
        for layer in range(LAYERS):
            writer.add(step, layer, *batch(step, layer))
    return writer.finish()


def test_every_batch_comes_back_in_order(tmp_path: Path) -> None:
    written().save(tmp_path / "t.safetensors")
    trace = RoutingTrace.load(tmp_path / "t.safetensors")
    assert (trace.num_steps, trace.num_layers, trace.num_ranks, trace.num_experts, trace.num_topk) == (
        3, LAYERS, RANKS, EXPERTS, TOPK,
    )  # fmt: skip
    assert trace.notes == {"producer": "a test"}
    assert len(trace) == 6
    seen = list(trace)
    assert [(b.step, b.layer) for b in seen] == [(s, y) for s in STEPS for y in range(LAYERS)]
    for b in seen:
        idx, weights = batch(b.step, b.layer)
        assert all(torch.equal(x, y) for x, y in zip(b.topk_idx, idx, strict=True))
        assert all(torch.equal(x, y) for x, y in zip(b.topk_weights, weights, strict=True))
        assert all(x.dtype == torch.int64 for x in b.topk_idx)


def test_indices_take_two_bytes_where_they_fit() -> None:
    assert written().topk_idx.dtype == torch.int16
    assert written(experts=1 << 15).topk_idx.dtype == torch.int16
    assert written(experts=(1 << 15) + 1).topk_idx.dtype == torch.int32


def test_recorded_tensors_may_change_afterwards() -> None:
    writer = TraceWriter(num_layers=1, num_ranks=1, num_experts=4, num_topk=1)
    idx, weights = torch.tensor([[3]], dtype=torch.int16), torch.tensor([[0.5]])
    writer.add(0, 0, [idx], [weights])
    idx.zero_()
    weights.zero_()
    only = next(iter(writer.finish()))
    assert only.topk_idx[0].item() == 3
    assert only.topk_weights[0].item() == 0.5


def test_resharding_keeps_tokens_and_their_order() -> None:
    whole = written().batch(0, 1)
    for ranks in (1, 2, 5, 40):
        parts = whole.reshard(ranks)
        assert len(parts.topk_idx) == len(parts.topk_weights) == ranks
        assert torch.equal(torch.cat(parts.topk_idx), torch.cat(whole.topk_idx))
        assert torch.equal(torch.cat(parts.topk_weights), torch.cat(whole.topk_weights))
        sizes = [len(p) for p in parts.topk_idx]
        assert max(sizes) - min(sizes) <= 1


def test_an_empty_trace_is_a_trace(tmp_path: Path) -> None:
    trace = TraceWriter(num_layers=2, num_ranks=2, num_experts=8, num_topk=3).finish()
    trace.save(tmp_path / "t.safetensors")
    assert list(RoutingTrace.load(tmp_path / "t.safetensors")) == []


def test_the_file_is_what_its_page_says(tmp_path: Path) -> None:
    """docs/trace.md, read with safetensors alone, as another program would."""
    written().save(tmp_path / "t.safetensors")
    with safe_open(tmp_path / "t.safetensors", "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert metadata == {
        "format": "deepep.routing-trace", "version": "1", "num_steps": "3", "num_layers": "2",
        "num_ranks": "3", "num_experts": "12", "num_topk": "4", "producer": "a test",
    }  # fmt: skip
    assert tensors["step"].tolist() == [0, 5, 6]
    splits, (s, y, r) = tensors["row_splits"], (1, 1, 2)
    i = (s * 2 + y) * 3 + r
    rows = tensors["topk_idx"][splits[i] : splits[i + 1]]
    assert rows.tolist() == batch(5, 1)[0][2].tolist()
    page = (Path(__file__).parents[2] / "docs" / "trace.md").read_text()
    assert all(f"`{name}`" in page for name in [*tensors, "format", "version", "num_steps", "num_topk"])


def none_of(metadata: dict[str, str], tensors: dict[str, torch.Tensor], **sizes: str) -> None:
    """A trace whose sizes multiply to nothing, so that its splits are those of no batch."""
    metadata.update(sizes)
    for name in ("topk_idx", "topk_weights"):
        tensors[name] = tensors[name][:0].clone()
    tensors["row_splits"] = torch.zeros(1, dtype=torch.int64)


def adding(*calls: tuple[int, int]) -> Callable[[], object]:
    def run() -> object:
        writer = TraceWriter(num_layers=LAYERS, num_ranks=RANKS, num_experts=EXPERTS, num_topk=TOPK)
        for step, layer in calls:
            writer.add(step, layer, *batch(step, layer))
        return writer.finish()

    return run


@pytest.mark.parametrize(
    "calls",
    [
        [(0, 1)],
        [(0, 0), (0, 0)],
        [(0, 0), (1, 1)],
        [(0, 0)],
        [(1, 0), (1, 1), (1, 0)],
        [(1, 0), (1, 1), (0, 0)],
    ],
)
def test_batches_out_of_order_are_refused(calls: list[tuple[int, int]]) -> None:
    with pytest.raises(TraceError):
        adding(*calls)()


@pytest.mark.parametrize(
    ("idx", "weights"),
    [
        ([[[EXPERTS]]], [[[1.0]]]),  # no such expert
        ([[[65536 + 1]]], [[[1.0]]]),  # would pass for expert 1 in 16 bits
        ([[[-2]]], [[[1.0]]]),
        ([[[0, 1]]], [[[1.0, 1.0]]]),  # K
        ([[[0]]], [[[1.0], [1.0]]]),  # T
        ([[[0]], [[0]]], [[[1.0]], [[1.0]]]),  # R
    ],
)
def test_a_malformed_batch_is_refused(idx: list, weights: list) -> None:
    writer = TraceWriter(num_layers=1, num_ranks=1, num_experts=EXPERTS, num_topk=1)
    with pytest.raises(TraceError):
        writer.add(0, 0, [torch.tensor(i) for i in idx], [torch.tensor(w) for w in weights])


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda m, t: m.update(format="other"), "not a routing trace"),
        (lambda m, t: m.update(version="2"), "version 2"),
        (lambda m, t: m.pop("num_ranks"), "lacks num_ranks"),
        (lambda m, t: m.update(num_layers="-1"), "lacks num_layers"),
        (lambda m, t: t.pop("step"), "lacks step"),
        (lambda m, t: m.update(num_steps="4"), "num_steps"),
        (lambda m, t: m.update(num_topk="5"), "num_topk"),
        (lambda m, t: m.update(num_ranks="2"), "row_splits"),
        (lambda m, t: m.update(num_experts="3"), "outside -1 to 2"),
        (lambda m, t: t.update(topk_weights=t["topk_weights"][1:].clone()), "topk_weights"),
        (lambda m, t: t.update(topk_weights=t["topk_weights"].double()), "topk_weights is torch.float64"),
        (lambda m, t: t["row_splits"][-1].add_(1), "row_splits does not run"),
        (lambda m, t: t["row_splits"][1].add_(100), "descends"),
        (lambda m, t: t["step"][0].add_(9), "ascend"),
        (lambda m, t: t.update(topk_idx=torch.zeros((), dtype=torch.int16)), "topk_idx is .*2 dimensions"),
        (lambda m, t: t.update(topk_idx=t["topk_idx"][:, :, None].clone()), "topk_idx is .*2 dimensions"),
        (lambda m, t: t.update(topk_idx=t["topk_idx"].float()), "topk_idx is torch.float32"),
        (lambda m, t: t.update(step=torch.zeros((), dtype=torch.int64)), "step is .*1 dimensions"),
        (lambda m, t: t.update(step=t["step"].view(1, 3)), "step is .*1 dimensions"),
        (lambda m, t: t.update(step=t["step"].bool()), "step is BOOL"),
        (lambda m, t: t.update(row_splits=torch.zeros((), dtype=torch.int64)), "row_splits is .*1 dim"),
        (lambda m, t: t["row_splits"][1:4].copy_(torch.tensor([2**63 - 1, -2, 5])), "descends"),
        (lambda m, t: t["step"].copy_(torch.tensor([2**62, -(2**63), 2**62])), "ascend"),
        (lambda m, t: m.update(num_ranks="9" * 5000), "lacks num_ranks"),
        (lambda m, t: m.update(num_ranks=str(2**63)), "num_ranks is 9223372036854775808"),
        (lambda m, t: m.update(num_experts=str(2**31)), "num_experts is 2147483648"),
        (lambda m, t: m.update(num_experts="0"), "num_experts is 0"),
        (lambda m, t: m.update(num_layers=str(2**31 - 1), num_ranks=str(2**31 - 1)), "row_splits"),
        (lambda m, t: none_of(m, t, num_ranks="0"), "num_ranks is 0"),
        (lambda m, t: none_of(m, t, num_layers="0"), "num_layers is 0"),
        (
            lambda m, t: t.update({n: t[n][:, :0].clone() for n in ("topk_idx", "topk_weights")})
            or m.update(num_topk="0"),
            "num_topk is 0",
        ),
    ],
)  # fmt: skip
def test_a_file_that_contradicts_itself_is_refused(tmp_path: Path, change, complaint: str) -> None:
    path = tmp_path / "t.safetensors"
    written().save(path)
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(metadata, tensors)
    save_file(tensors, path, metadata)
    with pytest.raises(TraceError, match=complaint):
        RoutingTrace.load(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "t").write_text("not a trace")
    with pytest.raises(TraceError, match="safetensors"):
        RoutingTrace.load(tmp_path / "t")
    save_file({"x": torch.zeros(1)}, tmp_path / "u")
    with pytest.raises(TraceError, match="not a routing trace"):
        RoutingTrace.load(tmp_path / "u")
    with pytest.raises(OSError):
        RoutingTrace.load(tmp_path / "missing")


@pytest.mark.parametrize("command", ["load", "save"])
def test_what_is_no_regular_file_is_refused(tmp_path: Path, command: str) -> None:
    """A FIFO that nobody writes to would never return; it and a directory stay what they are."""
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "fifo")
    for name in ("fifo", "folder", "link", "/dev/zero"):
        with pytest.raises(TraceError, match="not a regular file"):
            RoutingTrace.load(tmp_path / name) if command == "load" else written().save(tmp_path / name)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fifo", "folder", "link"]


@pytest.mark.parametrize("path", [3, None, b"t", "a\0b", [Path("t")]])
def test_a_path_is_a_path(path: Any) -> None:
    """An integer would be taken for a file descriptor."""
    for call in (RoutingTrace.load, written().save):
        with pytest.raises(ArgumentError) as caught:
            call(path)
        assert caught.value.argument == "path"


def test_an_unwritable_path_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        written().save(tmp_path / "missing" / "t")


def test_a_contradictory_head_is_refused_before_anything_is_read(tmp_path: Path, monkeypatch: Any) -> None:
    """No tensor is made of a file whose sizes say something else."""
    import safetensors

    path = tmp_path / "t.safetensors"
    written().save(path)
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, path, metadata | {"num_topk": "5"})
    read = []

    class Recorder:
        def __init__(self, *args: Any, **options: Any) -> None:
            self.file = safe_open(*args, **options)

        def __enter__(self) -> Recorder:
            self.file.__enter__()
            return self

        def __exit__(self, *raised: Any) -> None:
            self.file.__exit__(*raised)

        def __getattr__(self, name: str) -> Any:
            if name == "get_tensor":
                read.append(name)
            return getattr(self.file, name)

    monkeypatch.setattr(safetensors, "safe_open", Recorder)
    with pytest.raises(TraceError, match="num_topk"):
        RoutingTrace.load(path)
    assert read == []
    save_file(tensors, path, metadata)
    RoutingTrace.load(path)
    assert len(read) == 4


@pytest.mark.parametrize(
    ("dtype", "experts", "entries"),
    [
        (torch.uint8, 8, [0, 1]),
        (torch.uint8, 256, [0, 255]),
        (torch.int8, 256, [100, -1]),
        (torch.uint16, 512, [0, 300]),
        (torch.int16, 40000, [0, -1]),
        (torch.uint32, 70000, [1, 69999]),
        (torch.uint64, 8, [7, 0]),
        (torch.int32, 1, [0, -1]),
    ],
)
def test_indices_of_every_integer_dtype_are_recorded(
    dtype: torch.dtype, experts: int, entries: list[int]
) -> None:
    writer = TraceWriter(num_layers=1, num_ranks=1, num_experts=experts, num_topk=2)
    writer.add(0, 0, [torch.tensor([entries], dtype=dtype)], [torch.ones(1, 2)])
    assert writer.finish().topk_idx.tolist() == [entries]


def one(idx: Any = None, weights: Any = None, step: Any = 1, layer: Any = 0) -> tuple[Any, ...]:
    return (
        step,
        layer,
        [torch.tensor([[0]])] if idx is None else idx,
        [torch.tensor([[1.0]])] if weights is None else weights,
    )


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (one(idx=[torch.tensor([[0.5]])]), "topk_idx is torch.float32"),
        (one(idx=[torch.tensor([[True]])]), "topk_idx is torch.bool"),
        (one(idx=[torch.tensor([[2**64 - 1]], dtype=torch.uint64)]), "names an expert"),
        (one(idx=[torch.tensor([[255]], dtype=torch.uint8)]), "names an expert"),
        (one(idx=[torch.tensor(0)], weights=[torch.tensor(1.0)]), "topk_idx is \\[\\]"),
        (one(idx=[torch.tensor([0])], weights=[torch.tensor([1.0])]), "topk_idx is \\[1\\]"),
        (one(idx=[torch.tensor([[[0]]])], weights=[torch.tensor([[[1.0]]])]), "topk_idx is"),
        (one(idx=[[[0]]]), "topk_idx holds"),
        (one(weights=[np.ones((1, 1))]), "topk_weights holds ndarray"),
        (one(weights=[torch.ones(1, 1, dtype=torch.int64)]), "topk_weights is torch.int64"),
        (one(weights=[torch.ones(1, 1, device="meta")]), "topk_weights holds no values"),
        (one(idx=torch.tensor([[[0]]])), "topk_idx is Tensor"),
        (one(weights=3), "topk_weights is int"),
        (one(step=1.0), "step is float"),
        (one(step=2**63), "step is int"),
        (one(step=np.arange(3)), "step is ndarray"),
        (one(layer="0"), "layer is str"),
        (one(layer=10**5000), "layer is int"),
    ],
)
def test_a_refused_batch_leaves_the_recording_as_it_was(call: tuple[Any, ...], complaint: str) -> None:
    writer = TraceWriter(num_layers=1, num_ranks=1, num_experts=4, num_topk=1)
    writer.add(*one(step=0))
    with pytest.raises(TraceError, match=complaint):
        writer.add(*call)
    assert writer.finish().step.tolist() == [0]
    writer.add(*one(step=1))
    assert writer.finish().step.tolist() == [0, 1]


def test_a_batch_that_is_refused_at_its_last_rank_is_not_kept_in_part() -> None:
    writer = TraceWriter(num_layers=1, num_ranks=2, num_experts=4, num_topk=1)
    good, bad = torch.tensor([[0]]), torch.tensor([[4]])
    with pytest.raises(TraceError):
        writer.add(0, 0, [good, bad], [torch.ones(1, 1)] * 2)
    writer.add(0, 0, [good, good], [torch.ones(1, 1)] * 2)
    assert len(writer.finish()) == 1


def test_weights_that_are_a_negated_view_are_kept_with_their_sign(tmp_path: Path) -> None:
    negated = torch.complex(torch.zeros(1, 1), torch.ones(1, 1)).conj().imag
    assert negated.is_neg()
    writer = TraceWriter(num_layers=1, num_ranks=1, num_experts=4, num_topk=1)
    writer.add(0, 0, [torch.tensor([[0]])], [negated])
    trace = writer.finish()
    assert trace.topk_weights.tolist() == [[-1.0]]
    RoutingTrace(1, 1, 4, trace.step, trace.topk_idx, negated, trace.row_splits).save(tmp_path / "t")
    assert RoutingTrace.load(tmp_path / "t").topk_weights.tolist() == [[-1.0]]


@pytest.mark.parametrize("ambient", ["meta device", "default dtype", "inference", "no grad"])
def test_torchs_ambient_modes_change_nothing(tmp_path: Path, ambient: str) -> None:
    written().save(tmp_path / "a")
    before = torch.get_default_dtype()
    try:
        if ambient == "default dtype":
            torch.set_default_dtype(torch.float64)
        modes = {
            "meta device": torch.device("meta"),
            "inference": torch.inference_mode(),
            "no grad": torch.no_grad(),
        }
        batches = {(s, y): batch(s, y) for s in STEPS for y in range(LAYERS)}
        batches = {k: (i, [w.float() for w in ws]) for k, (i, ws) in batches.items()}
        with modes.get(ambient, torch.enable_grad()):
            writer = TraceWriter(num_layers=LAYERS, num_ranks=RANKS, num_experts=EXPERTS, num_topk=TOPK)
            for (step, layer), (idx, weights) in batches.items():
                writer.add(step, layer, idx, weights)
            writer.finish().save(tmp_path / "b")
            loaded = RoutingTrace.load(tmp_path / "b")
    finally:
        torch.set_default_dtype(before)
    assert loaded.topk_weights.dtype == torch.float32
    assert torch.equal(loaded.topk_idx, written().topk_idx)
    assert torch.equal(loaded.row_splits, written().row_splits)


@pytest.mark.parametrize("name", ["num_layers", "num_ranks", "num_experts", "num_topk"])
def test_a_writers_sizes_are_checked(name: str) -> None:
    sizes: dict[str, Any] = {"num_layers": 1, "num_ranks": 1, "num_experts": 4, "num_topk": 1}
    for value, error in (
        (0, RangeError),
        (-1, RangeError),
        (2**31, RangeError),
        (10**5000, RangeError),
        (True, ArgumentTypeError),
        (1.0, ArgumentTypeError),
        ("1", ArgumentTypeError),
        (None, ArgumentTypeError),
        (np.array([1, 2]), ArgumentTypeError),
        (torch.tensor([1, 2]), ArgumentTypeError),
    ):
        with pytest.raises(error) as caught:
            TraceWriter(**(sizes | {name: value}))
        assert caught.value.argument == name
    TraceWriter(**(sizes | {name: np.int64(2)}))


@pytest.mark.parametrize(
    "notes", [{"a": 1}, {1: "a"}, {"format": "x"}, {"num_steps": "9"}, "text", [("a", "b")]]
)
def test_notes_are_text_under_names_of_their_own(notes: Any) -> None:
    with pytest.raises(TraceError, match="notes"):
        TraceWriter(num_layers=1, num_ranks=1, num_experts=4, num_topk=1, notes=notes)


def test_batches_and_parts_that_are_not_there() -> None:
    trace = written()
    for step, layer in ((-1, 0), (3, 0), (0, 2), (0, -1)):
        with pytest.raises(TraceError) as caught:
            trace.batch(step, layer)
        assert isinstance(caught.value, IndexError)
    for index in (0.0, None, np.arange(2)):
        with pytest.raises(ArgumentTypeError):
            trace.batch(index, 0)
    for parts in (0, -1, 1 << 40, 1.5, torch.tensor([1, 2])):
        with pytest.raises(ArgumentError) as refused:
            trace.batch(0, 0).reshard(parts)
        assert refused.value.argument == "num_ranks"
