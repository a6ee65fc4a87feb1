"""Benchmark of the MoE layer, against plain torch and its matrix products alone."""
