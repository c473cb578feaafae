"""Specifications: what a file claims of its system, checked; above configurations and results."""
