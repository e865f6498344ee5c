"""Execution of runs, here or on a cluster, and the folder of their results."""
