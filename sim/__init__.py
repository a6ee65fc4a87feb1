"""The simulator: worlds of ranks, routing strategies, faults, properties."""
