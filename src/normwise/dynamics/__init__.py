"""Theory and monitoring of what training does to norms and directions."""
