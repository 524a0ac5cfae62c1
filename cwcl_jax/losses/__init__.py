"""Contrastive losses on arrays: the equations, their tiled form, and their form on a mesh."""
