"""Promises of the interface as checks of what the ranks got, and the oracle's results."""
