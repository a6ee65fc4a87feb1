"""The oracle: what dispatch and combine must give, in plain PyTorch, in two forms that share no routing code.

- the global view, from all ranks' inputs to all ranks' outputs: `layout`, `high_throughput`, `low_latency`,
  `elastic`;
- a runnable implementation over torch.distributed's all_to_all, for gloo and NCCL groups: `wire` and, on it,
  `all_to_all` and `all_to_all_low_latency`.

What both use is number formats (`formats`, `logfmt`), rounding (`numerics`) and bytes (`records`).
"""
