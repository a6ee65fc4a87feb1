"""Figures of docs/performance.md: its tables and pictures, made of the tables in docs/figures.

    make figures                      where there are two GPUs, throughput and layer are measured anew before
    python release/figures.py --draw  draws and writes what stands there, and measures nothing

A table is a CSV file whose first lines say when, where and by which command it was measured. In the page a
table follows a comment with its name, and is written anew; a picture is docs/images/<name>.png.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FIGURES, IMAGES, PAGE = ROOT / "docs" / "figures", ROOT / "docs" / "images", ROOT / "docs" / "performance.md"
OURS = "deepep"
INK, FAINT = "#1f2933", "#cbd2d9"
COLORS = ("#c2410c", "#2563eb", "#0d9488", "#7c3aed", "#a16207")
Row = dict[str, str]
MARK = re.compile(r"(<!-- table: (\w+)((?: \w+=\d+)*) -->\n)((?:\|.*\n)*)")


@dataclass(frozen=True)
class Figures:
    """Rows of one file, and what its first lines say of them: date, host, command, shape, times."""

    about: dict[str, str]
    rows: list[Row]

    def of(self, **wanted: str) -> list[Row]:
        """The rows with these values."""
        return [row for row in self.rows if all(row[name] == value for name, value in wanted.items())]


def read(name: str) -> Figures:
    """The figures of docs/figures/<name>.csv."""
    lines = (FIGURES / f"{name}.csv").read_text().splitlines()
    about = dict(line[2:].split(": ", 1) for line in lines if line.startswith("# "))
    return Figures(about, list(csv.DictReader(line for line in lines if not line.startswith("# "))))


def write(name: str, figures: Figures) -> None:
    """Writes them there."""
    with (FIGURES / f"{name}.csv").open("w", newline="") as file:
        file.writelines(f"# {key}: {value}\n" for key, value in figures.about.items())
        table = csv.DictWriter(file, list(figures.rows[0]), lineterminator="\n")
        table.writeheader()
        table.writerows(figures.rows)


# Tables


def markdown(heading: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table of the page."""
    rule = "|" + "---|" * len(heading)
    return "".join(f"{line}\n" for line in [_line(heading), rule, *map(_line, lines)])


def _line(cells: Sequence[str]) -> str:
    return f"|{'|'.join(f' {cell} ' if cell else ' ' for cell in cells)}|"


def _operations(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(row["operation"] for row in rows))


def _cell(rows: Sequence[Row], form: Callable[[Row], str]) -> str:
    return form(rows[0]) if rows else ""


def _timed(row: Row) -> str:
    return " ".join(filter(None, (row["median"], row["p99"] and f"({row['p99']})", row.get("times_floor"))))


def throughput_table(tokens: str) -> str:
    """By operation: the floor, this library by SM count, NCCL."""
    rows = read("throughput").of(tokens=tokens)
    kinds = list(dict.fromkeys((row["by"], row["sms"]) for row in rows))
    kinds.sort(key=lambda kind: (not kind[1], -int(kind[1] or 0)))
    heads = [f"{sms} SMs{by.removeprefix(OURS)}" if sms else by for by, sms in kinds]
    lines = []
    for operation in _operations(rows):
        mine = [row for row in rows if row["operation"] == operation]
        cells = [_cell([r for r in mine if (r["by"], r["sms"]) == kind], _timed) for kind in kinds]
        lines.append([operation, mine[0]["floor"], *cells])
    return markdown(["", "floor", *heads], lines)


def against_table(ranks: str) -> str:
    """By T and operation: the floor, this library, DeepEP."""
    rows = read("against_deepep").of(ranks=ranks)
    kinds = list(dict.fromkeys(row["by"] for row in rows))
    lines = []
    for tokens, operation in dict.fromkeys((row["tokens"], row["operation"]) for row in rows):
        mine = {r["by"]: r["median"] for r in rows if (r["tokens"], r["operation"]) == (tokens, operation)}
        lines.append([f"T = {tokens} {operation}", *(mine.get(kind, "") for kind in kinds)])
    return markdown(["", *kinds], lines)


def low_latency_table(ranks: str) -> str:
    """By operation: T = 128 and T = 1, with their bare exchanges, and NCCL."""
    rows = read("low_latency").of(ranks=ranks)
    lines = []
    for operation in _operations(rows):
        many, one = (
            next(r for r in rows if r["operation"] == operation and r["tokens"] == t) for t in ("128", "1")
        )
        cells = [_with(row, name, before) for row in (many, one) for name, before in _LOW_LATENCY]
        both = [" / ".join(filter(None, (many[name], one[name]))) for name in ("exchange", "nccl")]
        lines.append([operation, *cells, *both])
    heads = [f"EP{ranks}", "T = 128", "x bare exchange", "T = 1", "x bare exchange"]
    return markdown([*heads, "bare exchange, T = 128 / 1", "NCCL alone, T = 128 / 1"], lines)


_LOW_LATENCY = (("median", "before"), ("times_exchange", "times_before"))


def _with(row: Row, name: str, before: str) -> str:
    return f"{row[name]} ({row[before]})" if row[before] else row[name]


def layer_table(ranks: str) -> str:
    """By operation and T: whose layer, in milliseconds, and times its products."""
    rows = read("layer").of(ranks=ranks)
    kinds = list(dict.fromkeys(row["by"] for row in rows))
    lines = []
    for operation, tokens in dict.fromkeys((row["operation"], row["tokens"]) for row in rows):
        mine = {r["by"]: r for r in rows if (r["operation"], r["tokens"]) == (operation, tokens)}
        over = float(mine["deepep.nn"]["median"]) / float(mine["products alone"]["median"])
        cells = [_timed(mine[kind]) if kind in mine else "" for kind in kinds]
        lines.append([f"{operation}, T = {tokens}", *cells, f"{over:.2f} x"])
    return markdown([f"EP{ranks}", *kinds, "over products"], lines)


TABLES: dict[str, Callable[..., str]] = {
    "throughput": throughput_table,
    "against_deepep": against_table,
    "low_latency": low_latency_table,
    "layer": layer_table,
}


def with_tables(page: str) -> str:
    """The page, each marked table written anew."""

    def written(found: re.Match[str]) -> str:
        given = dict(word.split("=") for word in found[3].split())
        return found[1] + TABLES[found[2]](**given)

    return MARK.sub(written, page)


# Pictures


def bars(axes: Any, groups: Sequence[str], lines: Mapping[str, Sequence[float | None]], unit: str) -> None:
    """A group of bars for each operation; lines named "floor" are marks across their group."""
    solid = [name for name in lines if name != "floor"]
    width = 0.8 / max(1, len(solid))
    for number, name in enumerate(solid):
        at = [place + (number - (len(solid) - 1) / 2) * width for place in range(len(groups))]
        heights = [value or 0.0 for value in lines[name]]
        axes.bar(at, heights, width * 0.92, color=COLORS[number % len(COLORS)], label=name)
        for place, height in zip(at, heights, strict=True):
            if height:
                axes.text(place, height, f"{height:.3g}", ha="center", va="bottom", fontsize=6.5, color=INK)
    for place, value in enumerate(lines.get("floor", ())):
        if value is not None:
            axes.hlines(value, place - 0.45, place + 0.45, color=INK, ls=":", lw=1.2)
    if "floor" in lines:
        axes.plot([], [], color=INK, ls=":", lw=1.2, label="floor: a plain copy of the bytes")
    axes.set_xticks(range(len(groups)), [group.replace(", ", ",\n") for group in groups], fontsize=7)
    axes.set_ylabel(unit, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_ylim(top=1.35 * max(value or 0.0 for values in lines.values() for value in values))
    axes.legend(frameon=False, fontsize=7)


def draw(name: str, figures: Figures, panels: Sequence[tuple[str, Sequence[Row], str]], kinds: Kinds) -> None:
    """Panels (title, rows, unit) side by side; kinds: whose bars, by their names in the picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    sheet = Figure(figsize=(1.0 + 5.0 * len(panels), 3.9), layout="constrained")
    for axes, (title, rows, unit) in zip(
        sheet.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
    ):
        groups = _operations(rows)
        lines = {kind: [_height(rows, group, find) for group in groups] for kind, find in kinds.items()}
        bars(axes, groups, {kind: found for kind, found in lines.items() if any(found)}, unit)
        axes.set_title(title, loc="left", fontsize=9)
    sheet.suptitle(f"{figures.about['host']}; {figures.about['date']}", fontsize=8, color=INK)
    sheet.savefig(IMAGES / f"{name}.png", dpi=110, metadata={"Software": None})


Kinds = Mapping[str, Callable[[Row], str]]


def _height(rows: Iterable[Row], operation: str, find: Callable[[Row], str]) -> float | None:
    found = [find(row) for row in rows if row["operation"] == operation]
    return next((float(value) for value in found if value), None)


def _by(by: str, sms: str | None = None) -> Callable[[Row], str]:
    return lambda row: row["median"] if row["by"] == by and sms in (None, row.get("sms")) else ""


def draw_all() -> None:
    """All pictures of the page."""
    given = read("throughput")
    moving = [row for row in given.rows if row["floor"]]
    panels = [(f"2 ranks, T = {t}", [r for r in moving if r["tokens"] == t], "us") for t in ("4096", "128")]
    kinds: dict[str, Callable[[Row], str]] = {
        "deepep, 24 SMs": _by(OURS, "24"),
        "NCCL alone": _by("NCCL alone"),
        "NCCL with permute / reduce": _by("NCCL with permute / reduce"),
        "floor": lambda row: row["floor"],
    }
    draw("throughput", given, panels, kinds)
    given = read("against_deepep")
    named = {"deepep, 24 SMs": OURS, "floor": "floor"}
    named |= {by: by for by in ("DeepEP V2, 24 SMs", "DeepEP V2, 64 SMs")}
    for tokens in ("4096", "128"):
        rows = [row for row in given.of(tokens=tokens) if row["by"] != "DeepEP V1"]
        panels = [
            (f"{r} ranks, T = {tokens}", [x for x in rows if x["ranks"] == r], "us") for r in ("2", "4")
        ]
        draw(f"against_deepep_{tokens}", given, panels, {name: _by(by) for name, by in named.items()})
    decode, v1 = read("low_latency"), given
    panels = []
    for ranks in ("2", "4"):
        rows = [row for row in decode.of(ranks=ranks, tokens="128") if "pair" not in row["operation"]]
        for row in v1.of(ranks=ranks, by="DeepEP V1"):
            operation = row["operation"].removeprefix("low-latency ")
            rows.append({**dict.fromkeys(rows[0], ""), "operation": operation, "v1": row["median"]})
        panels.append((f"{ranks} ranks, T = 128, low latency", rows, "us"))
    draw(
        "low_latency",
        decode,
        panels,
        {
            "deepep": lambda row: row["median"],
            "DeepEP V1, E = 288, a day before": lambda row: row.get("v1", ""),
            "bare exchange": lambda row: row["exchange"],
            "NCCL alone": lambda row: row["nccl"],
        },
    )
    given = read("layer")
    panels = []
    for tokens in ("4096", "512"):
        rows = [{**r, "operation": f"EP{r['ranks']}, {r['operation']}"} for r in given.of(tokens=tokens)]
        panels.append((f"T = {tokens}", rows, "ms"))
    draw("layer", given, panels, {by: _by(by) for by in ("deepep.nn", "plain torch", "products alone")})


# Measurements

COMMANDS = {
    "throughput": (
        "bench --ranks 2 --sms 8,12,16,24 --tokens 4096",
        "bench --ranks 2 --sms 8,16,24 --tokens 8192",
        "bench --ranks 2 --sms 16,24,32 --tokens 128",
    ),
    "layer": ("bench --mode layer --ranks 2 --warmup 4 --iterations 50",),
}
OPERATIONS = {"dispatch": "fresh layout", "cached dispatch": "cached", "combine": ""}
KINDS = {"nccl alone": "NCCL alone"}
KINDS |= dict.fromkeys(("nccl with permute", "nccl with reduce"), "NCCL with permute / reduce")


def rows_of(name: str, reports: Iterable[Mapping[str, Any]]) -> list[Row]:
    """A run's figures, `bench --json`, as rows of docs/figures/<name>.csv."""
    rows = []
    for report in reports:
        for figure in report["figures"]:
            median, p99 = figure["median"], figure["p99"]
            if name == "layer":
                by = {OURS: "deepep.nn", f"{OURS}, FP8 rows": "with rows in FP8"}.get(
                    figure["by"], figure["by"]
                )
                row = {"ranks": str(report["environment"]["ranks"]), "tokens": str(figure["tokens"])}
                row |= {"operation": figure["operation"], "by": by}
                rows.append({**row, "median": f"{median / 1e3:.2f}", "p99": f"{p99 / 1e3:.2f}"})
            elif figure["operation"] in OPERATIONS:
                kind = "combine" if figure["operation"] == "combine" else "dispatch"
                words = (f"{kind} {figure['dtype'].upper()}", OPERATIONS[figure["operation"]])
                ratio = figure["floor_ratio"]
                rows.append(
                    {
                        "tokens": str(figure["tokens"]),
                        "operation": ", ".join(filter(None, words)),
                        "by": KINDS.get(figure["by"], figure["by"]),
                        "sms": str(figure["sms"] or ""),
                        "median": f"{median:.4g}",
                        "p99": f"{p99:.4g}",
                        "floor": f"{figure['floor']:.4g}" if figure["floor"] else "",
                        "times_floor": f"{ratio:.2f}" if ratio and figure["sms"] else "",
                    }
                )
    return rows


def measure(name: str) -> None:
    """Runs the commands of a file and writes what they found in its place; rows of other ranks stay."""
    standing, reports = read(name), []
    for command in COMMANDS[name]:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "figures.json"
            words = [sys.executable, "-m", "deepep", *shlex.split(command), "--json", str(out)]
            subprocess.run(words, check=True)
            reports.append(json.loads(out.read_text()))
    rows, about = rows_of(name, reports), {**standing.about}
    about["date"], about["host"] = str(datetime.date.today()), f"2x {reports[0]['environment']['device']}"
    about["command"] = "; ".join(f"python -m deepep {command}" for command in COMMANDS[name])
    kept = [row for row in standing.rows if row.get("ranks", "2") != "2"]
    write(name, Figures(about, rows + kept))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--draw", action="store_true", help="measure nothing")
    if not parser.parse_args().draw:
        import torch

        if torch.cuda.is_available() and torch.cuda.device_count() >= 2:
            for name in COMMANDS:
                measure(name)
    draw_all()
    PAGE.write_text(with_tables(PAGE.read_text()))


if __name__ == "__main__":
    main()
