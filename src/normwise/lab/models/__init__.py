"""Networks of the claims."""
