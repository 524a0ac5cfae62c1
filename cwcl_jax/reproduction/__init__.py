"""Reproduces the paper's tables and figures with small runs: see `cwcl_jax.reproduce`."""
