"""``normwise inspect``: a model's invariances and the plan that follows, in a terminal and as a page."""
