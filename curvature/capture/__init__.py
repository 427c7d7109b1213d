"""One forward pass, its tape read and checked, and the backward pass of the columns."""
