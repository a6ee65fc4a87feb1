"""The command line. Each command is one module here with a typer function `command`, imported when it is
called.

A command that cannot be imported (a missing extra) says which extra it needs instead of a traceback.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import signal
import sys
from collections.abc import Iterator

from deepep import interrupt
from deepep.extras import MissingExtraError, needed_for

#: name -> (module, one line for the list of commands)
COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("deepep.cli.demo", "Train a small expert-parallel MoE on real text, with pictures."),
    "info": ("deepep.cli.info", "What this machine offers, and which backends can be used."),
    "check": ("deepep.cli.check", "Self-test of the installed library on this machine."),
    "doctor": ("deepep.cli.doctor", "Who is slow: a rank, a link or a process, and what to check."),
    "fuzz": ("deepep.cli.fuzz", "Fuzz routing layouts against the reference."),
    "explore": ("deepep.cli.explore", "Run the kernels on the CPU under many schedules."),
    "dp": ("deepep.cli.dp", "Check data parallelism: bits, bytes, rates, convergence."),
    "links": ("deepep.cli.links", "Run a command on ranks with a cluster's links between them, emulated."),
    "wire": ("deepep.cli.wire", "Run a command on ranks as if on several hosts, without a NIC."),
    "placement": ("deepep.cli.placement", "Replay a routing trace under placements of its experts."),
    "predict": ("deepep.cli.predict", "Predict times of dispatch and combine on a cluster."),
    "timeline": ("deepep.cli.timeline", "Draw what each rank does when, in a training and a decode step."),
    "warps": ("deepep.cli.warps", "Draw what each warp of the kernels does when, in one call of each kind."),
    "bench": ("deepep.cli.bench", "Measure dispatch and combine on this machine's GPUs."),
}


def main(argv: list[str] | None = None) -> None:
    """Runs `deepep <command> ...`; exits with the command's status: 2 for misuse, 130 for Ctrl-C."""
    interrupt.raise_again()
    args = sys.argv[1:] if argv is None else argv
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name of other bytes, or a terminal without lines to draw
            stream.reconfigure(errors="backslashreplace")
    if not args or args[0] in ("-h", "--help"):
        usage = "\n".join(f"  {name:9} {line}" for name, (_, line) in COMMANDS.items())
        print(f"usage: python -m deepep <command> [options]\n\n{usage}\n\n<command> --help: its options")
        raise SystemExit(0 if args else 2)
    if args[0] == "--version":
        from importlib.metadata import version

        print(f"deepep {version('deepep')}")
        raise SystemExit(0)
    if args[0] not in COMMANDS:
        print(f"command: got {args[0]!r}; allowed: {', '.join(COMMANDS)}", file=sys.stderr)
        raise SystemExit(2)
    module, _ = COMMANDS[args[0]]
    try:
        with _leaving_without_extras(args[0]):
            command = importlib.import_module(module).command
            import typer

            from deepep.cli.terminal import spelling_options_of
    except KeyboardInterrupt:
        raise SystemExit(130) from None

    # As for Ctrl-C, ranks are ended and temporary folders removed on the way out.
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(name=args[0])(command)
    try:
        with _leaving_without_extras(args[0]), spelling_options_of(command):
            status = app(args=args[1:], prog_name=f"python -m deepep {args[0]}", standalone_mode=False)
    except typer.Abort:
        status = 130
    except Exception as error:
        # typer's complaints about options: one line instead of its box.
        if not hasattr(error, "format_message"):
            raise
        print(" ".join(error.format_message().split()), file=sys.stderr)
        status = 2
    finally:
        signal.signal(signal.SIGTERM, before)
    raise SystemExit(status if isinstance(status, int) else 0)


@contextlib.contextmanager
def _leaving_without_extras(command: str) -> Iterator[None]:
    """Leaves with one line if a package of an extra is missing."""
    try:
        with needed_for(f"`deepep {command}`"):
            yield
    except MissingExtraError as error:
        raise SystemExit(str(error)) from error
