"""Deliberate defects of the reference, each of which the properties have to catch.

Every one is a mistake that code of this kind has had or invites. It is applied to a copy of the reference,
which is imported under a name of its own, in this process (GLOBAL_VIEW) or in the ranks of a world
(EXCHANGE), and fuzzed with a fixed seed until something fails. The core's defects are in tests/layout.
"""

from __future__ import annotations

import importlib
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import deepep.reference
from deepep.sim import World
from deepep.sim.cases.case import Limits
from deepep.sim.fuzz import subjects
from deepep.sim.fuzz.all_to_all_runs import Implementation, run_all_to_all
from deepep.sim.fuzz.fuzzer import Fuzzer, FuzzReport
from deepep.sim.rules.oracle import GlobalView

EXAMPLES = 320
#: Files that some operations alone use, and the options that choose those.
FIXED = {
    "all_to_all": {"mode": "ht"},
    "high_throughput": {"mode": "ht"},
    "two_level": {"mode": "ht", "reduce": "domain"},
    "all_to_all_low_latency": {"mode": "ll"},
    "low_latency": {"mode": "ll"},
    "formats": {"mode": "ll"},
    "logfmt_wire": {"mode": "ll"},
}


@dataclass(frozen=True)
class Defect:
    """A text of reference/<file>.py, which must stand there exactly once, and what replaces it."""

    name: str
    file: str
    old: str
    new: str
    fixed: dict[str, object] = field(default_factory=dict)  # options of the cases that show it


# fmt: off
EXCHANGE = [
    Defect("rows counted from the neighbour's table", "all_to_all",
           "recv_counts = [row[rank] for row in counts]", "recv_counts = [row[rank - 1] for row in counts]"),
    Defect("tokens sent by token, not by destination", "all_to_all",
           "token = (is_token_in_rank & gets_any).t().nonzero(as_tuple=True)[1]",
           "token = (is_token_in_rank & gets_any).nonzero(as_tuple=True)[0]"),
    Defect("the last token lost when T is odd", "all_to_all",
           "records[plan.send_token]",
           "records[plan.send_token.clamp(max=plan.num_tokens // 2 * 2 - 1)]"),
    Defect("a scale row misplaced", "all_to_all",
           'out.scales[:total] = got["scales"]', 'out.scales[:total] = got["scales"].roll(1, 0)'),
    Defect("weights of foreign experts not masked", "all_to_all",
           'torch.where(mine, got["topk_weights"], 0.0)', 'got["topk_weights"]'),
    Defect("indices stay global", "all_to_all",
           "torch.where(mine, expert % num_local, -1)", "torch.where(mine, expert, -1)"),
    Defect("-1 counted as an expert", "all_to_all",
           "(expert >= 0) & (expert // num_local == wire.rank)",
           '(expert.div(num_local, rounding_mode="trunc") == wire.rank)'),
    Defect("rows past the last keep their indices", "all_to_all", "out.topk_idx[total:] = -1", "pass"),
    Defect("the worst case is not handed out", "all_to_all", "rows = num_worst_tokens or", "rows ="),
    Defect("expert counts of the first rank for all", "all_to_all",
           "first = num_ranks + wire.rank * num_local", "first = num_ranks"),
    Defect("source tokens not brought", "all_to_all",
           'plan.src_token.copy_(got["token"].squeeze(1))', "pass"),
    Defect("summed in bfloat16", "all_to_all",
           "x.shape[-1], accumulator_dtype(x.dtype)", "x.shape[-1], x.dtype"),
    Defect("the second bias replaces the first", "all_to_all",
           "else total_x + bias.to(wide)", "else bias.to(wide)"),
    Defect("biases overwritten by rows", "all_to_all", "len(biases) > 0, device", "False, device"),
    Defect("the first row added to zero", "all_to_all",
           "torch.where(started[token], total_x[token] + term, term)", "total_x[token] + term"),
    Defect("the last rank's weights win", "all_to_all",
           'weights[token] += got["topk_weights"][rows]', 'weights[token] = got["topk_weights"][rows]'),
    Defect("masked ranks waited for in combine", "all_to_all",
           "return [count if rank in wire.members else 0 for rank, count in enumerate(counts)]",
           "return list(counts)"),
    Defect("a token crosses once for each rank", "two_level",
           "in_domain.any(1).nonzero().flatten()", "in_domain.nonzero()[:, 0]"),
    Defect("rows in the order of their gateways", "two_level",
           "received[relay.row] = rows", "received = rows"),
    Defect("a domain's sum in bfloat16", "two_level", "accumulator_dtype(rows.dtype)", "rows.dtype"),
    Defect("a domain's first row added to zero", "two_level",
           "torch.where(self._started[tokens], self._x[tokens] + term, term)", "self._x[tokens] + term"),
    Defect("a domain's last weights win", "two_level",
           'self._weights[tokens] += fields', 'self._weights[tokens] = fields'),
    Defect("masked ranks are neighbours", "two_level",
           "[r for r in ranks[first : first + ranks_per_domain] if r in wire.members]",
           "list(ranks[first : first + ranks_per_domain])"),
    Defect("every rank of a domain asks one gateway", "two_level",
           "(rank - start) % size", "rank"),
    Defect("rows returned in the order they came", "two_level",
           "pack_records(fields)[relay.row]", "pack_records(fields)[relay.row.sort().values]"),
    Defect("members taken for ranks", "wire",
           "[send_counts[m] for m in self.members],", "list(send_counts[: len(self.members)]),"),
    Defect("gathered in order of membership", "wire",
           "{m: raw.view(t.dtype).view(t.shape) for m, raw in zip(self.members, everyone, strict=True)}",
           "{m: raw.view(t.dtype).view(t.shape) for m, raw in enumerate(everyone)}"),
    Defect("widths in elements, not bytes", "records",
           "width = model.shape[1] * model.element_size()", "width = model.shape[1] * 2"),
    Defect("a slot too far", "all_to_all_low_latency",
           "row = (chosen.cumsum(1) - 1)[expert, source_row]",
           "row = chosen.cumsum(1)[expert, source_row].clamp(max=out.recv_x.shape[1] - 1)"),
    Defect("a range begins where it ends", "all_to_all_low_latency",
           "((count.cumsum(1) - count) << 32) | count", "(count.cumsum(1) << 32) | count"),
    Defect("only the first choice spread to its expert", "all_to_all_low_latency",
           '(got["topk_idx"] == experts[:, None, None]).any(-1)',
           '(got["topk_idx"] == experts[:, None, None])[..., 0]'),
    Defect("source tokens past the count left as they were", "all_to_all_low_latency",
           "out.recv_src_info.fill_(-1)", "out.recv_src_info.fill_(0)"),
    Defect("low-latency scales of the next row", "all_to_all_low_latency",
           'got["scales"][source_row]', 'got["scales"].roll(-1, 0)[source_row]'),
    Defect("scales by row, not by column", "all_to_all_low_latency",
           "scales = empty_column_major(shape, torch.int32 if ue8m0 else torch.float32, device)",
           "scales = torch.empty(shape, dtype=torch.int32 if ue8m0 else torch.float32, device=device)"),
    Defect("summed from the last choice on", "all_to_all_low_latency",
           "for k in range(columns.shape[1]):", "for k in reversed(range(columns.shape[1])):"),
    Defect("weighed by the neighbour's weight", "all_to_all_low_latency",
           "term = term * weights[token, k].unsqueeze(1)",
           "term = term * weights[token, k - 1].unsqueeze(1)"),
    Defect("masked ranks' rows expected back", "all_to_all_low_latency",
           "if rank not in wire.members:", "if False:"),
    Defect("LogFMT groups decided by the sender's own metadata", "logfmt_wire",
           "recv_qualifies = logfmt_qualifies(recv_meta)",
           "recv_qualifies = logfmt_qualifies(meta)[: len(recv_meta)]"),
    Defect("raw groups in front of encoded ones", "logfmt_wire",
           "payload += [e[part].view(-1, UNIT), r[~part].view(-1, UNIT)]",
           "payload += [r[~part].view(-1, UNIT), e[part].view(-1, UNIT)]"),
]

GLOBAL_VIEW = [
    Defect("a token counted once per choice", "layout",
           "num_tokens_per_rank=in_rank.sum(0, dtype=torch.int32)",
           "num_tokens_per_rank=torch.bincount(expert // num_local, minlength=num_ranks).int()"),
    Defect("-1 counted as the last expert", "layout",
           "token, k = (topk_idx >= 0)", "token, k = (topk_idx >= -1)"),
    Defect("experts taken for ranks in node counts", "layout",
           "chosen(expert // num_local // ranks_per_node, num_nodes)",
           "chosen(expert // ranks_per_node % num_nodes, num_nodes)"),
    Defect("alignment rounded down", "layout",
           "return -(-value // alignment) * alignment", "return value // alignment * alignment"),
    Defect("rows of masked senders received", "layout",
           "if source in masked or rank in masked:", "if rank in masked:"),
    Defect("experts begin where the last one ends", "layout",
           "start = align_up(start + count, alignment)", "start = start + count"),
    Defect("a small last node taken for a whole one", "layout",
           "node_size = min(ranks_per_node, num_ranks - node * ranks_per_node)",
           "node_size = ranks_per_node"),
    Defect("a token crosses once per rank of the node", "layout",
           "held[gateway(source, node)].append((source, token))",
           "held[gateway(source, node)] += [(source, token)] * (1 + source % 2)"),
    Defect("rows looked up by rank of arrival", "high_throughput",
           "row = first_row[src_rank.long()] + src_token",
           "row = first_row[src_rank.long().flip(0)] + src_token"),
    Defect("weights of foreign experts kept", "high_throughput",
           'received["topk_weights"].masked_fill(~mine, 0.0)', 'received["topk_weights"]'),
    Defect("the first expert of the next rank is mine", "high_throughput",
           "(topk_idx < (rank + 1) * num_local)", "(topk_idx <= (rank + 1) * num_local)"),
    Defect("padding named as expert 0", "high_throughput", 'received["topk_idx"][num_rows:] = -1', "pass"),
    Defect("the last rank's weights replace the sum", "high_throughput",
           "weights[tokens] += topk_weights[rank][rows]", "weights[tokens] = topk_weights[rank][rows]"),
    Defect("counts of masked senders added", "high_throughput",
           "for source, count in enumerate(counts):\n        if not {source, rank} & set(masked):",
           "for source, count in enumerate(counts):\n        if rank not in masked:"),
    Defect("domains' sums not rounded", "high_throughput",
           "round_to(domain.value[crossing], xs[owner].dtype)", "domain.value[crossing]"),
    Defect("the own domain's sum not rounded", "high_throughput",
           "round_to(domain.value[crossing], xs[owner].dtype)",
           "domain.value[crossing] if first <= owner < first + per_domain else "
           "round_to(domain.value[crossing], xs[owner].dtype)"),
    Defect("the last domain first", "high_throughput",
           "in range(0, num_ranks, per_domain)", "in reversed(range(0, num_ranks, per_domain))",
           {"reduce": "domain", "ranks_per_node": 1, "values": "normal"}),
    Defect("a single domain's sum rounded before the biases", "high_throughput",
           "several_domains = per_domain < num_ranks", "several_domains = per_domain <= num_ranks"),
    Defect("a sum that starts from +0.0", "ordered_sum",
           "torch.where(self.started[tokens], self.value[tokens] + terms, terms)",
           "self.value[tokens] + terms"),
    Defect("begin and count of a range share bits", "low_latency",
           "row << 32 | tokens.numel()", "row << 3 | tokens.numel()"),
    Defect("a row per choice, not per expert", "low_latency",
           "tokens = wants.nonzero().flatten()",
           "tokens = (topk_idx[source] == rank * num_local + expert).nonzero()[:, 0]"),
    Defect("choices summed from the last on", "ordered_sum",
           "for k in range(weights.shape[1]):", "for k in reversed(range(weights.shape[1])):"),
    Defect("scale rounded down to a power of two", "formats",
           "(bits >> 23) + ((bits & 0x7FFFFF) != 0)", "(bits >> 23)"),
    Defect("no floor under the largest magnitude", "formats", ".clamp(min=AMAX_FLOOR)", ".clamp(min=1e-30)"),
    Defect("a NaN counts as a magnitude of one", "formats", "nan_to_num(nan=0.0,", "nan_to_num(nan=1.0,"),
    Defect("NaNs of either sign kept apart", "formats",
           "values.view(torch.uint8)[scaled.isnan()] = E4M3_NAN", "pass"),
    Defect("exponent bytes in the other order", "formats",
           "dense(exponent.to(torch.uint8))",
           "dense(exponent.to(torch.uint8).flip(-1))"),
    Defect("LogFMT rounds down", "logfmt", "first = 1.5 - reach", "first = 1.0 - reach"),
    Defect("LogFMT groups decided one by one", "logfmt",
           "per_chunk = 8 if num_groups % 8 == 0 else 4", "per_chunk = 1"),
    Defect("LogFMT signs in front of the magnitudes", "logfmt",
           "torch.cat([magnitude_bits.flatten(-2), sign_bits]",
           "torch.cat([sign_bits, magnitude_bits.flatten(-2)]"),
    Defect("NaN keeps whatever bits it has", "numerics",
           "rounded.view(torch.int16)[value.isnan()] = BF16_NAN", "pass"),
]
# fmt: on


def with_defect(defect: Defect | None, folder: Path, name: str) -> None:
    """Puts a copy of the reference, as package `name`, into `folder`."""
    package = folder / name
    shutil.copytree(Path(deepep.reference.__file__).parent, package)  # compiled files too: importing is quick
    if defect is not None:
        (package / f"{defect.file}.py").write_text(defective_text(defect))


def defective_text(defect: Defect) -> str:
    text = (Path(deepep.reference.__file__).parent / f"{defect.file}.py").read_text()
    assert text.count(defect.old) == 1, f"{defect.name}: {defect.file}.py does not hold its text once"
    return text.replace(defect.old, defect.new)


def module_of(folder: str, name: str, module: str):
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return importlib.import_module(f"{name}.{module}")


def exchange_with(folder: str, name: str):
    """One rank's program: the all_to_all implementation of package `name`."""

    def run_rank(ctx, case):
        files = ("wire", "layout", "all_to_all", "all_to_all_low_latency", "two_level")
        return run_all_to_all(ctx, case, Implementation(*(module_of(folder, name, f) for f in files)))

    return run_rank


def global_view_of(folder: str, name: str) -> GlobalView:
    files = ("layout", "high_throughput", "low_latency", "formats", "logfmt")
    return GlobalView(*(module_of(folder, name, file) for file in files))


def caught(defect: Defect | None, kind: str, number: int, folder: Path, world_of) -> FuzzReport:
    """Fuzzes the reference with a defect."""
    name = f"defective_{kind}_{number}"
    with_defect(defect, folder, name)
    subject: subjects.Subject
    if kind == "exchange":
        subject = subjects.InWorld(name, exchange_with(str(folder), name), world_of, timeout=5.0)
    else:
        subject = subjects.reference(global_view_of(str(folder), name))
    fixed = {} if defect is None else {**FIXED.get(defect.file, {}), **defect.fixed}
    limits = Limits(ranks=(3, 4), hidden=(16, 128, 640), masks=0.3, fixed=fixed)
    return Fuzzer([subject], seed=1, limits=limits, relations=()).run(examples=EXAMPLES, shrink=False)


@pytest.fixture
def impatient_world_of() -> Iterator[Callable[[int], World]]:
    """Worlds that give up soon on ranks that wait for a failed one: a defect often ends so."""
    worlds = {n: World(n, grace=0.2) for n in (3, 4)}
    yield worlds.__getitem__
    for world in worlds.values():
        world.close()


@pytest.mark.parametrize("kind", ["exchange", "global_view"])
def test_without_a_defect_nothing_is_found(kind, tmp_path, world_of):
    report = caught(None, kind, 0, tmp_path, world_of)
    assert report.finding is None, report.finding
    assert report.examples == EXAMPLES


def test_every_defect_is_caught(tmp_path, impatient_world_of, capsys):
    defects = [("exchange", d) for d in EXCHANGE] + [("global_view", d) for d in GLOBAL_VIEW]
    assert len(defects) >= 15
    assert len({d.name for _, d in defects}) == len(defects)
    lines, escaped, quick = [], [], 0
    for _, defect in defects:
        defective_text(defect)
    begin = time.monotonic()
    for number, (kind, defect) in enumerate(defects, 1):
        started = time.monotonic()
        report = caught(defect, kind, number, tmp_path, impatient_world_of)
        seconds = time.monotonic() - started
        quick += seconds < 1.0
        by = "NOTHING" if report.finding is None else report.finding.rule
        lines.append(f"{seconds:6.2f} s {report.examples:4} examples  {defect.file}: {defect.name}: {by}")
        if report.finding is None:
            escaped.append(defect.name)
    total = time.monotonic() - begin
    with capsys.disabled():
        print(f"\n{len(defects)} defects of the reference, and what caught each:")
        print("\n".join(lines))
        print(f"{total:.1f} s in all, {quick} within a second")
    assert not escaped
