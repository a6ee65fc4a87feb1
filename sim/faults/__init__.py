"""Faults that befall one rank of a run of Buffer, and the judge of what follows."""
