"""What a run needs and how long it takes, before there is any device: see `cwcl_jax.plan`."""
