"""The weight-normalisation family: maps from a weight W to a W′ that is free of the scale of W."""
