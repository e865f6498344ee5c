"""The kinds of run: settings, and what each run computes."""
