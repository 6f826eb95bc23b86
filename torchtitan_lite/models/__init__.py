"""Decoders: one architecture (`decoder`), preset tables per family, and the loss."""
