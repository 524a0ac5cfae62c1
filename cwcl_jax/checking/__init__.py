"""Measurements of `python -m cwcl_jax.check`, by subject; each yields findings with a verdict."""
