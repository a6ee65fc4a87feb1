"""DistributedDataParallel: torch's, with gradients that travel by this library's collectives."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as TorchDistributedDataParallel

from deepep.collectives import Communicator
from deepep.collectives.communicator import DTYPES
from deepep.collectives.plan_table import PlanTable
from deepep.errors import ArgumentError, ArgumentTypeError, ModeError, RangeError
from deepep.parallel.attempts import StepAttempt, StepCollectives, Steps
from deepep.parallel.balance import SpeedMeter
from deepep.parallel.config import ParallelConfig, get_config, with_changes
from deepep.parallel.devices import device_of_this_rank, has_ranks
from deepep.parallel.exchanges import check_experts, layers_of
from deepep.parallel.experts import (
    ExpertReducer,
    check_replicas,
    expert_parameters,
    forget_reductions,
    group_of_replicas,
    make_equal,
    scale_gradients,
    statement_of_experts,
)
from deepep.parallel.hook import BucketReducer, reduce_bucket
from deepep.parallel.joining import LoneGroup, buckets_of, come_in, statement_of
from deepep.parallel.planning import table_of
from deepep.parallel.sampler import ElasticSampler
from deepep.parallel.state import check_objects, optimizers_in
from deepep.runtime.checks import MOST, check_int

GRADIENTS = ("mean", "sum")


class DistributedDataParallel(TorchDistributedDataParallel):
    """Data parallelism: torch.nn.parallel.DistributedDataParallel, whose arguments, state_dict, no_sync,
    join, static graph and the rest are its own, and whose buckets are reduced as `config` says.

        model = deepep.DistributedDataParallel(model)                       # under torchrun
        model = deepep.DistributedDataParallel(model, device_ids=[0, 1, 2, 3])   # this rank's of the node's

    config: a ParallelConfig; None: the options that hold here (deepep.set_config, deepep.configured).
    gradient: "mean" over the ranks, as torch's; "sum" for losses that are divided already.
    device_ids: as torch's; several are the node's, of which this rank takes that of its local rank. In a
        process without a group they are torch.nn.DataParallel's, which is then what one gets, with a warning.

    expert_group: the ranks that hold the same experts as this one, where a model's ranks are several groups
        between which no tokens go: a process group, or one dimension of a device mesh.

    sampler: the ElasticSampler that the model's batches are of. Gradients are then means over the samples of
        a step, however many of them each rank has: the loss is a mean over its own. The sampler follows the
        members, and if its weights are "measured" their speeds. Not for models with experts, whose losses
        are to be multiplied by R * sampler.gradient_weight() instead.

    Parameters of experts (modules with `expert_parameters()`, as deepep.nn.ExpertParallelMoE) are not every
    rank's: they are neither broadcast to all nor reduced over all, but over `expert_group`. Their gradients
    are sums over the losses of the ranks that exchange tokens, and are divided where the others are averaged:
    loss.backward(), undivided, is the mean's gradient for every parameter.

    A rank that is missing in a backward has that backward raise PeerTimeoutError on the others, at its end;
    gradients are not to be used then. Raises ArgumentError (and its kinds) for what does not fit, and
    MismatchError if ranks are given different options, on all ranks.
    """

    def __new__(cls, module: nn.Module, device_ids: Any = None, *args: Any, **arguments: Any) -> Any:
        if device_ids is not None and len(device_ids) > 1 and not has_ranks():
            warnings.warn(
                "one process without a process group: torch.nn.DataParallel over device_ids, without "
                "compression, topology or recovery; better: torchrun --nproc-per-node "
                f"{len(device_ids)} ..., with init_process_group",
                stacklevel=2,
            )
            return nn.DataParallel(module, device_ids)
        return super().__new__(cls)

    def __init__(
        self,
        module: nn.Module,
        device_ids: Any = None,
        output_device: Any = None,
        dim: int = 0,
        *torch_arguments: Any,
        config: ParallelConfig | None = None,
        gradient: str = "mean",
        expert_group: Any = None,
        sampler: ElasticSampler | None = None,
        **torch_options: Any,
    ) -> None:
        if config is not None and not isinstance(config, ParallelConfig):
            raise ArgumentTypeError("config", type(config).__name__, "a deepep.ParallelConfig")
        if gradient not in GRADIENTS:
            raise RangeError("gradient", repr(gradient), ", ".join(GRADIENTS))
        if torch_options.get("mixed_precision") is not None:
            raise ArgumentError(
                "mixed_precision", "a policy", "None: it takes torch's own hook; use autocast"
            )
        options, replicas = config or get_config(), group_of_replicas(expert_group)
        if device_ids is not None and len(device_ids) > 1:
            device_ids = [device_of_this_rank(module, list(device_ids))]
        experts = dict(expert_parameters(module))
        owned = {id(parameter) for parameter in experts.values()}
        every_name = module.named_parameters(remove_duplicate=False)
        own_names = [name for name, parameter in every_name if id(parameter) in owned]
        # Of the outermost module's own parameters torch compares the names with a dot before them.
        ignored = {*own_names, *(f".{name}" for name in own_names)}
        ignored.update(getattr(module, "_ddp_params_and_buffers_to_ignore", ()))
        self._set_params_and_buffers_to_ignore_for_model(module, ignored)
        for name, parameter in module.named_parameters():
            if parameter.requires_grad and name not in ignored and parameter.dtype not in DTYPES:
                allowed = "parameters of float32, bfloat16, float16 or float64"
                raise ArgumentTypeError(name, str(parameter.dtype).removeprefix("torch."), allowed)
        self._bucket_reducer: BucketReducer | None = None
        self._expert_reducer: ExpertReducer | None = None
        self.expert_group = replicas
        self._gradient, self._experts = gradient, list(experts.values())
        super().__init__(module, device_ids, output_device, dim, *torch_arguments, **torch_options)
        # A second backward reduces what the first has reduced together with what it adds: right for a mean
        # alone. So a sum is the mean of R times the addends.
        num_ranks = self.process_group.size()
        num_replicas = 1 if replicas is None else replicas.size()
        joins = isinstance(self.process_group, LoneGroup)  # the members know among whom
        if experts and not joins:
            check_replicas(module, num_ranks, num_replicas)
        replicated = [p for n, p in module.named_parameters() if n not in ignored]
        forget_reductions(module.parameters())
        if gradient == "mean":
            scale_gradients(experts.values(), 1, num_ranks // num_replicas)
        else:
            scale_gradients(experts.values(), num_replicas, 1)
        scale_gradients(replicated, num_ranks if gradient == "sum" else 1, 1)
        if sampler is not None:
            self._check_sampler(sampler, options)
        if not options.is_torchs and not joins:
            self._bucket_reducer = attach(self, options, gradient, sampler)
        if replicas is not None and experts:
            self._reduce_experts(module, replicas, options)

    def _check_sampler(self, sampler: ElasticSampler, options: ParallelConfig) -> None:
        if not isinstance(sampler, ElasticSampler):
            raise ArgumentTypeError("sampler", type(sampler).__name__, "a deepep.ElasticSampler")
        place = (self.process_group.rank(), self.process_group.size())
        if not isinstance(self.process_group, LoneGroup) and (sampler.rank, sampler.num_ranks) != place:
            got = f"rank {sampler.rank} of {sampler.num_ranks}"
            raise RangeError("sampler", got, f"rank {place[0]} of {place[1]}, as in the process group")
        if options.is_torchs:
            raise ModeError("sampler", "torch's own all-reduce", "any other topology, or compression")
        if self._experts or self._gradient != "mean":
            allowed = (
                "gradient='mean', and no experts: else losses multiplied by R * sampler.gradient_weight()"
            )
            raise ModeError("sampler", "experts" if self._experts else "gradient='sum'", allowed)
        if sampler.is_measured and self.device_type != "cpu":
            raise ModeError(
                "sampler", "weights='measured' on CUDA", "numbers: speeds are measured on the CPU"
            )

    def _run_ddp_forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """torch's: the module's own forward, once what comes before has waited for other ranks."""
        reducer = self._bucket_reducer
        if reducer is not None and reducer.meter is not None and torch.is_grad_enabled():
            reducer.meter.begin(accumulates=not self.require_backward_grad_sync)
        return super()._run_ddp_forward(*inputs, **kwargs)

    def _reduce_experts(
        self, module: nn.Module, replicas: dist.ProcessGroup, options: ParallelConfig
    ) -> None:
        statement = {"config": repr(options), "experts": statement_of_experts(module)}
        reducer = reducer_over(replicas, self, options, statement)
        experts = [parameter for _, parameter in expert_parameters(module)]
        make_equal(experts, replicas)
        self._expert_reducer = ExpertReducer(experts, reducer, lambda: self._has_synced)
        self._has_synced = True
        self.register_forward_pre_hook(DistributedDataParallel._before_forward)

    def _before_forward(self, inputs: Any) -> None:
        """As torch's: a backward is reduced if its forward was not inside no_sync."""
        if torch.is_grad_enabled():
            self._has_synced = self.require_backward_grad_sync

    def join_hook(self, **kwargs: Any) -> Any:
        """torch's, for uneven inputs.

        Raises RangeError for divide_by_initial_world_size=False: torch's own all-reduce alone follows it; and
        ModeError with a sampler, whose batches do not end.
        """
        if self._bucket_reducer is not None and self._bucket_reducer.sampler is not None:
            raise ModeError("join", "a model with a sampler", "one without: an ElasticSampler does not end")
        if self._bucket_reducer is not None and not kwargs.get("divide_by_initial_world_size", True):
            raise RangeError("divide_by_initial_world_size", "False", "True: ranks that have joined count")
        return super().join_hook(**kwargs)

    def register_comm_hook(self, state: object, hook: Any) -> None:
        """torch's, where torch reduces: with topology="native", reproducible=False and no compression.

        Raises ModeError otherwise: buckets have a hook, and torch takes one.
        """
        if getattr(self, "_bucket_reducer", None) is not None:
            allowed = "no hook; or topology='native', reproducible=False, compression=False"
            raise ModeError("hook", getattr(hook, "__qualname__", repr(hook)), allowed)
        super().register_comm_hook(state, hook)

    def reconfigure(self, **changes: Any) -> None:
        """Changes options (ParallelConfig) from the next backward on; to be called on all ranks alike.

        Raises RangeError or ArgumentTypeError; the next backward raises MismatchError if ranks differ.
        """
        reducer = self._reducer_of_ours()
        reducer.next_config = with_changes(reducer.next_config or reducer.given, changes)
        if self._expert_reducer is not None:
            self._expert_reducer.reducer.next_config = reducer.next_config

    def attempts(
        self,
        *,
        keep: str | None = None,
        min_members: int | None = None,
        state: Mapping[str, Any] | None = None,
        name: str = "model",
        expert_backup: int | None = None,
    ) -> Iterator[StepAttempt]:
        """Attempts at one training step, which goes on without ranks that die in it; usually there is one.

            for attempt in model.attempts():
                with attempt:
                    optimizer.zero_grad(); loss_of(model(x)).backward(); optimizer.step()

        A backward returns once every rank has its sums; so if a rank is missing, its survivors all have this
        step's gradients with it, or all sum without it what each has kept of its own, or, if a forward or a
        backward failed, run the body again, with gradients, module buffers and torch's random numbers as they
        were. Weights are those of the ranks that were there, bit for bit. In an attempt one backward reduces
        gradients, and all ranks call this alike. With experts on the CPU alone.

        keep: "buckets": a copy of this rank's gradients, for summing again; "recompute": no copy, the body
        runs again, on all ranks: for forwards that communicate. None: the first, but the second for a model
        with deepep.nn.ExpertParallelMoE, which takes no other. Its Buffers then lose the same ranks, and its
        gates choose among the experts that are left.
        min_members: fewer ranks do not go on; None: more than half of those who were there before.
        state: has processes join (`join_run`), before the first attempt, in the place of ranks that died:
        objects by name, with `state_dict` and `load_state_dict`, that a rank which joins needs as they are
        here: the optimizer, a scheduler, a sampler, a torch.Generator that all ranks have alike. None: nobody
        joins. name: of this model, if the run trains several.
        expert_backup: every so many steps each rank copies the experts of the next, and what optimizers in
        `state` keep of them, to its own memory: after a death the others take them over, as they were then,
        in the spare places of their layers (deepep.placement.with_spare). None: a dead rank's experts are
        not chosen any more, but for those with replicas.

        Raises EvictedError on a rank without which the others have gone on; PeerTimeoutError if too few are
        left, the store is lost, or it is not settled who is missing; ModeError, RangeError for what does not
        fit.
        """
        if self._gradient != "mean":
            raise ModeError("gradient", repr(self._gradient), "'mean': of the ranks that are there")
        if self._expert_reducer is not None:
            raise ModeError("expert_group", "replicas of experts", "experts of one rank each, or none")
        if state is not None:
            check_objects(state)
            if self.device_type != "cpu":
                raise ModeError(
                    "state", "a model on CUDA", "None: processes join, and copy experts, on the CPU"
                )
        if state is not None and self._experts and expert_backup is None:
            raise ModeError("state", "a model with experts", "None, without expert_backup")
        steps = self._steps_of(self._reducer_of_ours())
        steps.configure(keep, min_members, expert_backup, state)
        steps.admissions.configure(state, name)
        steps.admit()
        steps.secure_experts()
        attempt = StepAttempt(steps)
        while not attempt.is_done:
            yield attempt

    def _steps_of(self, reducer: BucketReducer) -> Steps:
        if reducer.comm.device.type != "cpu" and self._experts:
            raise ModeError("attempts", f"experts on {reducer.comm.device}", "a model on the CPU, or none")
        if reducer.steps is None:
            reducer.steps = Steps(self, reducer, self._renew, self._experts)
            self._take_group(StepCollectives(reducer.comm))
        return reducer.steps

    @classmethod
    def join_run(
        cls,
        module: nn.Module,
        rank: int,
        state: Mapping[str, Any],
        *,
        store: Any,
        name: str = "model",
        timeout: float | None = None,
        config: ParallelConfig | None = None,
        sampler: ElasticSampler | None = None,
        **arguments: Any,
    ) -> DistributedDataParallel:
        """A new process's model, as `rank` of a training that goes on: one that has died, or was left out.

            optimizer = torch.optim.AdamW(module.parameters())
            model = deepep.DistributedDataParallel.join_run(module, 3, {"optimizer": optimizer}, store=store)

        Returns before the same step as the members: they send the module's weights and buffers, the sampler's
        step, and all that `state` has, as they pass it to `attempts`, which are theirs then, bit for bit, or
        this raises. Layers of experts are built on a Buffer of `deepep.parallel.newcomer_group`: this rank
        has its experts again, from who took them over (`expert_backup`), but for those that nobody has any
        more, which are as in `module`. What has to be the same (options, parameters, modules, kinds of
        objects in `state`) is compared before they stop for it.

        store: a connection to the store that the run's group met through; or the group itself, on a rank that
        was left out. name: as of `attempts`. timeout: seconds to wait for the members to come to a step;
        None: the config's. config, sampler and the other arguments: the constructor's.

        Raises MismatchError if the members have something else, PeerTimeoutError if nobody invites this rank;
        ModeError, RangeError, ArgumentTypeError for what does not fit.
        """
        options = config or get_config()
        check_int("rank", rank, 0, MOST)
        check_objects(state)
        if arguments.get("expert_group") is not None:
            raise ModeError("expert_group", "replicas of experts", "experts of one rank each, or none")
        model = cls(module, process_group=LoneGroup(), config=options, sampler=sampler, **arguments)
        if sampler is not None and sampler.rank != rank:
            raise RangeError("sampler", f"rank {sampler.rank}'s", f"rank {rank}'s")
        if options.is_torchs or model.device_type != "cpu" or model._gradient != "mean":
            allowed = "steps that outlive ranks, as of `attempts`, on the CPU"
            raise ModeError("join_run", "a model that has none", allowed)
        if model._experts:
            check_experts(layers_of(module), model._experts, optimizers_in(state))
        statement = statement_of(model, options, sampler, state)
        seconds = options.seconds if timeout is None else timeout
        comm, invitation = come_in(rank, statement, store, name, seconds, options.seconds)
        try:
            reducer = model._bucket_reducer = BucketReducer(comm, options)
            _reduce_by(model, reducer, sampler)
            steps = model._steps_of(reducer)
            if model._experts:
                steps.configure_backup(1, state)  # as often as the members', once they have said so
            steps.admissions.configure(state, name)
            steps.admissions.hand_over(invitation.members, invitation.ranks)
        except BaseException:
            comm.abandon()
            raise
        return model

    @property
    def members(self) -> tuple[int, ...]:
        """The ranks of the process group that take part: all, but for those that attempts left out."""
        return self._reducer_of_ours().comm.members

    def _renew(self, is_stale: bool) -> None:
        """As `Steps` has it."""
        comm = self._reducer_of_ours().comm
        self._update_process_group(StepCollectives(comm))
        if is_stale:  # some ranks may have cut buckets anew, some not: all do in the next forward
            self.reducer._push_all_rebuilt_params()
        scale_gradients(self._experts, 1, comm.num_ranks)

    def _take_group(self, group: StepCollectives) -> None:
        self.process_group = group
        self.reducer._update_process_group(group)

    def report(self) -> dict[str, Any]:
        """Numbers of the backwards so far: `steps`, `bytes_sent` by this rank, and the last one's `plans` by
        bucket and `members`, the ranks that it sums over. Of measured plans `plan_version`. Of compression
        "auto" by bucket `noise`: what a format adds to the gradients' own variance, in proportion, as of the
        backward before the last. `restored`: of experts that were (`attempts`), by number of layer and
        expert, how many steps had counted in what they were restored to, the last time.
        """
        reducer = self._reducer_of_ours()
        plans = {index: asdict(plan) for index, plan in reducer.plans.items()}
        noise = {index: dict(found.ratios) for index, found in reducer.noise.items()}
        version = None if reducer.table is None else reducer.table.version
        return {
            "steps": reducer.step,
            "bytes_sent": reducer.comm.bytes_sent,
            "plans": plans,
            "members": reducer.members,
            "plan_version": version,
            "noise": noise,
            "restored": {} if reducer.steps is None else reducer.steps.restored(),
        }

    @property
    def plan(self) -> PlanTable | None:
        """The plans in use, for `model.plan.save(path)` and later `topology=path`; None: a fixed rule."""
        return self._reducer_of_ours().table

    def close(self) -> None:
        """Ends communication; collective, idempotent. At the latest, the process's end does it."""
        if self._bucket_reducer is not None:
            self._bucket_reducer.comm.close()
        if self._expert_reducer is not None:
            self._expert_reducer.reducer.comm.close()

    def _reducer_of_ours(self) -> BucketReducer:
        if self._bucket_reducer is None:
            raise ModeError("config", "torch's own all-reduce", "any other topology, or compression")
        return self._bucket_reducer


def attach(
    model: TorchDistributedDataParallel,
    config: ParallelConfig,
    gradient: str = "mean",
    sampler: ElasticSampler | None = None,
) -> BucketReducer:
    """Has a torch DDP's buckets reduced by `config`. Collective over its group."""
    reducer = reducer_over(
        *(model.process_group, model, config),
        {
            "config": repr(config),
            "gradient": gradient,
            "sampler": "" if sampler is None else sampler.statement(),
            "buckets": buckets_of(model),
        },
    )
    _reduce_by(model, reducer, sampler)
    return reducer


def _reduce_by(
    model: TorchDistributedDataParallel, reducer: BucketReducer, sampler: ElasticSampler | None
) -> None:
    reducer.sampler = sampler
    if sampler is not None and sampler.is_measured:
        reducer.meter = SpeedMeter()
    TorchDistributedDataParallel.register_comm_hook(model, reducer, reduce_bucket)


def reducer_over(
    group: dist.ProcessGroup,
    model: TorchDistributedDataParallel,
    config: ParallelConfig,
    statement: dict[str, str],
) -> BucketReducer:
    """A reducer of the model's gradients over a group, whose ranks pass the same statement. Collective."""
    comm = Communicator(
        group,
        device="cpu" if model.device_type == "cpu" else model.device,
        timeout=config.seconds,
        statement=statement,
    )
    return BucketReducer(comm, config, table_of(comm, config))
