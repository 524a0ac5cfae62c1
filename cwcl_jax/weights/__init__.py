"""Files of weights: readers, and rules that map their names to a tower's leaves.

Nothing here depends on an encoder. The layout of one family's files is defined in its own module.
"""
