"""Evaluation tasks, one file per kind or family of kinds; `base.KINDS` is their table."""
