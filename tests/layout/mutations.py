"""Deliberate defects of csrc/layout, each of which the comparison with the oracle has to catch.

Every one is a mistake that layout code of this kind has had or invites: the text in the header and what
replaces it. `old` must occur exactly once in its file. run_mutants.py applies them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    name: str
    header: str  # in csrc/layout
    old: str
    new: str


CROSSING = "crossing_layout.hpp"

MUTATIONS = [
    # Who owns what.
    Mutation("-1 counted as an expert", "placement.hpp", "entry >= 0 && entry <", "entry >= -1 && entry <"),
    Mutation(
        "experts dealt out in turn, not in blocks",
        "placement.hpp",
        "return expert / experts_per_rank;",
        "return expert % num_ranks;",
    ),
    Mutation(
        "domains dealt out in turn, not in blocks",
        "placement.hpp",
        "return rank / ranks_per_domain;",
        "return rank % num_domains();",
    ),
    Mutation(
        "a last, smaller domain taken for a whole one",
        "placement.hpp",
        "return min_of(ranks_per_domain, num_ranks - first_rank_of_domain(domain));",
        "return ranks_per_domain;",
    ),
    Mutation(
        "received index stays global",
        "placement.hpp",
        "? int32_t(entry) - first_expert_of_rank(rank)",
        "? int32_t(entry)",
    ),
    # Once per rank, domain, expert.
    Mutation(
        "compared with the entry before only",
        "placement.hpp",
        "for (int j = 0; j < count; ++j) {",
        "for (int j = count > 0 ? count - 1 : 0; j < count; ++j) {",
    ),
    Mutation(
        "first entry left out of the comparison",
        "placement.hpp",
        "for (int j = 0; j < count; ++j) {",
        "for (int j = 1; j < count; ++j) {",
    ),
    Mutation("end of a range taken as inside", "placement.hpp", "row[j] < end)", "row[j] <= end)"),
    Mutation(
        "last expert of a rank not recognised",
        "placement.hpp",
        "first + place.experts_per_rank);",
        "first + place.experts_per_rank - 1);",
    ),
    Mutation("rank bit shifted in 32 bits", "placement.hpp", "mask |= uint64_t(1) <<", "mask |= 1 <<"),
    Mutation(
        "duplicates of an expert take a low-latency row each",
        "placement.hpp",
        "return !any_within(row, k, expert, expert + 1);",
        "return true;",
    ),
    Mutation(
        "token counted once per entry",
        "counts.hpp",
        "      if (!is_first_of_rank(row, k, place)) continue;\n",
        "",
    ),
    Mutation(
        "duplicates missing from the expert counts",
        "counts.hpp",
        "++counts.per_expert[expert];",
        "if (is_first_of_expert(row, k, place)) ++counts.per_expert[expert];",
    ),
    Mutation(
        "domain counted once per rank",
        "counts.hpp",
        "counts.per_domain && is_first_of_domain(row, k, place)",
        "counts.per_domain",
    ),
    Mutation(
        "expert counted once per rank",
        "counts.hpp",
        "++counts.per_expert[expert];",
        "counts.per_expert[expert] += is_first_of_rank(row, k, place);",
    ),
    # Prefixes and positions.
    Mutation(
        "last token lost when T is odd",
        "counts.hpp",
        "for (int64_t token = begin; token < end; ++token) {\n    const Index* row",
        "for (int64_t token = begin; token < end - end % 2; ++token) {\n    const Index* row",
    ),
    Mutation(
        "last token of a part not counted",
        "counts.hpp",
        "token < end; token += step",
        "token < end - 1; token += step",
    ),
    Mutation(
        "prefix inclusive where exclusive is meant",
        "prefix.hpp",
        "values[i * stride] = sum;\n    sum += value;",
        "sum += value;\n    values[i * stride] = sum;",
    ),
    Mutation("prefix runs over the wrong axis", "prefix.hpp", "= values[i * stride];", "= values[i];"),
    Mutation("prefix off by one", "prefix.hpp", "Count sum = 0;", "Count sum = 1;"),
    Mutation("remainder of the split lost", "prefix.hpp", " + min_of(part, longer_)", ""),
    Mutation("rows numbered from one", "prefix.hpp", "is_selected ? next++", "is_selected ? ++next"),
    Mutation("tokens not sent get row 0", "prefix.hpp", ": Int(-1);", ": Int(0);"),
    Mutation(
        "one running row for all ranks",
        "counts.hpp",
        "take_next(is_token_in_rank[at] != 0, next[rank])",
        "take_next(is_token_in_rank[at] != 0, next[0])",
    ),
    # Rows of a receiver.
    Mutation(
        "row base over the wrong axis",
        "rows.hpp",
        "counts[source * num_ranks + destination]",
        "counts[destination * num_ranks + source]",
    ),
    Mutation("own rows counted into the base", "rows.hpp", "s < source; ++s", "s <= source; ++s"),
    Mutation("row base summed in 32 bits", "rows.hpp", "int64_t row = 0;", "int32_t row = 0;"),
    Mutation(
        "row of an empty source's successor", "rows.hpp", "(bases[middle] <= row ?", "(bases[middle] < row ?"
    ),
    # Expanded rows.
    Mutation(
        "alignment rounded down",
        "arith.hpp",
        "return ceil_div(Int(a), Int(unit)) * Int(unit);",
        "return Int(a) / Int(unit) * Int(unit);",
    ),
    Mutation(
        "alignment forgotten",
        "rules/expanded.hpp",
        "row = align_up(row + counts[expert], alignment);",
        "row = row + counts[expert];",
    ),
    Mutation(
        "gap after an aligned expert",
        "arith.hpp",
        "(Int(a) + Int(b) - 1) / Int(b)",
        "(Int(a) + Int(b)) / Int(b)",
    ),
    Mutation(
        "expert begins where it ends",
        "rules/expanded.hpp",
        "    begins[expert] = row;\n    row = align_up(row + counts[expert], alignment);",
        "    row = align_up(row + counts[expert], alignment);\n    begins[expert] = row;",
    ),
    Mutation(
        "foreign entries get an expanded row",
        "rules/expanded.hpp",
        "rows[i] = recv_topk_idx[i] >= 0 ? next[recv_topk_idx[i]]++ : -1;",
        "rows[i] = next[recv_topk_idx[i] >= 0 ? recv_topk_idx[i] : 0]++;",
    ),
    # Low latency.
    Mutation(
        "halves of a range exchanged",
        "low_latency_rows.hpp",
        "uint64_t(begin) << 32 | uint64_t(uint32_t(count))",
        "uint64_t(count) << 32 | uint64_t(uint32_t(begin))",
    ),
    Mutation(
        "an expert's rows as if for one source",
        "low_latency_rows.hpp",
        "local_expert * (num_ranks * num_max_tokens)",
        "local_expert * num_max_tokens",
    ),
    Mutation(
        "a duplicate points at the next row", "rules/low_latency.hpp", "next[row[k]] - 1", "next[row[k]]"
    ),
    Mutation("ranges begin at the last count", "rules/low_latency.hpp", "begin += count;", "begin = count;"),
    Mutation(
        "flags of dispatch and combine share words",
        "rules/low_latency_buffer.hpp",
        "(kNumEpochs + epoch)",
        "(epoch)",
    ),
    Mutation(
        "slot offset in 32 bits",
        "rules/low_latency_buffer.hpp",
        "(source * num_max_tokens + position) * dispatch_message_bytes();",
        "int32_t((source * num_max_tokens + position) * dispatch_message_bytes());",
    ),
    Mutation(
        "last slot of a source is the next one's first",
        "rules/low_latency_buffer.hpp",
        "(source * num_max_tokens + position)",
        "(source * (num_max_tokens - 1) + position)",
    ),
    Mutation(
        "epochs of combine share slots",
        "rules/low_latency_buffer.hpp",
        "epoch * combine_region_bytes()",
        "0 * combine_region_bytes()",
    ),
    Mutation(
        "bf16 rows do not fit the message",
        "rules/low_latency_buffer.hpp",
        "max_of(hidden * 2, hidden + group_bytes())",
        "(hidden + group_bytes())",
    ),
    Mutation(
        "messages not aligned",
        "rules/low_latency_buffer.hpp",
        "align_up(hidden * 2 + group_bytes(), Int(kRowAlignment))",
        "hidden * 2 + group_bytes()",
    ),
    # Two levels.
    Mutation(
        "everything forwarded by a domain's first rank",
        "rules/two_level.hpp",
        "first_rank_of_domain(domain) + local % place.num_ranks_of_domain(domain);",
        "first_rank_of_domain(domain) + 0 * local;",
    ),
    Mutation(
        "token crosses to a domain once per rank",
        "rules/two_level.hpp",
        "position[at] = int32_t(take_next(masks[at] != 0, next[domain]));",
        "position[at] = int32_t(take_next(masks[at] != 0, next[domain]));\n"
        "      next[domain] += (masks[at] & (masks[at] - 1)) != 0;",
    ),
    Mutation(
        "forwarded rows counted over all ranks together",
        "rules/two_level.hpp",
        "take_next((masks[i] >> local & 1) != 0, next[local])",
        "take_next((masks[i] >> local & 1) != 0, next[0])",
    ),
    # Sizes.
    Mutation(
        "room for padding forgotten",
        "rules/capacity.hpp",
        "rows + (alignment - 1) * num_local_experts, alignment",
        "rows, alignment",
    ),
    Mutation("duplicates given no room", "rules/capacity.hpp", "has_duplicates ? num_topk : ", ""),
    Mutation(
        "size summed in 32 bits",
        "rules/low_latency_buffer.hpp",
        "align_up(num_ranks * num_max_tokens * dispatch_message_bytes(), ",
        "align_up(Int(int32_t(num_ranks * num_max_tokens * dispatch_message_bytes())), ",
    ),
    Mutation(
        "what overflows is let through", "arith.hpp", "value >= 0 && value <=", "value >= 0 || value <="
    ),
    # Between domains.
    Mutation(
        "the next gateway may be masked, too",
        "rules/two_level.hpp",
        "if (alive(rank)) return rank;",
        "return rank;",
    ),
    Mutation(
        "stand-ins from the domain's first rank on",
        "rules/two_level.hpp",
        "first + (start + step) % size",
        "first + step",
    ),
    Mutation(
        "a window's last token left out",
        CROSSING,
        "(w + 1) * window);",
        "(w + 1) * window - 1);",
    ),
    Mutation("one half for all windows", CROSSING, "{ return number % 2; }", "{ return 0; }"),
    Mutation("arrivals counted by window, not by half", CROSSING, "number / 2 + 1", "number + 1"),
    Mutation(
        "credit for the window before last not asked",
        CROSSING,
        "{ return number / 2; }",
        "{ return number / 4; }",
    ),
    Mutation(
        "credit for the last window asked",
        CROSSING,
        "{ return number / 2; }",
        "{ return (number + 1) / 2; }",
    ),
    Mutation(
        "one credit for both halves",
        CROSSING,
        "mailbox_signal(num_peers(), 0) + (2 * peer + half) * kCrossingAlignment",
        "mailbox_signal(num_peers(), 0) + (2 * peer) * kCrossingAlignment",
    ),
    Mutation(
        "the last chunk counted full",
        CROSSING,
        "min_of(num_records - chunk * kChunkRecords, int64_t{kChunkRecords})",
        "int64_t{kChunkRecords}",
    ),
    Mutation(
        "peers numbered with the own domain",
        CROSSING,
        "domain < own ? domain : domain - 1",
        "domain",
    ),
    Mutation(
        "weights over indices",
        CROSSING,
        "return index(num_topk) + 4 * k;",
        "return index(k);",
    ),
    Mutation(
        "one final row too few",
        CROSSING,
        "return final_row(domain_ranks) + 4 * k;",
        "return final_row(domain_ranks - 1) + 4 * k;",
    ),
    Mutation(
        "chunks without their header",
        CROSSING,
        "return kChunkHeader + kChunkRecords * record_bytes;",
        "return kChunkRecords * record_bytes;",
    ),
    Mutation(
        "halves share chunks",
        CROSSING,
        "return arrived(num_peers(), 0, 0) + ((2 * peer + half) * num_chunks()",
        "return arrived(num_peers(), 0, 0) + ((2 * peer) * num_chunks()",
    ),
    Mutation(
        "credits share a line with signals",
        CROSSING,
        "return mailbox_signal(num_peers(), 0) + (2 * peer",
        "return mailbox_signal(num_peers(), 0) - 128 + (2 * peer",
    ),
    Mutation(
        "room for one copy",
        CROSSING,
        "(2 * peer + half) * window + position) * copies",
        "(2 * peer + half) * window + position) * 1",
    ),
    Mutation(
        "long windows between many domains",
        CROSSING,
        "int64_t{64}), int64_t{1024}",
        "int64_t{256}), int64_t{1024}",
    ),
]
