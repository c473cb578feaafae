"""SPAK-JAX: looped transformers that add numbers, trained, scored and drawn in JAX.

The programs are `python -m spak_jax.train`, `.evaluate`, `.solve`, `.figures` and `.convert`.
"""
