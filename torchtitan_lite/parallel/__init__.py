"""Parallelism, recompute and compile, applied from outside to the finished single-device model."""
