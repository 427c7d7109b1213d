"""ViViT: the spectrum of one mini-batch's curvature, and what is seen along its eigenvectors.

The folder is not called `vivit`, since the function of that name is in the package above.
"""
