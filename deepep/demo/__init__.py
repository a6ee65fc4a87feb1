"""The demo: a byte-level MoE language model on the standard library's sources, one process per rank."""
