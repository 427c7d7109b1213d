"""Symmetric matrices over the weights, in whatever form is small."""
