"""Mutations of the kernels by hand: what no pattern of kernel_mutants makes."""

from __future__ import annotations

from dataclasses import dataclass

#: The copies are kernels by themselves: their mutants are hunted with them alone.
COPY_FILE = "kernels/copy/bulk_copy.hpp"


@dataclass(frozen=True)
class Edit:
    """A mutation that no pattern makes: a bug that this field has published, or a rule of the protocol.

    `old` occurs once in the file; `why` says what it removes.
    """

    name: str
    file: str
    old: str
    new: str
    why: str


#: Mutations by hand. Those whose text is gone fail the test that lists them: a rule has moved or was dropped.
EDITS = (
    Edit(
        "one mailbox for all epochs",
        "layout/symmetric_layout.hpp",
        "(2 * s + static_cast<int>(epoch & 1u)) * mailbox_bytes_",
        "(2 * s + static_cast<int>(epoch & 0u)) * mailbox_bytes_",
        "a word is written again while a slower block of its receiver still reads it",
    ),
    Edit(
        "one digest for all epochs",
        "layout/symmetric_layout.hpp",
        "(2 * s + static_cast<int>(epoch & 1u)) * kLine32",
        "(2 * s + static_cast<int>(epoch & 0u)) * kLine32",
        "the same of what ranks compare before a combine",
    ),
    Edit(
        "staging granted a combine too early",
        "kernels/combine/credit.hpp",
        "wait_reached<acquire, sys_scope>(word, call.epoch - 1, call.deadline)",
        "wait_reached<acquire, sys_scope>(word, call.epoch - 2, call.deadline)",
        "rows are written over those of the combine before, which may still be read",
    ),
    Edit(
        "a copy engine that does not wait for credit",
        "kernels/combine/drive.hpp",
        "bool granted = wait_owners(call);",
        "bool granted = true;",
        "rows are copied over those of the combine before",
    ),
    Edit(
        "flags a chunk ahead of the copy engine",
        "kernels/combine/drive.hpp",
        "args.copy_engine.chunks.num_chunks - 1 - chunk)",
        "args.copy_engine.chunks.num_chunks - chunk)",
        "a chunk's flags say that the one before it is there",
    ),
    Edit(
        "a peer that is not warned of what is written over",
        "kernels/combine/drive.hpp",
        "    if (!granted) post_overwrite_warning(g, call.epoch);\n",
        "",
        "who was given up sums what lies where its rows were",
    ),
    Edit(
        "a doorbell that rings only where all have granted credit",
        "kernels/combine/drive.hpp",
        "    store<release, sys_scope>(&g.state->ce_doorbell,",
        "    if (granted) store<release, sys_scope>(&g.state->ce_doorbell,",
        "a stream waits indefinitely where an owner was given up",
    ),
    Edit(
        "sums without a look for warnings behind them",
        "kernels/combine/finish.hpp",
        "has_reduced && is_overwritten(call.g)",
        "false",
        "the same, by the reader",
    ),
    Edit(
        "epochs that come by 0",
        "kernels/common/group.hpp",
        "last == 0xffffffffu ? 2 : last + 1",
        "last + 1",
        "a word that nobody has written is taken for this call's, once in 2^32",
    ),
    Edit(
        "two odd epochs in a row",
        "kernels/common/group.hpp",
        "last == 0xffffffffu ? 2 : last + 1",
        "last == 0xffffffffu ? 1 : last + 1",
        "what lies in two places in turn is written over while it is read, once in 2^32",
    ),
    Edit(
        "a mailbox word without its tag",
        "kernels/dispatch/metadata.hpp",
        "pack_tagged(value, call.epoch)",
        "pack_tagged(value, call.epoch & 1u)",
        "a parity instead of a generation",
    ),
    Edit(
        "claims that are not taken back",
        "kernels/dispatch/call.hpp",
        "  dev::store(&state->groups_claimed, 0u);\n",
        "",
        "nobody counts in the next call",
    ),
    Edit(
        "experts' totals that are not cleared",
        "kernels/dispatch/count_experts.hpp",
        "    store<relaxed, gpu_scope>(expert_totals(args) + e, 0u);\n",
        "",
        "the next call counts on",
    ),
    Edit(
        "a stretch's count without its tag",
        "kernels/dispatch/count.hpp",
        "pack_tagged(static_cast<uint32_t>(count), call.epoch)",
        "pack_tagged(static_cast<uint32_t>(count), call.epoch & 1u)",
        "a parity instead of a generation",
    ),
    Edit(
        "totals of what comes before block 0's own tokens end",
        "kernels/dispatch/count.hpp",
        "is_leader_block() ? args.groups.num_stretches : ",
        "false ? args.groups.num_stretches : ",
        "ranks are told less than comes",
    ),
    Edit(
        "experts counted by who counts last, whoever still counts",
        "kernels/dispatch/count_experts.hpp",
        "static_cast<uint32_t>(args.groups.num_groups));",
        "static_cast<uint32_t>(args.groups.num_groups - 1));",
        "totals that are posted before they are there",
    ),
    Edit(
        "rows awaited while a push has no SM",
        "kernels/dispatch/spread.hpp",
        "joins.get(0) != 0 && learn_bases(call)",
        "learn_bases(call)",
        "push blocks of two ranks wait for each other's that cannot start before they end",
    ),
    Edit(
        "a tile of scales by its first row",
        "kernels/dispatch/scale_tiles.hpp",
        "static_cast<int>(before) + 1 == tile.rows",
        "before == 0u",
        "scales of rows that have not come",
    ),
    Edit(
        "a stage is filled while it is stored",
        COPY_FILE,
        "if (next < ring.count) ring.fill(read_stage, next);",
        "if (next < ring.count) ring.fill((read_stage + 1) % num_stages, next);",
        "the stage of a store that nobody has waited for is loaded again: stages - 1 groups are too many",
    ),
    Edit(
        "a ring whose rounds are not counted",
        COPY_FILE,
        "      ++round;\n",
        "",
        "each round waits for the phase of the first, which is long complete",
    ),
    Edit(
        "half of a chunk expected",
        COPY_FILE,
        "static_cast<uint32_t>(bytes_of(i))",
        "static_cast<uint32_t>(bytes_of(i) / 2)",
        "a phase that waits for other bytes than come",
    ),
    Edit(
        "mbarriers of one warp over another's",
        COPY_FILE,
        "SharedArray<uint64_t>(int64_t{8} * warp() * num_stages)",
        "SharedArray<uint64_t>(int64_t{8} * warp() * (num_stages - 1))",
        "one shared object in two hands",
    ),
    Edit(
        "stages over the mbarriers",
        COPY_FILE,
        "layout::align_up(int64_t{8} * num_warps * num_stages, int64_t{128})",
        "layout::align_up(int64_t{8} * num_warps, int64_t{16})",
        "a copy overwrites the mbarrier that another completes on",
    ),
    Edit(
        "one place for all epochs",
        "layout/exchange_slots.hpp",
        "static_cast<int64_t>(epoch & 1u) * num_ranks_ + source",
        "static_cast<int64_t>(epoch & 0u) * num_ranks_ + source",
        "rows are pushed over those of the exchange before, which may still be read",
    ),
    Edit(
        "flags of one block for all",
        "kernels/exchange/flags.hpp",
        "args.slots.flag(source, block())",
        "args.slots.flag(source, 0)",
        "another block's flag says nothing of these rows",
    ),
    Edit(
        "a slot whose tensor was not taken",
        "kernels/ring/before_send.hpp",
        "if (!is_broken && wait_equal<acquire, sys_scope>(freed, sent, Deadline::in(g.timeout_ns))) return;",
        "return;",
        "a tensor is copied over one that may still be read",
    ),
    Edit(
        "a sender that gives up in silence",
        "kernels/ring/before_send.hpp",
        "call.there<uint32_t>(slots.overwritten(call.peers_way)), 1u)",
        "call.there<uint32_t>(slots.overwritten(call.peers_way)), 0u)",
        "the receiver takes what was copied over its tensor for that",
    ),
    Edit(
        "one way for both neighbours",
        "layout/ring_slots.hpp",
        "num_ranks ? 0 : 1;",
        "num_ranks ? 0 : 0;",
        "the tensors of two neighbours lie in the same slots",
    ),
    Edit(
        "any kind will do",
        "kernels/ring/before_receive.hpp",
        "if (kind != args.kind)",
        "if (kind != args.kind && kind == 0)",
        "a tensor of another dtype or size is taken for what was asked for",
    ),
    Edit(
        "rows of a rank that did not come",
        "kernels/exchange/read.hpp",
        "  if (SharedArray<uint32_t>(0).get(0) != 0) return;\n",
        "",
        "what was waited for in vain is read",
    ),
    Edit(
        "one place for the messages of all epochs",
        "layout/all_reduce_slots.hpp",
        "static_cast<int64_t>(epoch & 1u);",
        "static_cast<int64_t>(epoch & 0u);",
        "messages are pushed over those of the call before, which may still be read",
    ),
    Edit(
        "results over addends",
        "layout/all_reduce_slots.hpp",
        "2 * static_cast<int64_t>(round) + ",
        "0 * static_cast<int64_t>(round) + ",
        "an owner's results are pushed where a slower block's addends lie",
    ),
    Edit(
        "flags of one round for both",
        "layout/all_reduce_slots.hpp",
        "static_cast<int64_t>(round) * kMaxReduceBlocks + block",
        "0 * static_cast<int64_t>(round) * kMaxReduceBlocks + block",
        "that addends have come says nothing of results",
    ),
    Edit(
        "sums of a rank that did not come",
        "kernels/all_reduce/direct.hpp",
        "  if (has_failed_in(layout::ReduceRound::kAddends)) return;\n",
        "",
        "what was waited for in vain is summed",
    ),
    Edit(
        "results of a sum that was not made",
        "kernels/all_reduce/flags.hpp",
        "peer == args.rank || has_failed_before(round)",
        "peer == args.rank",
        "flags are raised for results that nobody has pushed",
    ),
    Edit(
        "a result rounded by each rank for itself",
        "kernels/all_reduce/sum.hpp",
        "args.result_key, dice_index",
        "args.addend_key, dice_index",
        "ranks have different bits",
    ),
    Edit(
        "one stretch for all epochs",
        "layout/low_latency_slots.hpp",
        "static_cast<int64_t>(epoch & 1u) * num_ranks_ + source",
        "static_cast<int64_t>(epoch & 0u) * num_ranks_ + source",
        "a message is written over one that its receiver still spreads",
    ),
    Edit(
        "one stretch of entries for all epochs",
        "layout/low_latency_slots.hpp",
        "static_cast<int64_t>(epoch & 1u) * num_returns_",
        "static_cast<int64_t>(epoch & 0u) * num_returns_",
        "a row of an entry is written over one that its owner still sums",
    ),
    Edit(
        "entries of which some have not come",
        "kernels/low_latency/combine_entry_sum.hpp",
        "    if (lane() != g.rank && ((ranks >> lane()) & 1u) != 0) {\n",
        "    if (lane() < g.rank && ((ranks >> lane()) & 1u) != 0) {\n",
        "a flag of one rank says nothing of another's rows",
    ),
    Edit(
        "rows in LogFMT of which some have not come",
        "kernels/low_latency/combine_decode.hpp",
        "  if (((ranks >> lane()) & 1u) != 0) {\n",
        "  if (((ranks >> lane()) & 1u) != 0 && lane() <= call.g.rank) {\n",
        "a flag of one rank says nothing of another's rows",
    ),
    Edit(
        "a group encoded by itself",
        "kernels/low_latency/logfmt_rows.hpp",
        "ballot(mine < groups && !meta.is_good()) == 0",
        "ballot(mine < 1 && !meta.is_good()) == 0",
        "who decodes goes by the metadata of the whole chunk",
    ),
    Edit(
        "sums without digests",
        "kernels/low_latency/combine_digest.hpp",
        "    if (!is_live(call, source)) continue;\n",
        "    if (!is_live(call, source) || source != g.rank) continue;\n",
        "nobody sees that ranks combine along other dispatches, or have not read what came before",
    ),
    Edit(
        "words without a tag",
        "kernels/low_latency/dispatch_count.hpp",
        "pack_tagged(value, call.epoch)",
        "pack_tagged(value, call.epoch & 1u)",
        "a parity instead of a generation",
    ),
    Edit(
        "any top-k indices",
        "kernels/low_latency/combine_digest.hpp",
        "  if (!args.refused && load_once(args.handle.identity + 1) != hash.get(0)) value = kRefusal;\n",
        "",
        "a combine along indices that are not those of its dispatch",
    ),
    Edit(
        "any dispatch",
        "kernels/low_latency/combine_digest.hpp",
        "epoch == 0 ? kRefusal : epoch | 1u << 31",
        "epoch == 0 ? kRefusal : 1u << 31",
        "ranks that combine along different dispatches",
    ),
    Edit(
        "words that nobody waited for",
        "kernels/low_latency/dispatch_spread.hpp",
        "  return stopped.get(0) == 0 && !args.refused;\n",
        "  return !args.refused;\n",
        "messages are spread by words that have not come, or of ranks that disagree",
    ),
    Edit(
        "held up in silence",
        "kernels/low_latency/patience.hpp",
        "    post_held(call, count);\n",
        "",
        "a rank that waits for one that is gone is taken for gone by others",
    ),
    Edit(
        "masked, not mended",
        "kernels/low_latency/mend.hpp",
        "    mending.set(Mending::kMissing, notes.missing);\n    return Next::kFirst;\n",
        "    mask(g, notes.missing);\n    return Next::kEnd;\n",
        "some blocks' results have the rows of a rank that others have left out",
    ),
    Edit(
        "one part mended",
        "kernels/low_latency/mend.hpp",
        "  if (call.block != num_blocks() - 1) return Next::kOther;\n",
        "",
        "what the other blocks have received is with the rank that is missing, or was never received",
    ),
    Edit(
        "flags of rows that were not made",
        "kernels/low_latency/combine_reduce.hpp",
        "    if ((lost >> where.source) & 1u) continue;\n",
        "",
        "an owner whose weights came late takes what lies there for its row",
    ),
    Edit(
        "one credit for both halves",
        "layout/crossing_layout.hpp",
        "return mailbox_signal(num_peers(), 0) + (2 * peer + half) * kCrossingAlignment;",
        "return mailbox_signal(num_peers(), 0) + (2 * peer) * kCrossingAlignment;",
        "windows are read in any order: one is written over the one before last, which is still read",
    ),
    Edit(
        "arrivals by parity",
        "kernels/two_level/items.hpp",
        "const auto wanted = static_cast<uint32_t>(window.arrivals());",
        "const auto wanted = static_cast<uint32_t>(window.arrivals() & 1);",
        "a chunk of a former window is taken for this one's",
    ),
    Edit(
        "empty chunks without a signal",
        "kernels/two_level/send.hpp",
        "if (thread() == 0) put_chunk(",
        "if (thread() == 0 && records > 0) put_chunk(",
        "words count windows: a chunk that is not signalled is waited for",
    ),
    Edit(
        "a window that is counted behind its last put",
        "kernels/two_level/domain_sum.hpp",
        "  const bool is_last = count_chunk(two_level, &two_level.state->summed[slot][number.half()]);\n"
        "  put_chunk(two_level, rail, sent, chunk, records * stride);\n",
        "  put_chunk(two_level, rail, sent, chunk, records * stride);\n"
        "  const bool is_last = count_chunk(two_level, &two_level.state->summed[slot][number.half()]);\n",
        "the window after the next is counted before the counter is set to zero",
    ),
    Edit(
        "asked again before the sums are here",
        "kernels/two_level/ask.hpp",
        "if (window < 2) return;",
        "if (window < 1000) return;",
        "what is asked for is written over what the gateway still reads",
    ),
)
