"""Encoders and towers of every modality, as Flax NNX modules without any sharding."""
