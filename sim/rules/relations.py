"""Rules about several examples: change the input in a way whose effect is known, and compare."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np

from deepep.sim.cases.case import Case, Window
from deepep.sim.cases.routing import Indices
from deepep.sim.rules.checking import Property, Violation, always, arriving, check_equal, need
from deepep.sim.rules.observed import MEASURED, Array, RankView, first_difference


def _permutation(case: Case) -> list[int]:
    """A renaming of the ranks: old name -> new name."""
    return [int(new) for new in np.random.default_rng(case.seed).permutation(case.num_ranks)]


def _inverse(permutation: list[int]) -> tuple[int, ...]:
    return tuple(int(old) for old in np.argsort(permutation))


def with_renamed_ranks(case: Case) -> list[Case]:
    """The same example, every rank's tokens and experts under a new rank's name."""
    new_name, old_name = _permutation(case), _inverse(_permutation(case))
    local = case.num_local_experts

    def rename(indices: Indices) -> Indices:
        renamed = np.array(new_name)[indices // local] * local + indices % local
        return np.where(indices < 0, -1, renamed)

    return [
        replace(
            case,
            topk_idx=tuple(rename(case.topk_idx[old]) for old in old_name),
            masked=tuple(sorted(new_name[r] for r in case.masked)),
            parent=Window(case, old_name, tuple(slice(0, case.num_tokens[old]) for old in old_name)),
        )
    ]


def renaming_ranks_commutes(case: Case, views: list[RankView], others: list[list[RankView]]) -> None:
    """The renamed world gets what the original gets: rows regrouped by the new order, sums unchanged."""
    new_name, [renamed] = _permutation(case), others
    for rank in case.members:
        mine, theirs = views[rank], renamed[new_name[rank]]
        check_equal("combined x after renaming ranks", rank, need(mine.combined_x), need(theirs.combined_x))
        if case.options.mode == "ht":
            sources = [source for source, _ in arriving(case, rank)]
            order = np.argsort([new_name[source] for source in sources], kind="stable")
            check_equal("rows after renaming ranks", rank, need(mine.recv_x)[order], need(theirs.recv_x))
            if mine.recv_topk_idx is not None:
                indices = mine.recv_topk_idx[: len(order)][order]
                check_equal(
                    "indices after renaming ranks", rank, indices, need(theirs.recv_topk_idx)[: len(order)]
                )
        else:
            check_equal("counts after renaming ranks", rank, need(mine.recv_count), need(theirs.recv_count))


def _expert_permutation(case: Case) -> Indices:
    """A renaming of the experts that keeps each on its rank: old -> new."""
    rng = np.random.default_rng(case.seed + 1)
    local = case.num_local_experts
    return np.concatenate([rng.permutation(local) + rank * local for rank in range(case.num_ranks)])


def with_renamed_experts(case: Case) -> list[Case]:
    """The same example with the experts of each rank renumbered."""
    new_name = _expert_permutation(case)
    return [
        replace(
            case,
            topk_idx=tuple(np.where(i < 0, -1, new_name[i]) for i in case.topk_idx),
            parent=_whole(case),
        )
    ]


def renaming_experts_commutes(case: Case, views: list[RankView], others: list[list[RankView]]) -> None:
    """Rows and sums do not change; indices and counts go by the new names."""
    new_name, [renamed] = _expert_permutation(case), others
    local = case.num_local_experts
    for rank in case.members:
        mine, theirs = views[rank], renamed[rank]
        new_local = new_name[rank * local : (rank + 1) * local] - rank * local
        check_equal("combined x after renaming experts", rank, need(mine.combined_x), need(theirs.combined_x))
        if case.options.mode == "ht":
            check_equal("rows after renaming experts", rank, need(mine.recv_x), need(theirs.recv_x))
            if mine.recv_topk_idx is not None:
                indices = mine.recv_topk_idx
                expected = np.where(indices < 0, -1, new_local[indices])
                check_equal("indices after renaming experts", rank, expected, need(theirs.recv_topk_idx))
            counts, renamed_counts = mine.expert_counts, theirs.expert_counts
        else:
            counts, renamed_counts = mine.recv_count, theirs.recv_count
        if len(need(counts)):
            check_equal("counts after renaming experts", rank, counts, need(renamed_counts)[new_local])


def halves(case: Case) -> list[Case]:
    """The same tokens in two calls."""
    middle = [t // 2 for t in case.num_tokens]
    parts = []
    for first in (True, False):
        tokens = tuple(
            slice(0, m) if first else slice(m, t) for m, t in zip(middle, case.num_tokens, strict=True)
        )
        parts.append(
            replace(
                case,
                topk_idx=tuple(i[own] for i, own in zip(case.topk_idx, tokens, strict=True)),
                parent=Window(case, tuple(range(case.num_ranks)), tokens),
            )
        )
    return parts


def splitting_a_batch_changes_nothing(
    case: Case, views: list[RankView], others: list[list[RankView]]
) -> None:
    """Each token's result is the same, whatever other tokens travel with it."""
    for rank in case.members:
        parts = [need(half[rank].combined_x) for half in others]
        check_equal("combined x of two halves", rank, need(views[rank].combined_x), np.concatenate(parts))
        if case.options.mode == "ht":
            check_equal(
                "rows of two halves",
                rank,
                _sorted_rows(need(views[rank].recv_x)),
                _sorted_rows(np.concatenate([need(half[rank].recv_x) for half in others])),
            )
        else:
            counts = sum(need(half[rank].recv_count) for half in others)
            check_equal("counts of two halves", rank, need(views[rank].recv_count), counts)


def _sorted_rows(rows: Array) -> Array:
    return np.array(sorted(row.tobytes() for row in rows))


def _whole(case: Case) -> Window:
    tokens = tuple(slice(0, t) for t in case.num_tokens)
    return Window(case, tuple(range(case.num_ranks)), tokens)


def with_other_timing(case: Case) -> list[Case]:
    """The same calls, the ranks delayed against each other in other ways, awaited in other ways."""
    skew = {"none": "all", "one": "none", "all": "one"}[case.options.skew]
    schedule = {"sync": "async", "async": "hook", "hook": "sync"}[case.options.schedule]
    changed = case.with_options(skew=skew, schedule=schedule)
    return [replace(changed, parent=_whole(case))]


def timing_changes_nothing(case: Case, views: list[RankView], others: list[list[RankView]]) -> None:
    """Results do not depend on who arrives when, nor on how a call is awaited: the same bits."""
    difference = first_difference(views, others[0])
    if difference is not None:
        raise Violation(f"after other timing: {difference}", difference.rank, difference.where)


def with_other_index_type(case: Case) -> list[Case]:
    """The same call with int32 instead of int64 indices, or the other way round."""
    other = {"int64": "int32", "int32": "int64"}[case.options.idx_dtype]
    return [case.with_options(idx_dtype=other)]


def index_type_changes_nothing(case: Case, views: list[RankView], others: list[list[RankView]]) -> None:
    """int32 and int64 indices give the same results, indices in the type that was given."""
    for rank in case.members:
        for field in fields(RankView):
            if field.name in MEASURED:
                continue  # records are wider
            a, b = getattr(views[rank], field.name), getattr(others[0][rank], field.name)
            if field.name == "recv_topk_idx" and a is not None and b is not None:
                a = a.astype(b.dtype)
            if a is not None:
                check_equal(f"{field.name} with other index type", rank, a, need(b, field.name))


def _same_rows_return(case: Case) -> bool:
    """Combined rows are dispatched rows, so a row follows a token wherever it is renamed to."""
    return case.options.combine_rows == "same"


RELATIONS = (
    Property(
        "renaming ranks commutes",
        # Summed first on each rank, or in each domain, a token's ranks are added by their names.
        lambda case: (
            _same_rows_return(case)
            and not case.sums_by_domain
            and (case.options.mode == "ht" or case.options.reduce == "token")
        ),
        renaming_ranks_commutes,
        with_renamed_ranks,
    ),
    Property("renaming experts commutes", _same_rows_return, renaming_experts_commutes, with_renamed_experts),
    Property(
        "splitting a batch changes nothing", _same_rows_return, splitting_a_batch_changes_nothing, halves
    ),
    Property("timing changes nothing", always, timing_changes_nothing, with_other_timing),
    Property("index type changes nothing", always, index_type_changes_nothing, with_other_index_type),
)
