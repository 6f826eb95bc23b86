"""The text of a run: samples to train on, and held-out samples to validate on."""

from dataclasses import dataclass

from torchtitan_lite.config.job import JobConfig
from torchtitan_lite.data import Samples, Shards, Tokenizer, load_tokenizer, prepare
from torchtitan_lite.launch.world import World


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """The tokenizer and the samples of a run."""

    tokenizer: Tokenizer
    shards: Shards
    samples: Samples
    """The samples to train on."""
    held_out: Samples | None
    """The samples to validate on; None in a run without validation."""


def load_corpus(job: JobConfig, world: World, shards: Shards | None = None) -> Corpus:
    """Load the text that the config names, or use `shards` if given. Text is tokenized unless it is cached.

    Raises ConfigError if the text cannot be used.
    """
    tokenizer = load_tokenizer(job.data.tokenizer, job.tokenizers)
    shards = shards or world.in_turn(lambda: prepare(job.data, tokenizer))
    seq_len = job.training.seq_len
    return Corpus(
        tokenizer=tokenizer,
        shards=shards,
        samples=Samples(shards.train, seq_len),
        held_out=Samples(shards.validation, seq_len) if job.validation.enable else None,
    )
