"""Timelines: what each rank did when, in a training step and in a decode step; recorded, and drawn."""
