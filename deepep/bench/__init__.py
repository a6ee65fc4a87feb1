"""Measuring: operation-complete times of dispatch and combine, next to what the links allow and to others.

`python -m deepep bench` (deepep.cli.bench) runs it; docs/performance.md says how the figures are to be read.

    sweep       what is to be measured            workload    routing, rows, and the bytes they make
    clock       how a call is timed               floor       the best that a plain copy can do
    operations  the calls of a Buffer             collective  the same by all_to_all_single
    oracle      what they have to return          rank        all of it, on one rank
    figures     what comes out                    table, plot how it is shown
    exchange    the least that a low-latency operation can take
    low_latency all of it for low latency

Shapes: R ranks, E experts, K top-k, T tokens on a rank, H hidden size, N rows received, P scales per row.
"""
