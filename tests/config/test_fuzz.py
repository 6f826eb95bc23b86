"""Random command lines and files give a configuration, a ConfigError or the help, never another error."""

import random
from pathlib import Path

import pytest

from torchtitan_lite.config.job import JobConfig, load_job
from torchtitan_lite.config.load import ConfigError, to_toml
from torchtitan_lite.config.schema import leaves

KEYS = leaves(JobConfig)
ODD_KEYS = [
    "model",
    "model.attention",
    "",
    ".",
    "..",
    "a",
    "model.",
    ".model",
    "training.steps.x",
    "model.overrides.n_layers",
    "model.overrides.rope_scaling.factor",
    "model.overrides.",
    "model.attention.kernel_options.BACKEND",
    "config",
    "dry-run",
    "world-size",
]
VALUES = [
    "", "0", "1", "-1", "1.5", "1e999", "NaN", "-Infinity", "true", "False", "null", "None", "=", "--", "-",
    "flex", "varlen", "sdpa", "debugmodel_flex_flash", "0.6B", "llama3", "auto", "cuda", "cpu", "text",
    "jsonl", "bytes", "/", "/dev/null", "~", "~nobody/x", "a" * 5000, "\udcff", "\u2028", "\n", "%s", "-h-",
    "[", "[" * 5000, "{", "{}", "[]", "[64, 32]", "[1, [2]]", '"x"', "9" * 5000, "99999999999999999999",
    '{"n_layers": 2}', '{"n_layers": "2"}', '{"": {"": null}}', '{"rope_scaling": {"factor": 8.0}}',
    '{"BACKEND": "FLASH"}', '{"BACKEND": []}', "64,32", "64,", ",",
]  # fmt: skip
LINES = [
    "[training]", "[model]", "[model.attention]", "[model.overrides]", "[[model]]", "[data]", "[x]", "[",
    "\x00", "steps = 5", "steps = 5.0", "seq_len = 99999999999999999999", "x = nan", "x = ", "'' = 1",
    "kind = 'flex'", "kind = 'x'", "kind = 5", "block_size = [64, 64]", "block_size = 'x'",
    "kernel_options = {BACKEND = 'FLASH'}",
    "attention = 'flex'", "attention = []", "attention.kind = 'varlen'",
    "flavor = 'debugmodel_flex'", "flavor = []", "name = 'llama3'", "n_layers = 2",
    "overrides = {a = {b = 2026-01-01}}", "path = 'x'", "dataset = 'text'", "tokenizer = '\x07'",
]  # fmt: skip


@pytest.fixture(autouse=True)
def in_an_empty_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def word(rng: random.Random) -> str:
    """A random flag, value, or flag=value."""
    key = rng.choice(rng.choice([KEYS, KEYS, ODD_KEYS]))
    if rng.random() < 0.2:
        cut = rng.randrange(len(key) + 1)
        key = key[:cut] + rng.choice(["x", "-", ".", "no-", "é"]) + key[cut:]
    flag = f"--{rng.choice(['', '', 'no-'])}{key.replace('_', rng.choice('-_'))}"
    return rng.choice([flag, flag, rng.choice(VALUES), f"{flag}={rng.choice(VALUES)}"])


def outcome(argv: list[str]) -> str:
    """Load `argv`; return "help", "refused" or "read". A refusal has one printable line per problem."""
    try:
        loaded = load_job(argv)
    except SystemExit as error:
        assert error.code == 0
        assert "--help" in argv or "-h" in argv
        return "help"
    except ConfigError as error:
        lines = str(error).split("\n")
        assert len(lines) == len(error.problems) > 0
        assert all(line.isprintable() and ": " in line for line in lines)
        return "refused"
    Path("again.toml").write_text(to_toml(loaded.config), encoding="utf-8")
    again = load_job(["--config", "again.toml"], world_size=loaded.world_size)
    assert again.config == loaded.config
    return "read"


def test_random_command_lines_are_read_or_refused() -> None:
    rng = random.Random(0)
    outcomes = [outcome([word(rng) for _ in range(rng.randint(0, 5))]) for _ in range(1500)]
    assert {"read", "refused"} <= set(outcomes)


def test_command_lines_with_known_keys_are_read_or_refused() -> None:
    rng = random.Random(1)
    pairs = [[f"--{key}", value] for key in KEYS for value in VALUES]
    outcomes = [outcome(pair) for pair in pairs]
    outcomes += [outcome(rng.choice(pairs) + rng.choice(pairs) + rng.choice(pairs)) for _ in range(1000)]
    assert min(outcomes.count("read"), outcomes.count("refused")) > 100


def test_random_files_are_read_or_refused() -> None:
    rng = random.Random(2)
    outcomes = []
    for _ in range(700):
        for name in ("a.toml", "b.toml"):
            lines = [rng.choice(LINES) for _ in range(rng.randint(0, 5))]
            Path(name).write_text("\n".join(lines), encoding="utf-8")
        outcomes.append(outcome(["--config", "a.toml", "--config", "b.toml", word(rng)]))
    assert {"read", "refused"} <= set(outcomes)


def test_random_command_lines_with_help_print_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    rng = random.Random(3)
    for _ in range(10):
        assert outcome([*(word(rng) for _ in range(4)), "--help"]) == "help"
        assert "--training.steps" in capsys.readouterr().out
