"""CWCL in JAX: align a trained tower with a locked one, in proportion to its similarities."""
