"""The paper's tables and figures from runs at the scale at hand: see `cwcl_jax.reproduce`."""
