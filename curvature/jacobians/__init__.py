"""The Jacobian of a parameter, kept factored, and its algebra."""
