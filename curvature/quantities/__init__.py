"""Which structure is kept of the sum over the data, and the results."""
