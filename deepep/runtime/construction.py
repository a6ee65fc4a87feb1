"""Construction: an engine is made on all ranks of a group, or on none, and then all raise the same.

Whatever one rank refuses (an argument, the environment, a backend that it does not have) it takes to the
meeting, so that the others do not wait for it; and so does whatever else it raises before it has an engine.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from deepep.errors import ArgumentError, ArgumentTypeError, DeepEPError, MismatchError
from deepep.runtime import backends as registry
from deepep.runtime.control import agreement
from deepep.runtime.control.issue import ControlPlane
from deepep.runtime.control.membership import Membership
from deepep.runtime.engine import Engine, EngineOptions
from deepep.runtime.session import Session, membership_of
from deepep.runtime.traffic_lanes import TrafficLanes


def construct(options: EngineOptions, backend: str | None, device: torch.device | None) -> Engine:
    """The engine for `options.group`; collective.

    backend, device: those asked for, or None. Raises `options.problem`, or what another rank refuses, on all
    ranks; MismatchError if they ask for different things; PeerTimeoutError if not all of them come.
    """
    if not registry.is_group(options.group)[0]:  # refused here alone: there are no peers
        if not isinstance(options.group, torch.distributed.ProcessGroup):
            got = type(options.group).__name__
            raise ArgumentTypeError("group", got, "a torch.distributed process group")
        registry.choose(backend, options.group, device)
    membership = membership_of(options.group, options.timeout, options.num_ranks)
    asked = registry.default_name() if backend is None else backend
    try:
        name, among, hosts = _agree_on_backend(membership, asked, options.problem)
        problem: ArgumentError | None = None
        try:
            num_ranks = options.num_ranks or options.group.size()
            per_domain = options.ranks_per_domain
            grows = num_ranks > options.group.size()
            chosen, where = registry.choose(
                name, options.group, device, among, per_domain, grows, num_ranks, hosts
            )
            has_lanes = not chosen.no_lanes or (chosen.has_nics and 0 < per_domain < num_ranks)
            if options.lanes.if_any and not has_lanes:
                options = replace(options, lanes=TrafficLanes())
            if options.lanes.asked() and not has_lanes:
                raise options.lanes.refusal(f"backend {chosen.name!r}: {chosen.no_lanes}")
        except ArgumentError as refused:
            problem = refused.at(membership.rank)
        if problem is not None:
            agreement.agree(membership, "engine", {}, problem)
        options = replace(options, device=where)
        session = Session.of(options.group, where, options.num_ranks)
        about = {"backend": chosen.name, "device": where.type}
        control = ControlPlane(session, membership, about, options.masks)
        try:
            engine = chosen.create(options, control)
        except BaseException:
            control.close(0.0)
            raise
        engine.tell_peers = control.withdraw
        return engine
    except DeepEPError:
        raise
    except BaseException as error:
        membership.withdraw(agreement.reason(membership.rank, error))
        raise


def _agree_on_backend(
    membership: Membership, name: str | None, problem: ArgumentError | None
) -> tuple[str | None, frozenset[str], frozenset[str]]:
    """The backend that ranks ask for by name, if any does; those that every machine can run; all hosts."""
    if problem is None and name is not None:
        try:
            registry.check_name(name)
        except ArgumentError as refused:
            problem = refused
    able = [backend.name for backend in registry.backends() if backend.available()[0]]
    met = agreement.agree(membership, "arrived", {}, problem, agreement.arrival(name, able))
    names = {rank: facts["backend"] for rank, facts in met.items() if facts["backend"] is not None}
    first = min(names, default=0)
    for rank, asked in names.items():
        if asked != names[first]:
            raise MismatchError("backend", repr(asked), f"{names[first]!r}, as on rank {first}", rank)
    common = frozenset.intersection(*(frozenset(facts["able"]) for facts in met.values()))
    return names.get(first), common, frozenset(facts["host"] for facts in met.values())
