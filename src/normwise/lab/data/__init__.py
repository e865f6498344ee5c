"""Data sets and texts of the claims."""
