"""The one way in which the reference refuses an input, and an argument that both its forms have."""

from __future__ import annotations

from typing import Literal, get_args


def require(holds: bool, message: str) -> None:
    """Raise ValueError with `message` ("argument: got ...; allowed: ...") unless `holds`."""
    if not holds:
        raise ValueError(message)


Reduce = Literal["rank", "token", "domain"]
"""Where a low-latency combine sums: `low_latency.combine` says what each is."""


def check_reduce(reduce: str, ranks_per_domain: int, logfmt: bool) -> None:
    """Raises ValueError for a sum that there is not."""
    require(reduce in get_args(Reduce), f'reduce: got {reduce!r}; allowed: "rank", "token", "domain"')
    if reduce == "domain":
        require(ranks_per_domain >= 1, f"ranks_per_domain: got {ranks_per_domain}; allowed: 1 or more")
        require(not logfmt, 'logfmt: got True; allowed: False with reduce="domain"')
