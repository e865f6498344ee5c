"""What carries out runs and keeps their results."""
