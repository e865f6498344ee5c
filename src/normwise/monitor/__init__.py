"""What training does to the norms, effective learning rates and directions of weights."""
