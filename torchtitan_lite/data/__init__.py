"""The pipeline from text to batches of token ids: each stage, with its module below.

files -> documents -> pieces --tokenizer--> shards on disk -> samples of fixed length -> batches in order
files    sources      heldout  tokenizer    shards            batch                      order, loader
"""

from torchtitan_lite.data.batch import IGNORE, Batch, Samples
from torchtitan_lite.data.datasets import DataConfig, Jsonl, PythonStdlib, Text
from torchtitan_lite.data.loader import Loader, in_order
from torchtitan_lite.data.shards import Shards, Split, prepare
from torchtitan_lite.data.sources import Document, Source, Texts
from torchtitan_lite.data.tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "IGNORE",
    "Batch",
    "DataConfig",
    "Document",
    "Jsonl",
    "Loader",
    "PythonStdlib",
    "Samples",
    "Shards",
    "Source",
    "Split",
    "Text",
    "Texts",
    "Tokenizer",
    "in_order",
    "load_tokenizer",
    "prepare",
]
