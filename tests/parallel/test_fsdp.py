"""FSDP gathers a block's weights before the compute that hides the exchange."""

import exchange_cases as cases
from ranks import RanksOf


def test_the_next_blocks_weights_are_asked_for_before_a_block_is_computed(ranks: RanksOf) -> None:
    """On the host's side: what a GPU makes of it is up to its streams."""
    for forward, backward in ranks(2).run(cases.gathers_of_a_step, 4):
        # First the group of embedding, norm and head, which is kept, and the first block.
        assert forward == ["gather", "gather", "gather", 0, "gather", 1, "gather", 2, 3]
        assert backward == ["gather", "gather", 3, "gather", 2, "gather", 1, 0]
