"""Printing generated texts: for people while the texts grow, or for programs as JSON lines."""

import json
from collections.abc import Sequence

from torchtitan_lite.data import Tokenizer

_LONGEST = 60
"""The most characters of a prompt in the line above its text."""


class Printer:
    """A printer of texts while they grow, one after the other: a text waits until all before it have ended.

    If there are several texts, a line above each text has its number and its prompt.
    """

    def __init__(self, tokenizer: Tokenizer, prompts: Sequence[str], tokens: Sequence[Sequence[int]]) -> None:
        self._tokenizer, self._prompts = tokenizer, prompts
        self._tokens, self._ended = [list(prompt) for prompt in tokens], [False] * len(tokens)
        self._row = self._n_shown = 0
        """The number of the text that is being printed, and the number of its characters shown so far."""
        self._begin()
        self._show()

    def __call__(self, tokens: Sequence[int | None]) -> None:
        """Append one token to each text. A token is None if its text has ended."""
        for row, token in enumerate(tokens):
            if token is None:
                self._ended[row] = True
            else:
                self._tokens[row].append(token)
        self._show()

    def _show(self) -> None:
        """Print what can be printed now."""
        while self._row < len(self._tokens):
            is_complete = self._ended[self._row]
            self._print(
                self._prompts[self._row], self._tokenizer.decode(self._tokens[self._row]), is_complete
            )
            if not is_complete:
                return
            self._row, self._n_shown = self._row + 1, 0
            self._begin()

    def _begin(self) -> None:
        """Print the line above a text."""
        if len(self._prompts) > 1 and self._row < len(self._prompts):
            prompt = self._prompts[self._row]
            prompt = prompt if len(prompt) <= _LONGEST else f"{prompt[:_LONGEST]}..."
            quoted = json.dumps(prompt, ensure_ascii=False)  # on one line, whatever is in the prompt
            print(f"=== {self._row + 1} of {len(self._prompts)}: {quoted}", flush=True)

    def _print(self, prompt: str, text: str, is_complete: bool) -> None:
        """Print what is new in `text`, which begins with `prompt`."""
        # A character may need several tokens. Until then the text ends with replacement characters.
        end = len(text) if is_complete else len(text.rstrip("\N{REPLACEMENT CHARACTER}"))
        if end > self._n_shown:
            print(text[self._n_shown : end], end="", flush=True)
            self._n_shown = end
        if is_complete:
            print(flush=True)


class JsonPrinter(Printer):
    """A printer of a JSON object for each text that has ended, on one line: its prompt and the whole text.

    A line break in a text is written as \\n, so no text can look like the end of another.
    """

    def _begin(self) -> None:
        pass

    def _print(self, prompt: str, text: str, is_complete: bool) -> None:
        if is_complete:
            print(json.dumps({"prompt": prompt, "text": text}), flush=True)


PRINTERS = {"text": Printer, "json": JsonPrinter}
"""The printer for each value of the option `format`."""
