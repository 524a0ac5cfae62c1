"""Files of weights: readers, and the rules that map their names to a tower's leaves.

Nothing here knows an encoder. What the files of one family look like stands beside its module.
"""
