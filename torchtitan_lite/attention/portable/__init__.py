"""Attention on any machine: the mask as tiles (rectangles of queries and keys), and kernels for a tile."""
