"""Attention on any machine: the mask is cut into tiles, rectangles of queries and keys for plain kernels."""
