"""Measuring of low latency: dispatch, combine, their halves and pairs in a graph, as a curve over T.

`python -m deepep bench --mode low-latency` runs it.

    calls        the calls of a Buffer           oracle   what they have to return
    graph        calls in a CUDA graph           kernels  time of a call's kernels, by torch's profiler
    rank         all of it, on one rank          table    how it is shown

Floors: deepep.bench.exchange, and deepep.bench.floor, a copy without a signal.
"""
