"""Measurements of `python -m cwcl_jax.check`, by subject; each gives findings with a verdict."""
