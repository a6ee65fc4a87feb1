"""ParallelConfig: in which format and by which paths gradients travel; of the process, or of a context."""

from __future__ import annotations

import contextlib
import difflib
import os
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from deepep.api.arguments import timeout_of
from deepep.collectives.codecs import LOSSY
from deepep.collectives.plan import ONE_ROUNDING, SCHEDULES, ReductionPlan, checked_groups, groups_among
from deepep.collectives.plan_table import PlanTable, codecs_of, load_plan
from deepep.errors import ArgumentTypeError, RangeError
from deepep.runtime.checks import check_int

COMPRESSION = ("off", "auto", *LOSSY)
TOPOLOGIES = ("auto", *SCHEDULES)
ROUNDING = ("stochastic", "nearest")


@dataclass(frozen=True)
class ParallelConfig:
    """Options of data parallelism. A DistributedDataParallel keeps those that it is built with.

    compression: "off" or False; "fp8", "fp16" or "bf16" on the wire; "auto" or True: FP8, BF16 or none for
        each bucket, by the gradients' noise.
    max_noise: of "auto": the share of the gradients' own variance that rounding may add.
    topology: a schedule, in any case: "native", "direct", "nvlink", "hierarchical", "ring", "chain", "tree",
        "oneshot";
        "auto" chooses by measurement, or by size and hosts where nothing is measured
        (parallel/planning.py); or a ReductionPlan, a PlanTable, or the path of one.
    probe_seconds: what measuring candidates may take, besides the probe itself; 0 measures nothing.
    probe_budget: share of the time that measuring again may take, where times are not what they were.
    reproducible: uncompressed sums of float32, float16 and bfloat16 run in fixed point, 4 bytes an element:
        the same bits for every topology. False: in the tensor's dtype and the schedule's order.
    min_compressed_bytes: buckets that are smaller are not compressed.
    rounding: "stochastic", right on average, by dice that depend on seed, step and place; or "nearest".
    seed: of the dice.
    groups: lists of ranks near each other, for "hierarchical"; "auto": the ranks of a host.
    timeout: seconds a rank waits for the others; None: DEEPEP_TIMEOUT, else 100.

    Raises RangeError or ArgumentTypeError, with what is allowed; also for a lossy format together with a
    schedule that would round it at every rank.
    """

    compression: bool | str = False
    topology: str | ReductionPlan | PlanTable | Path = "auto"
    reproducible: bool = True
    min_compressed_bytes: int = 64 << 10
    rounding: str = "stochastic"
    seed: int = 0
    groups: str | tuple[tuple[int, ...], ...] = "auto"
    timeout: float | None = None
    max_noise: float = 0.02
    probe_seconds: float = 1.0
    probe_budget: float = 0.01

    def __post_init__(self) -> None:
        given = self.compression
        compression = {True: "auto", False: "off"}[given] if isinstance(given, bool) else given
        self._keep("compression", _one_of("compression", compression, COMPRESSION))
        if not isinstance(self.reproducible, bool):
            raise ArgumentTypeError("reproducible", type(self.reproducible).__name__, "True or False")
        self._keep("topology", self._checked_topology())
        self._keep("rounding", _one_of("rounding", self.rounding, ROUNDING))
        check_int("min_compressed_bytes", self.min_compressed_bytes, 0)
        check_int("seed", self.seed, -(2**63), 2**63 - 1)
        for name, least in (("max_noise", 0.0), ("probe_seconds", 0.0), ("probe_budget", 0.0)):
            self._keep(name, _number(name, getattr(self, name), least))
        if self.groups != "auto":
            self._keep("groups", checked_groups(self.groups))
        if self.timeout is not None:
            timeout_of(self.timeout)

    def _checked_topology(self) -> str | ReductionPlan | PlanTable:
        """A schedule's name in lower case, or a plan, read if need be, that has what the options ask for."""
        given = self.topology
        if isinstance(given, Path) or (isinstance(given, str) and given.endswith(".json")):
            given = load_plan(given)
        if isinstance(given, ReductionPlan):
            if self.compression not in ("off", given.codec):
                allowed = f"off, or the plan's own: {given.codec}"
                raise RangeError("compression", f"{self.compression!r} with a plan", allowed)
            return given
        if isinstance(given, PlanTable):
            for codec in codecs_of(str(self.compression), self.reproducible):
                given.entry_for(codec, 0)
            return given
        name = _one_of("topology", given, TOPOLOGIES)
        if self.compression != "off" and name not in ("auto", *ONE_ROUNDING):
            allowed = f"{', '.join(('auto', *ONE_ROUNDING))} with compression: others round at every rank"
            raise RangeError("topology", repr(name), allowed)
        return name

    def _keep(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    @property
    def seconds(self) -> float:
        """The time-out in seconds."""
        return timeout_of(self.timeout)

    @property
    def is_torchs(self) -> bool:
        """True if torch's own all-reduce, in its own order, is all that is asked for."""
        return self.topology == "native" and self.compression == "off" and not self.reproducible


def with_changes(config: ParallelConfig, changes: dict[str, Any]) -> ParallelConfig:
    """The config with other values. Raises RangeError for names that are none, with the nearest one."""
    names = [field.name for field in fields(ParallelConfig)]
    for name in changes:
        if name not in names:
            nearest = difflib.get_close_matches(name, names, 1)
            hint = f" (did you mean {nearest[0]}?)" if nearest else ""
            raise RangeError("option", f"{name!r}{hint}", ", ".join(names))
    return replace(config, **changes)


def config_among(config: ParallelConfig, places: Sequence[int]) -> ParallelConfig:
    """The options for those ranks that are at `places`, counted anew in this order."""
    changes: dict[str, Any] = {}
    if isinstance(config.topology, ReductionPlan | PlanTable):
        changes["topology"] = config.topology.among(places)
    if not isinstance(config.groups, str):
        changes["groups"] = groups_among(config.groups, places)
    return replace(config, **changes)


def set_config(**changes: Any) -> ParallelConfig:
    """Changes the process's options for what is built from now on; returns those of before.

    Names and values: ParallelConfig. Communicates nothing, so it may come before init_process_group.
    """
    global _default
    before = _default if _default is not None else _of_environment()
    _default = with_changes(before, changes)
    return before


def get_config() -> ParallelConfig:
    """The options that hold here: the context's, else the process's, else the environment's
    (DEEPEP_COMPRESSION, DEEPEP_TOPOLOGY, DEEPEP_PROBE_SECONDS), else the defaults.
    """
    config = _of_context.get()
    if config is None:
        config = _default if _default is not None else _of_environment()
    return config


@contextlib.contextmanager
def configured(**changes: Any) -> Iterator[ParallelConfig]:
    """Options for what is built inside a `with` block, of this thread or task alone."""
    token = _of_context.set(with_changes(get_config(), changes))
    try:
        yield get_config()
    finally:
        _of_context.reset(token)


def _of_environment() -> ParallelConfig:
    names = {"compression": "DEEPEP_COMPRESSION", "topology": "DEEPEP_TOPOLOGY"}
    given: dict[str, Any] = {name: os.environ[key] for name, key in names.items() if os.environ.get(key)}
    if os.environ.get("DEEPEP_PROBE_SECONDS"):
        given["probe_seconds"] = os.environ["DEEPEP_PROBE_SECONDS"]
        with contextlib.suppress(ValueError):
            given["probe_seconds"] = float(given["probe_seconds"])
    return with_changes(ParallelConfig(), given)


def _number(name: str, value: object, least: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ArgumentTypeError(name, type(value).__name__, "a number")
    if not least <= value < float("inf"):
        raise RangeError(name, repr(value), f"at least {least:g}")
    return float(value)


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> str:
    if not isinstance(value, str):
        raise ArgumentTypeError(name, type(value).__name__, ", ".join(allowed))
    if value.lower() not in allowed:
        nearest = difflib.get_close_matches(value.lower(), allowed, 1)
        hint = f" (did you mean {nearest[0]}?)" if nearest else ""
        raise RangeError(name, f"{value!r}{hint}", ", ".join(allowed))
    return value.lower()


_default: ParallelConfig | None = None
_of_context: ContextVar[ParallelConfig | None] = ContextVar("deepep.parallel.config", default=None)
