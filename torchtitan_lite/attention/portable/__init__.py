"""Attention on any machine: the mask as tiles (rectangles of queries and keys), and kernels for a tile."""

from torchtitan_lite.attention.operator import EVALUATORS
from torchtitan_lite.attention.portable.evaluate import TileEvaluator
from torchtitan_lite.attention.portable.kernels import has_cuda_flash
from torchtitan_lite.attention.portable.tiles import document_tiles

EVALUATORS["tiles"] = TileEvaluator()

__all__ = ["document_tiles", "has_cuda_flash"]
