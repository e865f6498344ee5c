"""Decay rules as functions of the norm, and the step hook that applies them."""
