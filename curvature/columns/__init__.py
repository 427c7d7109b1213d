"""Which curvature: the columns that are sent back, and the random numbers some of them need."""
