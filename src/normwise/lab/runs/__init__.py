"""The runs of the claims: settings, and the code that executes them."""
