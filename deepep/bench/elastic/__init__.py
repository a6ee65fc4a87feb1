"""Benchmark of ElasticBuffer: rows by expert, with and without a host that waits."""
