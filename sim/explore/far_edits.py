"""Mutations by hand of low latency between domains: as kernel_edits.py."""

from __future__ import annotations

from deepep.sim.explore.kernel_edits import Edit

FAR_EDITS = (
    Edit(
        "one stretch for both turns",
        "layout/low_latency_far_slots.hpp",
        "(2 * far + half) * stretch_",
        "(2 * far + 0 * half) * stretch_",
        "a put arrives over what its receiver still reads of the call before",
    ),
    Edit(
        "one signal for both turns",
        "layout/low_latency_far_slots.hpp",
        "8 * (2 * static_cast<int>(kind) + half)",
        "8 * (2 * static_cast<int>(kind) + 0 * half)",
        "a put that overtakes the one before is taken for it",
    ),
    Edit(
        "arrivals of the turn before",
        "kernels/low_latency_far/puts.hpp",
        "  const auto wanted = static_cast<uint32_t>(call.turn.arrivals());\n  const uint64_t* word",
        "  const auto wanted = static_cast<uint32_t>(call.turn.arrivals() - 1);\n  const uint64_t* word",
        "nothing is waited for",
    ),
    Edit(
        "returns of a refused combine are not awaited",
        "kernels/low_latency_far/combine_arrive.hpp",
        "if ((block() != 0 && !has_stopped) || warp() != 0",
        "if (block() >= 0 || warp() != 0",
        "they arrive over those of the combine after the next, or leave while those are written",
    ),
    Edit(
        "a disagreement is reported before returns are awaited",
        "kernels/low_latency_far/combine_arrive.hpp",
        "if ((block() != 0 && !has_stopped) ||",
        "if (block() != 0 ||",
        "of a rank that is missing as well the host does not learn, and goes on",
    ),
    Edit(
        "rows that were not made are put",
        "kernels/low_latency_far/combine_put.hpp",
        "sent.set(0, static_cast<uint32_t>(count_sent(state, lost_owners(call) != 0)));",
        "sent.set(0, static_cast<uint32_t>(count_sent(state, false)));",
        "their owner sums what lies there",
    ),
    Edit(
        "places of all tokens",
        "kernels/low_latency_far/dispatch_put.hpp",
        "const uint32_t earlier = t < tokens.begin ? ranks : 0;",
        "const uint32_t earlier = t < tokens.end ? ranks : 0;",
        "messages are written where none is looked for",
    ),
    Edit(
        "entries of any rank",
        "kernels/low_latency_far/combine_rows.hpp",
        "popcount(ballot(owner == rank))",
        "popcount(ballot(owner >= 0))",
        "rows are looked for behind those of ranks that have none",
    ),
    Edit(
        "rests of the call before",
        "kernels/low_latency_far/combine_put.hpp",
        "    store(state->rests + lane(), 0u);\n",
        "",
        "units of a row in LogFMT go behind room that nobody writes",
    ),
    Edit(
        "rests behind another number of rows",
        "kernels/low_latency_far/logfmt_puts.hpp",
        "rows + static_cast<uint64_t>(rows_from(call, source) * lies.bytes())};",
        "rows + static_cast<uint64_t>(number * lies.bytes())};",
        "units that go as they are are looked for among rows",
    ),
    Edit(
        "rows for a gateway in their sender's own stretch",
        "kernels/low_latency_rails/combine_call.hpp",
        "domain_of(own, owner) * own.num_ranks + local};",
        "call.g.rank};",
        "rows of two owners are written to one place",
    ),
    Edit(
        "records by their entries on the owner's rank",
        "kernels/low_latency_rails/dispatch_call.hpp",
        "return own + layout::pack_entry(",
        "return own + 0 * layout::pack_entry(",
        "the gateway spreads all to its domain's first rank",
    ),
    Edit(
        "sums of a domain whose ranks disagree",
        "kernels/low_latency_rails/combine_relay.hpp",
        "  if (!agreed) {\n",
        "  if (!agreed && call.g.num_ranks == 0) {\n",
        "a gateway waits for rows that nobody returns, or puts rows that were not made",
    ),
    Edit(
        "relayed before it came",
        "kernels/low_latency_rails/combine_relay.hpp",
        "is_mine && wait_put(call, FarPut::kDigests, lane(), Phase::kCounts);",
        "is_mine;",
        "digests of the call before, or none, are handed on",
    ),
)
