"""Synthetic data: pictures, captions, sentences and voices, all functions of integers."""
