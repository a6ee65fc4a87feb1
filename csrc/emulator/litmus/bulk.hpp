// Litmus kernels of bulk copies, mbarriers and the async proxy. `writer` picks the variant: 0 is right, each
// other one lacks or misplaces one thing, as the kernel's list says. tests/emulator/test_litmus_bulk.py holds
// what must come of it.
#pragma once

#include "emulator/litmus/litmus.hpp"

namespace deepep::litmus {

inline constexpr int kStage = 32;  // words of a stage
inline constexpr int64_t kStageBytes = 4 * kStage;
inline constexpr int64_t kStagesAt = 64;  // in shared memory, behind up to eight mbarriers

[[nodiscard]] inline dev::SharedArray<uint32_t> stage(int i) {
  return dev::SharedArray<uint32_t>(kStagesAt + kStageBytes * i);
}
[[nodiscard]] inline uint64_t* barrier(int i) { return dev::SharedArray<uint64_t>(0).at(i); }

/// Lane 0 initialises `count` mbarriers for one arrival each, for all lanes and for copies.
inline void init_barriers(int count) {
  using namespace dev;
  if (thread() == 0) {
    for (int i = 0; i < count; ++i) mbarrier_init(barrier(i), 1);
    fence_async<shared_space>();
  }
  sync_warp();
}

/// Global memory into a stage, and every lane reads a word of it.
/// 1 no proxy fence behind the initialisation, 2 no wait, 3 a relaxed wait, 4 bytes of one of two copies
/// expected, 5 waits for the phase before the first, 6 waits a phase too far, 7 nobody waits at all, 8 only
/// lane 0 waits
DEEPEP_KERNEL(bulk_load_kernel, LitmusArgs, 32) {
  using namespace dev;
  const Deadline deadline = Deadline::in(args.timeout_ns);
  store(args.words + thread(), static_cast<uint32_t>(thread()));
  store(args.words + kStage + thread(), static_cast<uint32_t>(thread()));
  if (thread() == 0) {
    mbarrier_init(barrier(0), 1);
    if (args.writer != 1) fence_async<shared_space>();
  }
  fence_async<global_space>();
  sync_warp();
  if (thread() == 0) {
    mbarrier_expect<release, block_scope>(barrier(0), args.writer == 4 ? kStageBytes : 2 * kStageBytes);
    bulk_load(stage(0).at(0), args.words, kStageBytes, barrier(0));
    bulk_load(stage(1).at(0), args.words + kStage, kStageBytes, barrier(0));
  }
  sync_warp();  // the phase is running for all, whoever waits
  bool came = true;
  if (args.writer == 3)
    came = mbarrier_wait<relaxed, block_scope>(barrier(0), 0, deadline);
  else if (args.writer != 2 && args.writer != 7 && (args.writer != 8 || thread() == 0))
    came = mbarrier_wait<acquire, block_scope>(barrier(0),
                                               args.writer == 5   ? 0xffffffffu
                                               : args.writer == 6 ? 1
                                                                  : 0,
                                               deadline);
  if (came && args.writer != 7) store(args.out + thread(), stage(1).get(thread()) + stage(0).get(thread()));
  if (args.writer == 2) came = mbarrier_wait<acquire, block_scope>(barrier(0), 0, deadline);
}

/// A warp fills a stage, lane 0 stores it to rank 1 in bulk and raises a flag; rank 1 reads.
/// 1 no proxy fence, 2 the fence by lane 0 behind the barrier (right, too), 3 no barrier, 4 a fence for global
/// memory, 5 the reading alone waited for, 6 the flag before the wait, 7 a relaxed flag (the published bug: no
/// system release between bulk stores and the signal), 8 no commit, 9 a flag released at gpu scope behind a
/// fence of the system
DEEPEP_KERNEL(bulk_store_kernel, LitmusArgs, 32) {
  using namespace dev;
  uint32_t* flag = args.words + 2 * kStage;
  if (args.role == 1) {
    if (wait_equal<acquire, sys_scope>(flag, 1, Deadline::in(args.timeout_ns)))
      store(args.out + thread(), load(args.words + thread()));
    return;
  }
  stage(0).set(thread(), static_cast<uint32_t>(thread() + 7));
  if (args.writer == 4)
    fence_async<global_space>();
  else if (args.writer != 1 && args.writer != 2)
    fence_async<shared_space>();
  if (args.writer != 3) sync_warp();
  if (thread() != 0) return;
  if (args.writer == 2) fence_async<shared_space>();
  bulk_store(args.words, stage(0).at(0), kStageBytes);
  if (args.writer != 8) bulk_commit();
  if (args.writer == 6) store<release, sys_scope>(flag, 1u);
  if (args.writer == 5)
    bulk_wait_read<0>();
  else
    bulk_wait<0>();
  if (args.writer == 7) store<relaxed, sys_scope>(flag, 1u);
  if (args.writer == 9) {
    fence<acq_rel, sys_scope>();
    store<relaxed, sys_scope>(flag, 1u);
  }
  if (args.writer != 6 && args.writer != 7 && args.writer != 9) store<release, sys_scope>(flag, 1u);
  if (args.writer == 5) bulk_wait<0>();
}

/// A ring of two stages that a warp reads and lane 0 reloads, five loads in all.
/// 1 the published bug: no proxy fence before a stage is reloaded, 2 no barrier before it, 3 both before the
/// reading, 4 one phase for all rounds, 5 the parity alone for a phase
DEEPEP_KERNEL(reload_kernel, LitmusArgs, 32) {
  using namespace dev;
  constexpr int kRounds = 5;
  for (int i = 0; i < kRounds; ++i)
    store(args.words + kStage * i + thread(), static_cast<uint32_t>(100 * i + thread()));
  fence_async<global_space>();
  init_barriers(2);
  const auto reload = [&](int round) {
    if (thread() != 0 || round >= kRounds) return;
    mbarrier_expect<release, block_scope>(barrier(round % 2), kStageBytes);
    bulk_load(stage(round % 2).at(0), args.words + kStage * round, kStageBytes, barrier(round % 2));
  };
  reload(0);
  reload(1);
  sync_warp();
  uint32_t sum = 0;
  for (int i = 0; i < kRounds; ++i) {
    const auto round = static_cast<uint32_t>(i / 2);
    const uint32_t phase = args.writer == 4 ? 0 : args.writer == 5 ? round & 1u : round;
    if (!mbarrier_wait<acquire, block_scope>(barrier(i % 2), phase, Deadline::in(args.timeout_ns))) return;
    if (args.writer == 3) {
      fence_async<shared_space>();
      sync_warp();
    }
    sum += stage(i % 2).get((thread() + i) % kStage);
    if (args.writer != 1 && args.writer != 3) fence_async<shared_space>();
    if (args.writer != 2 && args.writer != 3) sync_warp();
    reload(i + 2);
    sync_warp();
  }
  store(args.out + thread(), sum);
}

/// A relay: what is loaded is stored elsewhere and the stage loaded again, three stages, one thread.
/// 1 the published bug: a wait for all groups but `stages - 1`, when the newest group's stage is loaded next,
/// 2 no wait for the reading, 3 nothing waited for at the end, 4 only the reading, 5 no commit
DEEPEP_KERNEL(relay_kernel, LitmusArgs, 32) {
  using namespace dev;
  if (thread() != 0) return;
  constexpr int kStages = 3;
  constexpr int kRounds = 8;
  uint32_t* from = args.words;
  uint32_t* to = args.words + kStage * kRounds;
  for (int i = 0; i < kRounds * kStage; ++i) store(from + i, static_cast<uint32_t>(i));
  for (int s = 0; s < kStages; ++s) mbarrier_init(barrier(s), 1);
  fence_async<all_spaces>();
  const auto reload = [&](int round) {
    if (round >= kRounds) return;
    mbarrier_expect<release, block_scope>(barrier(round % kStages), kStageBytes);
    bulk_load(stage(round % kStages).at(0), from + kStage * round, kStageBytes, barrier(round % kStages));
  };
  for (int s = 0; s < kStages; ++s) reload(s);
  for (int i = 0; i < kRounds; ++i) {
    const Deadline deadline = Deadline::in(args.timeout_ns);
    if (!mbarrier_wait<acquire, block_scope>(barrier(i % kStages), static_cast<uint32_t>(i / kStages),
                                             deadline))
      return;
    bulk_store(to + kStage * i, stage(i % kStages).at(0), kStageBytes);
    if (args.writer != 5) bulk_commit();
    if (args.writer == 1)
      bulk_wait_read<kStages - 1>();
    else if (args.writer != 2)
      bulk_wait_read<0>();
    reload(i + kStages);
  }
  if (args.writer == 4)
    bulk_wait_read<0>();
  else if (args.writer != 3)
    bulk_wait<0>();
  uint32_t sum = 0;
  if (args.writer < 3)
    for (int i = 0; i < kRounds * kStage; ++i) sum += load(to + i);
  store(args.out, sum);
}

/// Groups complete in their order: the first of two may be read when all but one are complete.
/// 1 the second is read
DEEPEP_KERNEL(groups_kernel, LitmusArgs, 32) {
  using namespace dev;
  if (thread() != 0) return;
  for (int i = 0; i < 2 * kStage; ++i) stage(0).set(i, static_cast<uint32_t>(i));
  fence_async<shared_space>();
  for (int i = 0; i < 2; ++i) {
    bulk_store(args.words + kStage * i, stage(i).at(0), kStageBytes);
    bulk_commit();
  }
  bulk_wait<1>();
  store(args.out, load(args.words + kStage * args.writer) + 1);
  bulk_wait<0>();
}

/// Rank 0 stores plainly and raises a flag, rank 1 loads it in bulk.
/// 0 a proxy fence behind the flag, 1 none, 2 one before the flag on rank 0 (right, too), 3 one for shared
/// memory, 4 before the flag is seen
DEEPEP_KERNEL(pull_kernel, LitmusArgs, 32) {
  using namespace dev;
  if (thread() != 0) return;
  uint32_t* flag = args.words + kStage;
  if (args.role == 0) {
    for (int i = 0; i < kStage; ++i) store(args.words + i, static_cast<uint32_t>(i));
    if (args.writer == 2) fence_async<global_space>();
    store<release, sys_scope>(flag, 1u);
    return;
  }
  mbarrier_init(barrier(0), 1);
  fence_async<shared_space>();
  const Deadline deadline = Deadline::in(args.timeout_ns);
  if (args.writer == 4) fence_async<global_space>();
  if (!wait_equal<acquire, sys_scope>(flag, 1, deadline)) return;
  if (args.writer == 0) fence_async<global_space>();
  if (args.writer == 3) fence_async<shared_space>();
  mbarrier_expect<release, block_scope>(barrier(0), kStageBytes);
  bulk_load(stage(0).at(0), args.words, kStageBytes, barrier(0));
  if (mbarrier_wait<acquire, block_scope>(barrier(0), 0, deadline)) store(args.out, stage(0).get(5));
}

/// Rank 1 reads its slot plainly and gives it back, rank 0 stores to it in bulk again.
/// 0 a proxy fence behind the giving back, 1 none: what another proxy has read is no more ordered than what it
/// has written, 2 one before the giving back on rank 1 (right, too)
DEEPEP_KERNEL(give_back_kernel, LitmusArgs, 32) {
  using namespace dev;
  if (thread() != 0) return;
  const Deadline deadline = Deadline::in(args.timeout_ns);
  uint32_t* there = args.words + kStage;
  uint32_t* free = args.words + kStage + 32;
  uint32_t sum = 0;
  for (uint32_t round = 1; round <= 3; ++round) {
    if (args.role == 1) {
      if (!wait_reached<acquire, sys_scope>(there, round, deadline)) return;
      sum += load(args.words + 2);
      if (args.writer == 2) fence_async<global_space>();
      store<release, sys_scope>(free, round);
      continue;
    }
    for (int i = 0; i < kStage; ++i) stage(0).set(i, 10 * round);
    fence_async<shared_space>();
    if (round > 1 && !wait_reached<acquire, sys_scope>(free, round - 1, deadline)) return;
    if (args.writer == 0) fence_async<global_space>();
    bulk_store(args.words, stage(0).at(0), kStageBytes);
    bulk_commit();
    bulk_wait<0>();
    store<release, sys_scope>(there, round);
  }
  store(args.out, sum);
}

/// The first launch stores plainly, the second loads it in bulk: the end of a kernel needs no proxy fence.
DEEPEP_KERNEL(boundary_kernel, LitmusArgs, 32) {
  using namespace dev;
  if (thread() != 0) return;
  if (load(args.out) == 0) {
    for (int i = 0; i < kStage; ++i) store(args.words + i, static_cast<uint32_t>(i));
    store(args.out, 1u);
    return;
  }
  mbarrier_init(barrier(0), 1);
  fence_async<shared_space>();
  mbarrier_expect<release, block_scope>(barrier(0), kStageBytes);
  bulk_load(stage(0).at(0), args.words, kStageBytes, barrier(0));
  if (mbarrier_wait<acquire, block_scope>(barrier(0), 0, Deadline::in(args.timeout_ns)))
    store(args.out, stage(0).get(5));
}

/// Two warps hand a word over through an mbarrier. 1 a relaxed arrival, 2 a relaxed wait
DEEPEP_KERNEL(hand_over_kernel, LitmusArgs, 64) {
  using namespace dev;
  if (thread() == 0) mbarrier_init(barrier(0), 32);
  sync_block();
  if (warp() == 0) {
    stage(0).set(lane(), static_cast<uint32_t>(lane()));
    if (args.writer == 1)
      mbarrier_arrive<relaxed, block_scope>(barrier(0));
    else
      mbarrier_arrive<release, block_scope>(barrier(0));
    return;
  }
  const Deadline deadline = Deadline::in(args.timeout_ns);
  const bool came = args.writer == 2 ? mbarrier_wait<relaxed, block_scope>(barrier(0), 0, deadline)
                                     : mbarrier_wait<acquire, block_scope>(barrier(0), 0, deadline);
  if (came) store(args.out + lane(), stage(0).get((lane() + 1) % 32));
}

/// Three rounds into two slots, each with a flag of its own; the receiver hands slots back.
/// 0 the flag is the round, 1 the published bug: the flag says "there" and no generation, so that the third
/// round takes the signal of the first for its own
DEEPEP_KERNEL(generation_kernel, LitmusArgs, 32) {
  using namespace dev;
  if (thread() != 0) return;
  const Deadline deadline = Deadline::in(args.timeout_ns);
  uint32_t* free = word_at(args, 4);
  uint32_t sum = 0;
  for (uint32_t round = 1; round <= 3; ++round) {
    uint32_t* data = word_at(args, static_cast<int>(round & 1u));
    uint32_t* flag = word_at(args, 2 + static_cast<int>(round & 1u));
    const uint32_t raised = args.writer == 0 ? round : 1;
    if (args.role == 0) {
      if (round > 2 && !wait_reached<acquire, sys_scope>(free, round - 2, deadline)) return;
      store(data, 10 * round);
      store<release, sys_scope>(flag, raised);
    } else {
      if (!wait_equal<acquire, sys_scope>(flag, raised, deadline)) return;
      sum += load(data);
      store<release, sys_scope>(free, round);
    }
  }
  store(args.out, sum);
}

/// Rank 0 writes a slot of rank 1 in bulk and says that it is done with it; rank 1 cleans the slot.
/// 1 the published bug: the slot is cleaned while a late write is in flight, since only the reading was waited
/// for
DEEPEP_KERNEL(cleaning_kernel, LitmusArgs, 32) {
  using namespace dev;
  if (thread() != 0) return;
  uint32_t* done = args.words + kStage;
  if (args.role == 1) {
    if (!wait_equal<acquire, sys_scope>(done, 1, Deadline::in(args.timeout_ns))) return;
    for (int i = 0; i < kStage; ++i) store(args.words + i, 0u);
    store(args.out, load(args.words + 3) + 1);
    return;
  }
  for (int i = 0; i < kStage; ++i) stage(0).set(i, 9u);
  fence_async<shared_space>();
  bulk_store(args.words, stage(0).at(0), kStageBytes);
  bulk_commit();
  if (args.writer == 1)
    bulk_wait_read<0>();
  else
    bulk_wait<0>();
  store<release, sys_scope>(done, 1u);
  bulk_wait<0>();
}

/// What must fail at once, by `writer`.
DEEPEP_KERNEL(bulk_mistake_kernel, LitmusArgs, 32) {
  using namespace dev;
  if (thread() != 0) return;
  for (int i = 0; i < kStage; ++i) stage(0).set(i, 1u);
  if (args.writer < 6) mbarrier_init(barrier(0), 1);
  fence_async<all_spaces>();
  uint64_t* b = barrier(0);
  switch (args.writer) {
    case 0: bulk_store(args.words, stage(0).at(0), 24); break;          // no multiple of 16
    case 1: bulk_store(args.words + 2, stage(0).at(0), 16); break;      // misaligned
    case 2: bulk_store(args.words + 1008, stage(0).at(0), 128); break;  // past the end
    case 3: bulk_store(args.words, args.words + kStage, 16); break;     // from global memory
    case 4: bulk_load(stage(0).at(0), stage(0).at(0), 16, b); break;    // from shared memory
    case 5: bulk_store(args.words, stage(1).at(0), 16); break;          // of what was never written
    case 6: mbarrier_arrive<release, block_scope>(b); break;            // never initialised
    case 7: mbarrier_init(b, 0); break;                                 // for nobody
    case 8:                                                             // initialised again
      mbarrier_init(b, 1);
      mbarrier_init(b, 1);
      break;
    case 9:  // initialised again while a copy is under way
      mbarrier_init(b, 1);
      fence_async<shared_space>();
      bulk_load(stage(0).at(0), args.words, 16, b);
      mbarrier_invalidate(b);
      break;
    case 10:  // more arrivals than a phase takes, bytes being outstanding
      mbarrier_init(b, 1);
      mbarrier_expect<release, block_scope>(b, 16);
      mbarrier_arrive<release, block_scope>(b);
      break;
    case 11:  // more bytes than it can count
      mbarrier_init(b, 2);
      mbarrier_expect<release, block_scope>(b, 1u << 20);
      break;
    case 12:  // its bytes are overwritten
      mbarrier_init(b, 1);
      store(reinterpret_cast<uint32_t*>(b) + 1, 0u);
      break;
    case 13:  // the same, by a copy: a record that has outgrown its stage
      mbarrier_init(barrier(1), 1);
      fence_async<all_spaces>();
      mbarrier_expect<release, block_scope>(barrier(1), 16);
      bulk_load(barrier(0), args.words, 16, barrier(1));
      if (!mbarrier_wait<acquire, block_scope>(barrier(1), 0, Deadline::in(args.timeout_ns))) return;
      break;
    case 14:  // a phase two ahead
      mbarrier_init(b, 1);
      if (!mbarrier_wait<acquire, block_scope>(b, 2, Deadline::in(args.timeout_ns))) return;
      break;
    case 15:  // a phase two behind
      mbarrier_init(b, 1);
      for (int i = 0; i < 2; ++i) mbarrier_arrive<release, block_scope>(b);
      if (!mbarrier_wait<acquire, block_scope>(b, 0, Deadline::in(args.timeout_ns))) return;
      break;
    case 16:  // a copy into the middle of nowhere's barrier
      mbarrier_init(b, 1);
      fence_async<shared_space>();
      bulk_load(stage(0).at(0), args.words, 16, barrier(1));
      break;
    default: break;
  }
  bulk_commit();
  bulk_wait<0>();
}

/// An mbarrier's life, rightly: initialised, used, invalidated, its bytes used for other things, initialised
/// again.
DEEPEP_KERNEL(barrier_life_kernel, LitmusArgs, 32) {
  using namespace dev;
  if (thread() != 0) return;
  uint64_t* b = barrier(0);
  const Deadline deadline = Deadline::in(args.timeout_ns);
  for (int i = 0; i < 2; ++i) {
    mbarrier_init(b, 2);
    for (uint32_t phase = 0; phase < 3; ++phase) {
      if (phase == 0 && !mbarrier_wait<acquire, block_scope>(b, phase - 1, deadline)) return;
      mbarrier_arrive<release, block_scope>(b);
      mbarrier_arrive<release, block_scope>(b);
      if (!mbarrier_wait<acquire, block_scope>(b, phase, deadline)) return;
    }
    mbarrier_invalidate(b);
    store(b, uint64_t{5});
  }
  store(args.out, 1u);
}

}  // namespace deepep::litmus
