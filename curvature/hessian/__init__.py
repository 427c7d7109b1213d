"""Hessian backpropagation through sequential networks, and the exact diagonal of the Hessian."""
