"""The rule for messages of gradients: the extension's bytes, and what it reads of them, are the oracle's."""

from __future__ import annotations

import numpy as np

from deepep.collectives.codecs import LOSSY, Messages, rounding_key
from deepep.reference import gradient_codec
from deepep.sim.cases.gradients import KINDS, draw_gradient
from deepep.sim.rules.reductions import same_numbers

CHUNK = 2000  # blocks


def differing_messages(num_blocks: int, seed: int = 0) -> list[str]:
    """Encodes and decodes drawn blocks of all kinds in every format and rounding; what differs, in words."""
    found = []
    for number, first in enumerate(range(0, num_blocks, CHUNK)):
        rng, kind = np.random.default_rng([seed, number]), KINDS[number % len(KINDS)]
        count = 128 * min(CHUNK, num_blocks - first) - int(rng.integers(128))
        values = draw_gradient(rng, count, kind)
        form = LOSSY[number // len(KINDS) % len(LOSSY)]
        for key in (None, rounding_key(seed, number)):
            messages = Messages(form, key=key)
            message = messages.encode(values, first)
            if not message.equal(gradient_codec.encode(form, values, key, first)):
                found.append(f"{form}, {kind}, chunk {number}: encoded, key {key}")
            into = values.clone()
            messages.decode(message, into)
            if not same_numbers(into, gradient_codec.decode(form, message, count)):
                found.append(f"{form}, {kind}, chunk {number}: decoded")
    return found
