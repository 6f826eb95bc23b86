"""FSDP gathers a block's weights before the compute that hides the exchange."""

import exchange_cases as cases
from ranks import RanksOf


def test_the_next_blocks_weights_are_gathered_before_a_block_is_computed(ranks: RanksOf) -> None:
    """The order in which the host issues them; a GPU's streams may run them in another order."""
    for forward, backward in ranks(2).run(cases.gathers_of_a_step, 4):
        # The group of embedding, norm and head comes first, then two blocks.
        assert forward == ["gather", "gather", "gather", 0, "gather", 1, "gather", 2, 3]
        assert backward == ["gather", "gather", 3, "gather", 2, "gather", 1, 0]
