"""The text of a run, as samples: those to train on and those that are held out."""

from dataclasses import dataclass

from torchtitan_lite.config.job import JobConfig
from torchtitan_lite.data import Samples, Shards, Tokenizer, load_tokenizer, prepare
from torchtitan_lite.launch.world import World


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """What a run reads."""

    tokenizer: Tokenizer
    shards: Shards
    samples: Samples
    """To train on."""
    held_out: Samples | None
    """To validate on; None in a run without validation."""


def load_corpus(job: JobConfig, world: World, shards: Shards | None = None) -> Corpus:
    """The text that the config names, prepared where it is not yet, or `shards` instead of it.

    Raises ConfigError when it cannot be used.
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
