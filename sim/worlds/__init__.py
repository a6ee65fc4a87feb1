"""Rank processes and rank threads that run functions, and how each rank ended."""
