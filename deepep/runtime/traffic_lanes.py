"""Traffic lanes: service level and traffic class of what a buffer's ranks send between scale-up domains."""

from __future__ import annotations

from dataclasses import dataclass

from deepep.errors import RangeError
from deepep.runtime.checks import check_int

VARIABLES = {"service_level": "NVSHMEM_IB_SL", "traffic_class": "NVSHMEM_IB_TRAFFIC_CLASS"}
"""By argument, the variable from which NVSHMEM takes it when it starts (docs/operations.md)."""
_MOST = {"service_level": 15, "traffic_class": 255}


@dataclass(frozen=True)
class TrafficLanes:
    """service_level: of InfiniBand, 0 to 15; over RoCE the Ethernet priority as well. traffic_class: of RoCE,
    0 to 255, the DSCP times 4. None leaves it to the environment, else to NVSHMEM, which takes 0.
    if_any: they are set where a backend has lanes, and mean nothing where none crosses a NIC.
    """

    service_level: int | None = None
    traffic_class: int | None = None
    if_any: bool = False

    @classmethod
    def of(cls, service_level: object, traffic_class: object) -> TrafficLanes:
        """Lanes from a constructor's arguments. Raises ArgumentTypeError and RangeError."""
        given = {"service_level": service_level, "traffic_class": traffic_class}
        found = {n: check_int(n, v, 0, _MOST[n]) for n, v in given.items() if v is not None}
        return cls(found.get("service_level"), found.get("traffic_class"))

    def asked(self) -> dict[str, int]:
        """Values that were asked for, by argument."""
        given = {"service_level": self.service_level, "traffic_class": self.traffic_class}
        return {name: value for name, value in given.items() if value is not None}

    def environment(self) -> dict[str, str]:
        """The same as variables for NVSHMEM, to be set before it starts."""
        return {VARIABLES[name]: str(value) for name, value in self.asked().items()}

    def statement(self) -> dict[str, int]:
        """For the ranks to compare: -1 stands for none."""
        return {name: self.asked().get(name, -1) for name in VARIABLES}

    def refusal(self, why: str) -> RangeError:
        """The error for lanes that cannot be set, and why not."""
        name, value = next(iter(self.asked().items()))
        return RangeError(name, str(value), f"None: {why}")
