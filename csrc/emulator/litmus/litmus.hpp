// Small kernels that prove the memory model: for each there are outcomes that must appear over the seeds and
// outcomes, or errors, that never may. tests/emulator says which. One thread a role unless stated; roles are
// ranks.
#pragma once

#include "device/device.hpp"

namespace deepep::litmus {

/// `words` are symmetric and start at zero; `out` is this rank's own. In one domain all ranks have the same
/// words; in several each has its own, which its NIC knows, and `links`, symmetric in the domain.
struct LitmusArgs {
  int role;
  int writer;  // how the writing side orders
  int reader;  // how the reading side orders
  uint32_t* words;
  uint32_t* out;
  uint64_t timeout_ns;
  uint32_t* links;
  uint32_t* neighbour;  // the next rank's links: role ^ 1
  uint32_t* far;        // and its words
};

inline constexpr int kFar = 64;  // words apart, so that nothing shares a line

[[nodiscard]] inline uint32_t* word_at(const LitmusArgs& args, int i) { return args.words + kFar * i; }

/// 0 relaxed, 1 release.sys, 2 fence.sys and relaxed, 3 release.gpu with a system-wide store, 4 a fence too
/// narrow.
inline void publish(int how, uint32_t* flag, uint32_t value) {
  using namespace dev;
  switch (how) {
    case 0: store<relaxed, sys_scope>(flag, value); break;
    case 1: store<release, sys_scope>(flag, value); break;
    case 2:
      fence<acq_rel, sys_scope>();
      store<relaxed, sys_scope>(flag, value);
      break;
    case 3: store<release, gpu_scope>(flag, value); break;
    default: fence<acq_rel, gpu_scope>(); store<relaxed, sys_scope>(flag, value);
  }
}

/// 0 relaxed, 1 acquire.sys, 2 relaxed and fence.sys, 3 acquire.gpu, 4 relaxed and a fence too narrow.
[[nodiscard]] inline bool await(int how, const uint32_t* flag, uint32_t value, dev::Deadline deadline) {
  using namespace dev;
  switch (how) {
    case 0: return wait_equal<relaxed, sys_scope>(flag, value, deadline);
    case 1: return wait_equal<acquire, sys_scope>(flag, value, deadline);
    case 2: {
      const bool came = wait_equal<relaxed, sys_scope>(flag, value, deadline);
      fence<acq_rel, sys_scope>();
      return came;
    }
    case 3: return wait_equal<acquire, gpu_scope>(flag, value, deadline);
    default: {
      const bool came = wait_equal<relaxed, sys_scope>(flag, value, deadline);
      fence<acq_rel, gpu_scope>();
      return came;
    }
  }
}

/// Message passing: plain data, then a flag.
DEEPEP_KERNEL(mp_kernel, LitmusArgs, 32) {
  using namespace dev;
  if (thread() != 0) return;
  if (args.role == 0) {
    store(word_at(args, 0), 42u);
    publish(args.writer, word_at(args, 1), 1);
  } else if (await(args.reader, word_at(args, 1), 1, Deadline::in(args.timeout_ns))) {
    store(args.out, load(word_at(args, 0)));
  } else {
    store(args.out, 99u);
  }
}

/// Message passing where the data is an ordered word too: no race, but a stale value where nothing orders.
DEEPEP_KERNEL(mp_words_kernel, LitmusArgs, 32) {
  using namespace dev;
  if (thread() != 0) return;
  if (args.role == 0) {
    store<relaxed, sys_scope>(word_at(args, 0), 42u);
    publish(args.writer, word_at(args, 1), 1);
  } else if (await(args.reader, word_at(args, 1), 1, Deadline::in(args.timeout_ns))) {
    store(args.out, load<relaxed, sys_scope>(word_at(args, 0)));
  }
}

/// Store buffering: each writes its word, then reads the other's.
DEEPEP_KERNEL(sb_kernel, LitmusArgs, 32) {
  using namespace dev;
  if (thread() != 0) return;
  store<relaxed, sys_scope>(word_at(args, args.role), 1u);
  fence<acq_rel, sys_scope>();
  store(args.out, load<relaxed, sys_scope>(word_at(args, 1 - args.role)));
}

/// Coherence: one word counts up, a reader never sees it go back.
DEEPEP_KERNEL(coherence_kernel, LitmusArgs, 32) {
  using namespace dev;
  if (thread() != 0) return;
  for (uint32_t i = 0; i < 6; ++i) {
    if (args.role == 0)
      store<relaxed, sys_scope>(word_at(args, 0), i + 1);
    else
      store(args.out + i, load<relaxed, sys_scope>(word_at(args, 0)));
  }
}

/// Independent reads of independent writes: roles 0 and 1 write a word each, 2 and 3 read both, crosswise.
DEEPEP_KERNEL(iriw_kernel, LitmusArgs, 32) {
  using namespace dev;
  if (thread() != 0) return;
  if (args.role < 2) {
    store<relaxed, sys_scope>(word_at(args, args.role), 1u);
    return;
  }
  const int first = args.role - 2;
  store(args.out, load<acquire, sys_scope>(word_at(args, first)));
  store(args.out + 1, load<acquire, sys_scope>(word_at(args, 1 - first)));
}

/// Write to read causality over three ranks: 0 tells 1, 1 tells 2, 2 reads what 0 wrote.
DEEPEP_KERNEL(chain_kernel, LitmusArgs, 32) {
  using namespace dev;
  if (thread() != 0) return;
  const Deadline deadline = Deadline::in(args.timeout_ns);
  if (args.role == 0) {
    store(word_at(args, 0), 42u);
    publish(1, word_at(args, 1), 1);
  } else if (args.role == 1) {
    if (await(args.reader, word_at(args, 1), 1, deadline)) publish(args.writer, word_at(args, 2), 1);
  } else if (await(1, word_at(args, 2), 1, deadline)) {
    store(args.out, load(word_at(args, 0)));
  }
}

/// All threads of all blocks count; the last to come, as the counter says, reads what all wrote.
DEEPEP_KERNEL(counter_kernel, LitmusArgs, 64) {
  using namespace dev;
  const int me = block() * num_threads() + thread();
  const int all = num_blocks() * num_threads();
  uint32_t* mine = args.words + kFar;
  store(mine + me, static_cast<uint32_t>(me));
  const uint32_t before = args.writer == 0   ? fetch_add<relaxed, gpu_scope>(args.words, 1u)
                          : args.writer == 1 ? fetch_add<release, gpu_scope>(args.words, 1u)
                                             : fetch_add<acq_rel, gpu_scope>(args.words, 1u);
  if (before + 1 != static_cast<uint32_t>(all)) return;
  uint32_t sum = 0;
  for (int i = 0; i < all; ++i) sum += load(mine + i);
  store(args.out, sum);
}

/// A release sequence: role 1's relaxed atomic on role 0's released flag hands the release on to role 2.
DEEPEP_KERNEL(sequence_kernel, LitmusArgs, 32) {
  using namespace dev;
  if (thread() != 0) return;
  const Deadline deadline = Deadline::in(args.timeout_ns);
  if (args.role == 0) {
    store(args.words, 42u);
    fetch_add<release, gpu_scope>(args.words + kFar, 1u);
  } else if (args.role == 1) {
    if (!wait_reached<relaxed, gpu_scope>(args.words + kFar, 1, deadline)) return;
    if (args.writer == 1)
      fetch_add<relaxed, gpu_scope>(args.words + kFar, 1u);
    else
      store<relaxed, gpu_scope>(args.words + kFar, 2u);  // a plain overwrite ends the sequence
  } else if (wait_equal<acquire, gpu_scope>(args.words + kFar, 2, deadline)) {
    store(args.out, load(args.words));
  }
}

/// As sequence_kernel, with the three roles as blocks of one rank.
DEEPEP_KERNEL(sequence_blocks_kernel, LitmusArgs, 32) {
  LitmusArgs mine = args;
  mine.role = dev::block();
  sequence_kernel(mine);
}

/// Shared memory: each thread writes one word and reads its neighbour's, with what stands between them in
/// `writer`: 0 nothing, 1 the block's barrier, 2 the warp's, 3 a ballot.
DEEPEP_KERNEL(shared_kernel, LitmusArgs, 64) {
  using namespace dev;
  SharedArray<uint32_t> words(0);
  words.set(thread(), static_cast<uint32_t>(thread()));
  if (args.writer == 1) sync_block();
  if (args.writer == 2) sync_warp();
  if (args.writer == 3) (void)ballot(true);
  const int neighbour = (thread() + args.reader) % num_threads();
  store(args.out + thread(), words.get(neighbour));
}

/// A block writes, meets at its barrier, and one thread releases for all: the release is cumulative.
DEEPEP_KERNEL(block_release_kernel, LitmusArgs, 64) {
  using namespace dev;
  uint32_t* data = args.words + kFar;
  if (args.role == 0) {
    store(data + thread(), static_cast<uint32_t>(thread()));
    if (args.writer != 0) sync_block();
    if (thread() == 0) publish(1, args.words, 1);
    return;
  }
  bool came = true;
  if (thread() == 0) came = await(1, args.words, 1, Deadline::in(args.timeout_ns));
  if (args.reader != 0) sync_block();
  if (came) store(args.out + thread(), load(data + thread()));
}

/// What must fail at once, by `writer`.
DEEPEP_KERNEL(mistake_kernel, LitmusArgs, 64) {
  using namespace dev;
  SharedArray<uint32_t> shared(0);
  switch (args.writer) {
    case 0:  // a barrier only half of the block reaches
      if (thread() < 32) sync_block();
      break;
    case 1:  // a collective only half of the warp reaches
      if (lane() < 16) (void)ballot(true);
      break;
    case 2:  // two collectives at once
      if (lane() < 16)
        (void)ballot(true);
      else
        sync_warp();
      break;
    case 3:  // one barrier from two places
      if (thread() < 32)
        sync_block();
      else
        sync_block();
      break;
    case 4: store(args.out, shared.get(0)); break;   // shared memory never written
    case 5: shared.set(1 << 20, 1); break;           // past its end
    case 6: store(args.out + (1 << 16), 1u); break;  // past a buffer's end
    case 7: store(args.out - 1, 1u); break;          // before a buffer
    case 8: store(reinterpret_cast<uint64_t*>(args.out + 1), uint64_t{1}); break;  // misaligned
    case 9:  // read-only path, and written in the same kernel
      if (thread() == 0) {
        store(args.out, load_once(args.words));
        store(args.words, 1u);
      }
      break;
    case 10:  // the same the other way round
      if (thread() == 0) {
        store(args.words, 1u);
        store(args.out, load_once(args.words));
      }
      break;
    case 11:  // all threads write one word
      store(args.out, static_cast<uint32_t>(thread()));
      break;
    case 12:  // ordered and plain store side by side
      if (thread() == 0) store<release, gpu_scope>(args.words, 1u);
      if (thread() == 33) store(args.words, 2u);
      break;
    case 13:  // half of an ordered word
      if (thread() == 0) store<relaxed, gpu_scope>(reinterpret_cast<uint64_t*>(args.words), uint64_t{1});
      if (thread() == 33) store<relaxed, gpu_scope>(args.words + 1, 2u);
      break;
    case 14:  // a guess, of what the same kernel writes
      if (thread() == 0) {
        store(args.words, 1u);
        store(args.out, load_guess(args.words));
      }
      break;
    default: break;
  }
}

/// Waits for what may never come. Role 0 raises the flag to `writer`, then beyond it if `reader` says so.
DEEPEP_KERNEL(wait_kernel, LitmusArgs, 32) {
  using namespace dev;
  if (thread() != 0) return;
  if (args.role == 0) {
    for (int i = 1; i <= args.writer + args.reader; ++i)
      store<release, sys_scope>(word_at(args, 0), static_cast<uint32_t>(i));
    return;
  }
  const bool came = wait_equal<acquire, sys_scope>(word_at(args, 0), 1, Deadline::in(args.timeout_ns));
  store(args.out, came ? 1u : 2u);
}

/// A hand-made spin, without a wait: must neither hang the scheduler nor outlive its deadline.
DEEPEP_KERNEL(spin_kernel, LitmusArgs, 32) {
  using namespace dev;
  if (thread() != 0) return;
  if (args.role == 0) {
    store<release, sys_scope>(word_at(args, 0), 1u);
    return;
  }
  const Deadline deadline = Deadline::in(args.timeout_ns);
  while (load<acquire, sys_scope>(word_at(args, args.reader)) == 0)
    if (deadline.passed()) break;
  store(args.out, load<relaxed, sys_scope>(word_at(args, args.reader)) + 1);
}

/// Role 1: one warp waits for what may never come, the other looks at the block's memory until that has ended.
DEEPEP_KERNEL(watching_kernel, LitmusArgs, 64) {
  using namespace dev;
  if (args.role == 0) {
    if (thread() == 0) store<release, sys_scope>(word_at(args, 0), 1u);
    return;
  }
  SharedArray<uint32_t> ended(0);
  if (thread() == 0) ended.set(0, 0);
  sync_block();
  if (thread() == 0) {
    const bool came = wait_equal<acquire, sys_scope>(word_at(args, 0), 1, Deadline::in(args.timeout_ns));
    ended.set<release>(0, came ? 1u : 2u);
  } else if (warp() == 1 && lane() == 0) {
    uint32_t seen = 0;
    while ((seen = ended.get<acquire>(0)) == 0) pause();
    store(args.out, seen);
  }
}

/// Bytes: neighbours in one word, each by its own thread, are no race.
DEEPEP_KERNEL(bytes_kernel, LitmusArgs, 64) {
  using namespace dev;
  auto* bytes = reinterpret_cast<uint8_t*>(args.words);
  store(bytes + thread(), static_cast<uint8_t>(thread()));
  sync_block();
  if (thread() < 16) store(args.out + thread(), load(args.words + thread()));
}

}  // namespace deepep::litmus
