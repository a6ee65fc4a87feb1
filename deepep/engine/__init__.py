"""Engines: what carries out the operations behind a facade. See deepep.engine.interface."""
