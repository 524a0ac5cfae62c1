"""Measurements: `python -m cwcl_jax.benchmarks.loss`, `.step` and `.input`."""
