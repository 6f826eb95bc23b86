"""The bugs that exchange with Hugging Face and generation must not have, for test_mutants.py."""

from mutant import Mutant

NAMES = "torchtitan_lite/models/huggingface.py"
WEIGHTS = "torchtitan_lite/checkpoint/weights.py"
HUB = "torchtitan_lite/training/hub.py"
GENERATE = "torchtitan_lite/inference/generate.py"
PARITY = "tests/models/test_huggingface.py"
FILES = "tests/checkpoint/test_weights.py"
TEXT = "tests/inference/test_generate.py"
GATE, UP = ('    "ffn.w1": "mlp.gate_proj",\n', '    "ffn.w3": "mlp.up_proj",\n')
DOWN = '    "ffn.w2": "mlp.down_proj",\n'
BOX = "piece.local.copy_(self.box(name, piece.offsets, piece.local.shape))"

MUTANTS = {
    "hub: gate and up change places": Mutant(
        NAMES,
        GATE + DOWN + UP,
        GATE.replace("gate", "up") + DOWN + UP.replace("up_", "gate_"),
        f"{PARITY} -k logits_are_theirs",
    ),
    "hub: a scaling of the rotary base is passed over": Mutant(
        NAMES, 'if kind == "default":', "if True:", f"{PARITY} -k says_what_it_is_made_of"
    ),
    "hub: an activation that is not computed here is accepted": Mutant(
        NAMES,
        '"hidden_act": ("silu", None),',
        '"hidden_act": ("silu", "gelu", None),',
        f"{PARITY} -k by_name",
    ),
    "hub: an index leads out of the folder": Mutant(
        WEIGHTS, "os.path.basename(file) != file or ", "", f"{FILES} -k one_line"
    ),
    "hub: a dtype that loses bits is read": Mutant(
        WEIGHTS, "elif place.dtype not in _DTYPES:", "elif False:", f"{FILES} -k dtype"
    ),
    "hub: tensors of no weight are passed over": Mutant(
        WEIGHTS, "if name not in wanted and name not in ignored", "if False", f"{FILES} -k fit"
    ),
    "hub: the index is not held against the files": Mutant(
        WEIGHTS, "if listed and listed != (", "if False and listed != (", f"{FILES} -k one_line"
    ),
    "hub: a folder that failed stays": Mutant(
        WEIGHTS, "        shutil.rmtree(scratch, ignore_errors=True)\n", "", f"{FILES} -k leaves_nothing"
    ),
    "hub: the whole model is read before it is placed": Mutant(
        WEIGHTS,
        BOX,
        'kept = self.__dict__.setdefault("kept", []); '
        "kept.append(self.box(name, piece.offsets, piece.local.shape).clone()); piece.local.copy_(kept[-1])",
        "tests/training/test_hub.py -k second_copy",
    ),
    "hub: a head of its own is taken for a tied one": Mutant(
        HUB,
        "if tied and HEAD in weights.places and",
        "if False and",
        "tests/training/test_hub.py -k second_time",
    ),
    "hub: the export of an earlier end stays": Mutant(
        HUB,
        "if json.loads((folder / SOURCE).read_bytes()) == source:",
        "if True:",
        "tests/training/test_hub.py -k whenever",
    ),
    "hub: weights start with a tokenizer that is not theirs": Mutant(
        "torchtitan_lite/training/record.py",
        "if theirs is None or theirs == own:",
        "if True:",
        "tests/training/test_hub.py -k not_its_own",
    ),
    "hub: any tokenizer speaks for a step": Mutant(
        "torchtitan_lite/inference/trained.py",
        "if own.fingerprint == wanted:",
        "if True:",
        "tests/inference/test_commands.py -k tokenizer",
    ),
    "generate: padding is attended to": Mutant(
        GENERATE,
        "torch.where(is_token_BS, self.next_B[:, None] + counted.cumsum(1) - 1, -1)",
        "torch.arange(start, end).expand_as(tokens_BS)",
        f"{TEXT} -k from_the_cache",
    ),
    "generate: positions count the padding": Mutant(
        GENERATE,
        "self.next_B += counted.sum(1)",
        "self.next_B += tokens_BS.shape[1]",
        f"{TEXT} -k from_the_cache",
    ),
    "generate: keys are kept for every query head": Mutant(
        GENERATE,
        "            B, _, G, K = k_BSGK.shape\n",
        "            k_BSGK, v_BSGK = (x.repeat_interleave(q_BSHK.shape[2] // x.shape[2], 2) for x in "
        "(k_BSGK, v_BSGK))\n            B, _, G, K = k_BSGK.shape\n",
        f"{TEXT} -k bytes",
    ),
    "generate: a row that has ended goes on": Mutant(
        GENERATE,
        "goes_on_B = goes_on_B & ~torch.isin(next_B, ends)",
        "goes_on_B = ~torch.isin(next_B, ends)",
        f"{TEXT} -k ended",
    ),
    "generate: the likeliest tokens one too few": Mutant(
        GENERATE,
        "sorted_BV.softmax(dim=1).cumsum(dim=1) - sorted_BV.softmax(dim=1)",
        "sorted_BV.softmax(dim=1).cumsum(dim=1)",
        f"{TEXT} -k as_often",
    ),
    "generate: one query sees beyond its window": Mutant(
        "torchtitan_lite/attention/tiles.py",
        "k0 if window is None else max(k0, k1 - window)",
        "k0",
        f"{TEXT} -k from_the_cache",
    ),
    "generate: shares of the vocabulary in another order": Mutant(
        "torchtitan_lite/parallel/tensor.py",
        "return torch.cat(shares, dim=1)",
        "return torch.cat(shares[::-1], dim=1)",
        f"{TEXT} -k share_a_model",
    ),
}
