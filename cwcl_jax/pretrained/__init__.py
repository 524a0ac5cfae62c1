"""Import of foreign checkpoints: readers of files and rules that map their names."""
