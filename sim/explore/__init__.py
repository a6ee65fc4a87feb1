"""The kernels' source on the CPU under many schedules, mutants of it, and litmus programs."""
