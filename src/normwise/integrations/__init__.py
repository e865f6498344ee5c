"""Decay in trainers: Lightning, transformers, Accelerate. Nothing is imported here: each needs its library."""
