"""Products with weights: the kernels there are, and what of the weights is in memory."""
