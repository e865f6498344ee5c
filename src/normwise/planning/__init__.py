"""From invariances to decay: what to do with each parameter, and what a set-up really does."""
