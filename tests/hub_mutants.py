"""Bugs in Hugging Face exchange and in generation that the tests must notice, for test_mutants.py."""

from mutant import Mutant

NAMES = "torchtitan_lite/models/huggingface.py"
WEIGHTS = "torchtitan_lite/checkpoint/weights.py"
HUB = "torchtitan_lite/training/hub.py"
GENERATE = "torchtitan_lite/inference/generate.py"
PARITY = "tests/models/test_huggingface.py"
FILES = "tests/checkpoint/test_weights.py"
EXCHANGE = "tests/training/test_hub.py"
TEXT = "tests/inference/test_generate.py"
CACHE = f"{TEXT}::test_logits_with_the_cache_equal_those_of_the_whole_forward[7-sdpa]"
GATE, UP, SPLIT = ('"ffn.w1", "mlp.gate_proj"', '"ffn.w3", "mlp.up_proj"', 'shard_dim=0, split_by="ffn_dim"')

MUTANTS = {
    "hub: gate and up change places": Mutant(
        "torchtitan_lite/models/decoder.py",
        f"{GATE}, {SPLIT}),\n        _in_block({UP}",
        f"{GATE.replace('gate', 'up')}, {SPLIT}),\n        _in_block({UP.replace('up_', 'gate_')}",
        f"{PARITY}::test_logits_are_theirs_beyond_the_original_context",
    ),
    "hub: a scaling of the rotary base is ignored": Mutant(
        NAMES,
        'if kind == "default":',
        "if True:",
        f"{PARITY}::test_a_written_config_json_is_read_as_the_same_config[llama3, 3.1 scaling]",
    ),
    "hub: an activation that is not computed here is accepted": Mutant(
        NAMES,
        '"hidden_act": ("silu", None),',
        '"hidden_act": ("silu", "gelu", None),',
        f"{PARITY}::test_a_config_that_this_decoder_does_not_compute_is_refused_by_key",
    ),
    "hub: an index names a file outside of the folder": Mutant(
        WEIGHTS,
        "os.path.basename(file) != file or ",
        "",
        f"{FILES}::test_a_broken_or_hostile_folder_is_one_line",
    ),
    "hub: a dtype that loses bits is read": Mutant(
        WEIGHTS,
        "EXACT = (torch.float32,",
        "EXACT = (torch.int8, torch.float64, torch.float32,",
        f"{FILES}::test_a_dtype_that_would_lose_bits_or_is_none_of_weights_is_refused",
    ),
    "hub: tensors that belong to no weight are ignored": Mutant(
        "torchtitan_lite/checkpoint/tensors.py",
        "for name in index if name not in pieces]",
        "for name in index if False]",
        "tests/checkpoint/test_tensors.py::test_what_differs_is_told_in_a_line_each",
    ),
    "hub: the index is not compared with the files": Mutant(
        WEIGHTS,
        "if has_index and listed != found:",
        "if False:",
        f"{FILES}::test_a_broken_or_hostile_folder_is_one_line",
    ),
    "hub: a folder that failed stays": Mutant(
        "torchtitan_lite/durable.py",
        "        shutil.rmtree(scratch, ignore_errors=True)\n",
        "",
        "tests/test_durable.py::test_a_new_folder_that_fails_leaves_nothing",
    ),
    "hub: the whole model is read before it is placed": Mutant(
        HUB,
        "        read_tensors(folder, own, _index_for(own, folder, config))\n",
        "        copies = {name: _whole(piece.shape) for name, piece in own.items()}\n"
        "        read_tensors(folder, copies, _index_for(own, folder, config))\n"
        "        for name, copy in copies.items():\n"
        "            own[name].local.copy_(copy.local)\n",
        f"{EXCHANGE}::test_loading_holds_no_second_copy_of_the_model",
    ),
    "hub: an untied head is taken for a tied one": Mutant(
        HUB,
        "if is_twice and",
        "if False and",
        f"{EXCHANGE}::test_a_tied_head_that_is_stored_twice_must_be_the_same",
    ),
    "hub: the export of an earlier step stays": Mutant(
        HUB,
        "if json.loads((folder / SOURCE).read_bytes()) == source:",
        "if True:",
        f"{EXCHANGE}::test_the_export_is_always_of_the_last_step_of_the_run",
    ),
    "hub: weights are used with another tokenizer": Mutant(
        "torchtitan_lite/training/record.py",
        "if theirs is None or theirs == own:",
        "if True:",
        f"{EXCHANGE}::test_a_model_is_refused_with_another_tokenizer",
    ),
    "hub: any tokenizer is accepted for a step": Mutant(
        "torchtitan_lite/inference/trained.py",
        "if place and (own := load_tokenizer(place, options)).fingerprint == wanted:",
        "if place and (own := load_tokenizer(place, options)):",
        "tests/inference/test_commands.py::test_the_tokenizer_is_found_in_the_folder_of_the_run",
    ),
    "generate: padding is attended to": Mutant(
        GENERATE,
        "torch.where(is_token_BS, self.next_B[:, None] + counted.cumsum(1) - 1, -1)",
        "torch.arange(start, end).expand_as(tokens_BS)",
        CACHE,
    ),
    "generate: positions count the padding": Mutant(
        GENERATE,
        "self.next_B += counted.sum(1)",
        "self.next_B += tokens_BS.shape[1]",
        CACHE,
    ),
    "generate: the cache repeats keys for every query head": Mutant(
        GENERATE,
        "            B, _, G, K = k_BSGK.shape\n",
        "            k_BSGK, v_BSGK = (x.repeat_interleave(q_BSHK.shape[2] // x.shape[2], 2) for x in "
        "(k_BSGK, v_BSGK))\n            B, _, G, K = k_BSGK.shape\n",
        f"{TEXT}::test_the_cache_has_no_more_bytes_than_necessary",
    ),
    "generate: a row that has ended goes on": Mutant(
        GENERATE,
        "goes_on_B = goes_on_B & ~torch.isin(next_B, ends)",
        "goes_on_B = ~torch.isin(next_B, ends)",
        f"{TEXT}::test_a_row_that_has_ended_stays_ended_and_changes_no_other",
    ),
    "generate: top-p keeps one token too few": Mutant(
        GENERATE,
        "sorted_BV.softmax(dim=1).cumsum(dim=1) - sorted_BV.softmax(dim=1)",
        "sorted_BV.softmax(dim=1).cumsum(dim=1)",
        f"{TEXT}::test_tokens_are_drawn_as_often_as_the_logits_say",
    ),
    "generate: one query sees beyond its window": Mutant(
        "torchtitan_lite/attention/portable/tiles.py",
        "k0 if sliding_window is None else max(k0, k1 - sliding_window)",
        "k0",
        CACHE,
    ),
    "generate: shares of the vocabulary in another order": Mutant(
        "torchtitan_lite/parallel/tensor.py",
        "return torch.cat(shares, dim=1)",
        "return torch.cat(shares[::-1], dim=1)",
        f"{TEXT}::test_ranks_that_share_a_model_give_the_tokens_of_one_rank[True-sdpa]",
    ),
}
