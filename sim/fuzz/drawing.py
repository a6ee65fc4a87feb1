"""A finding drawn: which token went where, what was expected, what came. As text, and as a picture."""

from __future__ import annotations

import io
import os
from collections import defaultdict
from typing import Any

from deepep.sim.cases.case import Case
from deepep.sim.fuzz.fuzzer import Finding
from deepep.sim.rules.checking import arriving, arriving_at_expert, sent
from deepep.sim.rules.observed import Array, RankView

#: (source rank, source token); None where a row's contents belong to no token.
Origin = tuple[int, int]
#: Tables of more rows than this are cut.
LONGEST = 40


def expected_origins(case: Case, rank: int) -> list[Origin]:
    """The tokens that `rank` is to receive, in order; low latency: of its experts, one after the other."""
    if case.options.mode == "ht":
        return arriving(case, rank)
    first = rank * case.num_local_experts
    return [pair for i in range(case.num_local_experts) for pair in arriving_at_expert(case, first + i)]


def received_origins(case: Case, rank: int, views: list[RankView]) -> list[Origin | None] | None:
    """The tokens whose contents the rows received have; None if that cannot be seen (casts, or no rows)."""
    rows = views[rank].recv_x if case.options.mode == "ht" else views[rank].recv_rows
    if rows is None or (case.options.mode == "ll" and case.options.low_latency != "bf16"):
        return None
    known: dict[bytes, list[Origin]] = defaultdict(list)
    for source in case.dispatch_members:
        content = sent(case, source)
        for token, row in enumerate(content.x if case.options.mode == "ht" else content.tokens):
            known[row.tobytes()].append((source, token))
    expected = expected_origins(case, rank)
    return [_closest(known.get(row.tobytes(), []), expected, i) for i, row in enumerate(_rows(rows))]


def _rows(rows: Array) -> list[Array]:
    return list(rows)


def _closest(candidates: list[Origin], expected: list[Origin], place: int) -> Origin | None:
    """Of several tokens with the same contents the one that should be here, if it is among them."""
    if place < len(expected) and expected[place] in candidates:
        return expected[place]
    return candidates[0] if candidates else None


def as_text(finding: Finding, width: int = 100) -> str:
    """The finding for a terminal: the case, its routing, and expected and received rows where they differ."""
    from rich.console import Console

    console = Console(width=width, record=True, file=io.StringIO())
    print_finding(console, finding)
    return console.export_text()


def print_finding(console: Any, finding: Finding) -> None:
    """Prints the finding to a rich console."""
    from rich.text import Text

    console.print(
        Text.assemble((finding.subject, "bold red"), ": ", (finding.rule, "bold"), " does not hold")
    )
    console.print(_short(finding.message), markup=False)
    console.print(repr(finding.case), markup=False)
    if len(finding.cases) > 1:
        console.print(f"(only after the {len(finding.cases) - 1} examples before it)")
    console.print(_routing_table(finding.case))
    if finding.views is not None:
        for rank in finding.case.dispatch_members:
            table = _rows_table(finding.case, rank, finding.views)
            if table is not None:
                console.print(table)


def _short(message: str, lines: int = 24) -> str:
    parts = message.splitlines()
    return "\n".join([*parts[:lines], "..."] if len(parts) > lines else parts)


def _routing_table(case: Case) -> Any:
    from rich.table import Table

    table = Table(title="which token goes where", title_justify="left")
    for column in ("rank", "token", "experts (top-k)", "to ranks"):
        table.add_column(column)
    local, shown = case.num_local_experts, 0
    for rank, indices in enumerate(case.topk_idx):
        masked = " (masked)" if rank in case.masked else ""
        for token, choices in enumerate(indices.tolist()):
            if shown < LONGEST:
                ranks = sorted({e // local for e in choices if e >= 0})
                targets = ", ".join(f"{r} (masked)" if r in case.masked else str(r) for r in ranks)
                table.add_row(f"{rank}{masked}", str(token), " ".join(map(str, choices)), targets or "none")
            shown += 1
    if shown > LONGEST:
        table.add_row("...", f"{shown - LONGEST} more", "", "")
    return table


def _rows_table(case: Case, rank: int, views: list[RankView]) -> Any | None:
    """Expected and received rows of a rank, if they differ."""
    from rich.table import Table

    expected, got = expected_origins(case, rank), received_origins(case, rank, views)
    if got is None or got == expected:
        return None
    table = Table(title=f"rows of rank {rank}", title_justify="left")
    for column in ("row", "expected", "got"):
        table.add_column(column)
    for row in range(min(LONGEST, max(len(expected), len(got)))):
        want = _origin(expected[row]) if row < len(expected) else "no row"
        have = _origin(got[row]) if row < len(got) else "no row"
        table.add_row(str(row), want, have, style="red" if want != have else None)
    return table


def _origin(origin: Origin | None) -> str:
    return "contents of no token" if origin is None else f"token {origin[1]} of rank {origin[0]}"


def save_picture(finding: Finding, path: str | os.PathLike[str]) -> None:
    """Writes a picture (format by the name's ending): tokens on the left, rows of the receivers on the right.

    Grey: as expected. Red: what came and should not have. Dashed: what should have come and did not.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    case, views = finding.case, finding.views
    tokens = [(rank, token) for rank in range(case.num_ranks) for token in range(case.num_tokens[rank])]
    rows = {rank: expected_origins(case, rank) for rank in case.dispatch_members}
    came = {rank: received_origins(case, rank, views) if views else None for rank in case.dispatch_members}
    slots = [(rank, row) for rank in rows for row in range(max(len(rows[rank]), len(came[rank] or [])))]
    height = max(len(tokens), len(slots), 1)
    figure = Figure(figsize=(8, min(40.0, 1.6 + 0.28 * height)))
    axes = figure.add_subplot()
    left = {origin: height * (i + 0.5) / max(len(tokens), 1) for i, origin in enumerate(tokens)}
    right = {slot: height * (i + 0.5) / max(len(slots), 1) for i, slot in enumerate(slots)}
    for origin, y in left.items():
        axes.text(-0.02, y, f"rank {origin[0]} token {origin[1]}", ha="right", va="center", fontsize=8)
    for slot, y in right.items():
        axes.text(1.02, y, f"rank {slot[0]} row {slot[1]}", ha="left", va="center", fontsize=8)
    for rank, expected in rows.items():
        got = came[rank]
        for row in range(max(len(expected), len(got or []))):
            want = expected[row] if row < len(expected) else None
            have = want if got is None else got[row] if row < len(got) else None
            y = right[rank, row]
            if want is not None:
                fine = have == want
                color, style = ("0.6", "-") if fine else ("black", "--")
                axes.plot([0, 1], [left[want], y], color=color, linestyle=style, linewidth=1)
            if have is not None and have != want:
                axes.plot([0, 1], [left[have], y], color="tab:red", linewidth=1.5)
    axes.set_xlim(-0.4, 1.4)
    axes.set_ylim(height, 0)
    axes.axis("off")
    axes.set_title(f"{finding.subject}: {finding.rule}\ndashed: expected, red: got instead", fontsize=9)
    figure.savefig(path, dpi=120, bbox_inches="tight")
