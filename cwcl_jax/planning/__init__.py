"""Estimates what a run needs and how long it takes, without any device: see `cwcl_jax.plan`."""
