"""Decay in trainers: Lightning, transformers and Accelerate. Each module needs its library."""
