// Litmus kernels of puts to other nodes. `writer` picks the variant: 0 is right, each other one lacks or
// replaces one thing, as the kernel's list says. tests/emulator/test_litmus_put.py holds what must come of it.
#pragma once

#include "emulator/litmus/bulk.hpp"

namespace deepep::litmus {

// Words of every rank: what is sent, where it arrives (two slots), and signals.
inline constexpr int kSent = 0;
inline constexpr int kSlot = 64;
inline constexpr int kPutBytes = 64;
inline constexpr int kPutWords = kPutBytes / 4;

[[nodiscard]] inline uint64_t* signal_word(const LitmusArgs& args, int i) {
  return reinterpret_cast<uint64_t*>(args.words + 512 + 32 * i);
}
inline void fill(uint32_t* words, uint32_t value) {
  for (int i = 0; i < kPutWords; ++i) dev::store(words + i, value + static_cast<uint32_t>(i));
}

/// Rank 0 sends to rank 1 on the other node, which waits for the signal and reads.
/// 1 a relaxed wait, 2 a relaxed wait and a fence (right, too), 3 a relaxed wait and a fence too narrow, 4 no
/// wait, 5 the data by a put of its own in front, 6 the same and a fence between (right), 7 the same and a
/// quiet (right), 8 the fence behind both, 9 a fence on the way to another rank's thread: stored by pointer,
/// which does not reach; 10 the signal is added (right, also where one that is set is weak)
DEEPEP_KERNEL(put_signal_kernel, LitmusArgs, 32) {
  using namespace dev;
  if (thread() != 0) return;
  uint32_t* slot = args.words + kSlot;
  if (args.role == 0) {
    fill(args.words + kSent, 40);
    if (args.writer == 9) store(args.neighbour + kSlot, 1u);
    if (args.writer == 10) {
      put_signal<signal_add>(Wire{}, slot, args.words + kSent, kPutBytes, signal_word(args, 0), 1, 1);
    } else if (args.writer < 5) {
      put_signal<signal_set>(Wire{}, slot, args.words + kSent, kPutBytes, signal_word(args, 0), 1, 1);
    } else {
      put(slot, args.words + kSent, kPutBytes, 1);
      if (args.writer == 6) put_fence();
      if (args.writer == 7) put_quiet();
      signal<signal_set>(Wire{}, signal_word(args, 0), 1, 1);
      if (args.writer == 8) put_fence();
    }
    return;
  }
  const Deadline deadline = Deadline::in(args.timeout_ns);
  bool came = true;
  if (args.writer >= 1 && args.writer <= 3)
    came = wait_signal<relaxed, sys_scope>(signal_word(args, 0), 1, deadline);
  else if (args.writer != 4)
    came = wait_signal<acquire, sys_scope>(signal_word(args, 0), 1, deadline);
  if (args.writer == 2) fence<acq_rel, sys_scope>();
  if (args.writer == 3) fence<acq_rel, gpu_scope>();
  if (came) store(args.out, load(slot + 2));
}

/// Rank 0 sends twice from one place. 0 a quiet between, 1 nothing, 2 a fence: it orders, and completes nothing
DEEPEP_KERNEL(put_source_kernel, LitmusArgs, 32) {
  using namespace dev;
  if (thread() != 0) return;
  if (args.role == 0) {
    for (uint32_t round = 0; round < 2; ++round) {
      fill(args.words + kSent, 100 * round);
      put_signal<signal_set>(Wire{}, args.words + kSlot + 64 * round, args.words + kSent, kPutBytes,
                             signal_word(args, 0), round + 1, 1);
      if (args.writer == 0) put_quiet();
      if (args.writer == 2) put_fence();
    }
    return;
  }
  if (wait_signal<acquire, sys_scope>(signal_word(args, 0), 2, Deadline::in(args.timeout_ns)))
    store(args.out, load(args.words + kSlot + 3) + load(args.words + kSlot + 64 + 3));
}

/// Rank 1 reads its slot and says so, rank 0 sends to it again.
/// 0 a fence of the system before rank 1 says so, 1 none: a signal carries nothing but its put, 2 one too
/// narrow
DEEPEP_KERNEL(put_again_kernel, LitmusArgs, 32) {
  using namespace dev;
  if (thread() != 0) return;
  const Deadline deadline = Deadline::in(args.timeout_ns);
  if (args.role == 0) {
    for (uint32_t round = 0; round < 3; ++round) {
      fill(args.words + kSent + 16 * round, 100 * round);
      if (round > 0 && !wait_signal<acquire, sys_scope>(signal_word(args, 1), round, deadline)) return;
      put_signal<signal_set>(Wire{}, args.words + kSlot, args.words + kSent + 16 * round, kPutBytes,
                             signal_word(args, 0), round + 1, 1);
    }
    return;
  }
  uint32_t sum = 0;
  for (uint32_t round = 0; round < 3; ++round) {
    if (!wait_signal<acquire, sys_scope>(signal_word(args, 0), round + 1, deadline)) return;
    sum += load(args.words + kSlot + 1);
    if (args.writer == 0) fence<acq_rel, sys_scope>();
    if (args.writer == 2) fence<acq_rel, gpu_scope>();
    signal<signal_set>(Wire{}, signal_word(args, 1), round + 1, 0);
  }
  store(args.out, sum);
}

/// Two nodes of two: rank 0 sends to rank 2, which stores what came to its neighbour 3 over NVLink.
/// 1 a relaxed flag, 2 a relaxed wait for the signal, 3 rank 3 reads rank 2's memory for the NIC itself
DEEPEP_KERNEL(put_relay_kernel, LitmusArgs, 32) {
  using namespace dev;
  if (thread() != 0) return;
  const Deadline deadline = Deadline::in(args.timeout_ns);
  constexpr int kFlag = 900;
  if (args.role == 0) {
    fill(args.words + kSent, 40);
    put_signal<signal_add>(Wire{}, args.words + kSlot, args.words + kSent, kPutBytes, signal_word(args, 0), 1,
                           2);
  } else if (args.role == 2) {
    const bool came = args.writer == 2 ? wait_signal<relaxed, sys_scope>(signal_word(args, 0), 1, deadline)
                                       : wait_signal<acquire, sys_scope>(signal_word(args, 0), 1, deadline);
    if (!came) return;
    for (int i = 0; i < kPutWords; ++i) store(args.neighbour + kSlot + i, load(args.words + kSlot + i));
    if (args.writer == 1)
      store<relaxed, sys_scope>(args.neighbour + kFlag, 1u);
    else
      store<release, sys_scope>(args.neighbour + kFlag, 1u);
  } else if (args.role == 3) {
    if (!wait_equal<acquire, sys_scope>(args.links + kFlag, 1, deadline)) return;
    store(args.out, load((args.writer == 3 ? args.far : args.links) + kSlot + 2));
  }
}

/// Rank 0 sends `reader` times to rank 1 and waits for nothing: so many puts may be open.
DEEPEP_KERNEL(put_open_kernel, LitmusArgs, 32) {
  using namespace dev;
  if (thread() != 0) return;
  if (args.role == 0) {
    fill(args.words + kSent, 40);
    for (int i = 0; i < args.reader; ++i)
      put_signal<signal_add>(Wire{}, args.words + kSlot + 16 * i, args.words + kSent, kPutBytes,
                             signal_word(args, 0), 1, 1);
  } else if (wait_signal<acquire, sys_scope>(signal_word(args, 0), static_cast<uint32_t>(args.reader),
                                             Deadline::in(args.timeout_ns))) {
    store(args.out, load(args.words + kSlot + 16 * (args.reader - 1)));
  }
}

/// Ranks 0 and 1 add to one signal of rank 2, which waits for both.
/// 1 each sets it: the later overwrites the other's
DEEPEP_KERNEL(put_count_kernel, LitmusArgs, 32) {
  using namespace dev;
  if (thread() != 0) return;
  if (args.role < 2) {
    fill(args.words + kSent, 40);
    uint32_t* to = args.words + kSlot + 64 * args.role;
    if (args.writer == 0)
      put_signal<signal_add>(Wire{}, to, args.words + kSent, kPutBytes, signal_word(args, 0), 1, 2);
    else
      put_signal<signal_set>(Wire{}, to, args.words + kSent, kPutBytes, signal_word(args, 0), 2, 2);
  } else if (wait_signal<acquire, sys_scope>(signal_word(args, 0), 2, Deadline::in(args.timeout_ns))) {
    store(args.out, load(args.words + kSlot) + load(args.words + kSlot + 64));
  }
}

/// Rank 1 copies what came on in bulk. 0 a proxy fence behind the signal, 1 none
DEEPEP_KERNEL(put_then_bulk_kernel, LitmusArgs, 32) {
  using namespace dev;
  if (thread() != 0) return;
  const Deadline deadline = Deadline::in(args.timeout_ns);
  if (args.role == 0) {
    fill(args.words + kSent, 40);
    put_signal<signal_set>(Wire{}, args.words + kSlot, args.words + kSent, kPutBytes, signal_word(args, 0), 1,
                           1);
    return;
  }
  mbarrier_init(barrier(0), 1);
  fence_async<shared_space>();
  if (!wait_signal<acquire, sys_scope>(signal_word(args, 0), 1, deadline)) return;
  if (args.writer == 0) fence_async<global_space>();
  mbarrier_expect<release, block_scope>(barrier(0), kPutBytes);
  bulk_load(stage(0).at(0), args.words + kSlot, kPutBytes, barrier(0));
  if (mbarrier_wait<acquire, block_scope>(barrier(0), 0, deadline)) store(args.out, stage(0).get(2));
}

/// Two kernels of rank 0: the first sends, the second tells rank 1 that it may clean its slot.
/// 0 a quiet at the end of the first, 1 the published bug: none, and the end of a kernel completes no put; 2 a
/// fence
DEEPEP_KERNEL(put_cleaning_kernel, LitmusArgs, 32) {
  using namespace dev;
  if (thread() != 0) return;
  if (args.role == 0) {
    if (load(args.out) == 0) {
      fill(args.words + kSent, 40);
      put(args.words + kSlot, args.words + kSent, kPutBytes, 1);
      if (args.writer == 0) put_quiet();
      if (args.writer == 2) put_fence();
      store(args.out, 1u);
    } else {
      fence<acq_rel, sys_scope>();
      signal<signal_set>(Wire{}, signal_word(args, 0), 1, 1);
    }
    return;
  }
  if (!wait_signal<acquire, sys_scope>(signal_word(args, 0), 1, Deadline::in(args.timeout_ns))) return;
  fill(args.words + kSlot, 0);
  store(args.out, load(args.words + kSlot + 2) + 1);
}

/// Warp 0 sends, warp 1 completes: 0 behind the block's barrier, 1 without knowing of it
DEEPEP_KERNEL(put_quiet_kernel, LitmusArgs, 64) {
  using namespace dev;
  if (args.role != 0) return;
  if (thread() == 0) {
    fill(args.words + kSent, 40);
    put(args.words + kSlot, args.words + kSent, kPutBytes, 1);
  }
  if (args.writer == 0) sync_block();
  if (thread() == 32) put_quiet();
  if (args.writer == 1) sync_block();
  if (thread() == 32) store(args.words + kSent, 1u);
}

/// What must fail at once, by `writer`.
DEEPEP_KERNEL(put_mistake_kernel, LitmusArgs, 32) {
  using namespace dev;
  if (thread() != 0 || args.role != 0) return;
  stage(0).set(0, 1u);
  uint32_t* sent = args.words + kSent;
  uint32_t* slot = args.words + kSlot;
  switch (args.writer) {
    case 0: store(args.neighbour, 1u); break;                       // the other node, by pointer
    case 1: (void)load<acquire, sys_scope>(args.neighbour); break;  // the same
    case 2: put(args.far, sent, 16, 1); break;                      // to a pointer of the other's
    case 3: put(slot, stage(0).at(0), 4, 1); break;                 // from shared memory
    case 4: put(args.out, sent, 16, 1); break;                      // to memory that is not symmetric
    case 5: put(args.words + 1020, sent, 64, 1); break;             // past the end
    case 6: put(slot, sent, 16, 7); break;                          // to nobody
    case 7:
      put_signal<signal_set>(Wire{}, slot, sent, 16, signal_word(args, 0) + 260, 1, 1);
      break;                                       // a signal past the end
    case 8: store(args.far, 1u); break;            // the other's memory for its NIC, by pointer
    case 9: put(slot, args.links, 16, 1); break;   // from memory that no NIC knows
    case 10: put(args.links, sent, 16, 1); break;  // to such memory
    case 11: put_signal<signal_add>(Wire{}, slot, sent, 0, signal_word(args, 0), 1, 1); break;  // nothing
    default: break;
  }
}

}  // namespace deepep::litmus
