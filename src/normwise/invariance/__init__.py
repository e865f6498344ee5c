"""Which weights of a network are scale-invariant."""
