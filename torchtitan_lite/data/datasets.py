"""The config section `[data]`: the options that all datasets share, and the datasets of this package."""

import logging
import os
import sysconfig
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from torchtitan_lite.config.load import ConfigError, Problem
from torchtitan_lite.config.problem import Remedy
from torchtitan_lite.data.files import Place, config_error
from torchtitan_lite.data.leftout import LeftOut, percent
from torchtitan_lite.data.sources import FileSource, Source
from torchtitan_lite.registry import Names, datasets, tokenizers

_NOT_LIBRARY = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})
# Enough bytes for the path of a shard's file below the cache folder.
_CACHE_NAMES_LENGTH = 64
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class DataConfig(ABC):
    """The text of a run, and the tokenizer for the text. A dataset adds its own options."""

    dataset: str = ""
    """Name of the dataset."""
    tokenizer: Annotated[str, Names(tokenizers)] = "bytes"
    """Name of a tokenizer, or the path of a tokenizer.json or of a folder that holds one."""
    cache_dir: str = ""
    """Folder for the token shards. Empty: $XDG_CACHE_HOME/torchtitan_lite or ~/.cache/torchtitan_lite."""
    validation_fraction: Annotated[float, Field(ge=0, lt=1), Remedy("use 0.05, or 0 to hold out nothing")] = (
        0.05
    )
    """Share of the text that is held out of training for validation. 0 holds nothing out."""

    @abstractmethod
    def open(self) -> Source:
        """Open the text of the dataset. Raises ConfigError if there is no text."""

    @property
    def shard_options(self) -> object:
        """The options that change the shards, besides the tokenizer and `validation_fraction`.

        By default these are all options that the dataset itself adds.
        """
        common = {field.name for field in fields(DataConfig)}
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name not in common}

    def no_text(self) -> Problem:
        """Return the problem to report if no document holds any text."""
        return Problem("data.dataset", self.dataset, "has no text in its documents", "choose another")

    @property
    def cache_folder(self) -> Path:
        """The folder of the token shards: `cache_dir`, or the default folder."""
        default = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "torchtitan_lite")
        return Path(os.path.expanduser(self.cache_dir or default)).absolute()

    def problems(self, key: str) -> list[Problem]:
        """Return a problem if the cache folder cannot be used. No file is read.

        `load_tokenizer` checks the tokenizer.
        """
        folder = self.cache_folder
        nearest = next(place for place in (folder, *folder.parents) if os.path.exists(place))
        # Ask the file system for its limits, at the nearest folder that exists.
        longest, in_all = (os.pathconf(nearest, f"PC_{what}_MAX") for what in ("NAME", "PATH"))
        lengths = [len(os.fsencode(part)) for part in folder.parts]
        if max(lengths) > longest or len(os.fsencode(folder)) + _CACHE_NAMES_LENGTH > in_all:
            rule = f"is too long for a folder: a name has at most {longest} bytes, a path {in_all}"
            return [Problem(f"{key}.cache_dir", str(folder), rule, "use a shorter one")]
        # A cache folder that exists may be read-only: only a build of new shards writes to the folder.
        if os.path.isdir(nearest) and (nearest == folder or os.access(nearest, os.W_OK | os.X_OK)):
            return []
        rule = "is not a folder" if nearest == folder else f"cannot be made in {nearest}"
        return [Problem(f"{key}.cache_dir", str(folder), rule, "name a folder that you can write to")]


@datasets.register
@dataclass(frozen=True, kw_only=True)
class PythonStdlib(DataConfig):
    """The source files of the running Python's standard library."""

    dataset: Literal["python_stdlib"] = "python_stdlib"

    @property
    def shard_options(self) -> object:
        return None

    def open(self) -> FileSource:
        place = Place(root=Path(sysconfig.get_path("stdlib")), suffix=".py", without=_NOT_LIBRARY)
        kept, _ = place.read()
        if not kept:
            rule = f"finds no source file of the standard library in {place.root}"
            remedy = 'use a Python that has them, or dataset "text"'
            raise ConfigError([Problem("data.dataset", self.dataset, rule, remedy)])
        return FileSource(files=tuple(kept), json_field=None)


@dataclass(frozen=True, kw_only=True)
class _Files(DataConfig):
    """The base class of the datasets that read the user's files."""

    path: str = ""
    """File or folder that holds the text of the text and jsonl datasets."""

    suffix: ClassVar[str] = ""
    """The ending of the names of the files that are read from a folder."""

    @property
    def json_field(self) -> str | None:
        """The key of the text in each JSON line. None if the files are plain text."""
        return None

    @property
    def shard_options(self) -> object:
        return self.json_field

    def no_text(self) -> Problem:
        remedy = "name a file or folder that has one"
        return Problem("data.path", self.path, "has no line with text", remedy)

    @property
    def _place(self) -> Place:
        root = Path(os.path.expanduser(self.path))
        return Place(root=root, suffix=self.suffix, is_json_lines=self.json_field is not None)

    def problems(self, key: str) -> list[Problem]:
        """Return a problem if `path` has no file to read, and one if the cache folder cannot be used."""
        found, left_out = super().problems(key), LeftOut()
        path = os.path.expanduser(self.path)
        kind = f"{self.suffix or 'text'} file"
        remedy = f"name a {kind} or a folder of them"
        if not path:
            rule = f'is needed by dataset "{self.dataset}"'
        elif not os.path.exists(path):
            rule = "does not exist"
        elif not os.access(path, os.R_OK | (os.X_OK if os.path.isdir(path) else 0)):
            rule, remedy = "cannot be read", "change its permissions, or name another"
        elif not self._place.has_files(left_out):
            rule = f"holds no {kind}{_in_brackets(left_out.lines())}"
        else:
            return found
        return [Problem(f"{key}.path", self.path, rule, remedy), *found]

    def open(self) -> FileSource:
        place = self._place
        kept, left_out = place.read()
        if not kept:
            what = f"{self.suffix} file that is not empty" if self.suffix else "UTF-8 text file"
            rule = f"holds no {what}{_in_brackets(left_out.lines())}"
            raise config_error("data.path", self.path, rule, "name a folder that does, or a file")
        n_kept = sum(file.size for file in kept)
        self._check_loss(n_kept, left_out)
        for line in left_out.lines(n_kept if self.json_field is None else 0):
            _LOG.warning("%s: left out %s", place.root, line)
        return FileSource(files=tuple(kept), json_field=self.json_field)

    def _check_loss(self, n_kept: int, left_out: LeftOut) -> None:
        """Raise ConfigError if too much text is left out. `n_kept` bytes are not left out."""


def _in_brackets(lines: list[str]) -> str:
    return f" ({'; '.join(lines)})" if lines else ""


@datasets.register
@dataclass(frozen=True, kw_only=True)
class Text(_Files):
    """A UTF-8 file, or every UTF-8 file below a folder."""

    dataset: Literal["text"] = "text"
    max_lost_fraction: Annotated[float, Field(ge=0, le=1), Remedy("use 0.1, or 1 to allow any loss")] = 0.1
    """Share of the text, in bytes, that may be left out because files are not UTF-8. 1 allows any loss."""

    def _check_loss(self, n_kept: int, left_out: LeftOut) -> None:
        share = left_out.n_lost / (n_kept + left_out.n_lost)
        if share > self.max_lost_fraction:
            lost = "; ".join(left_out.lines(n_kept, only_lost=True))
            rule = f"is less than the {percent(share)} of the text in {self.path} that is left out: {lost}"
            remedy = "convert these files to UTF-8, or set 1 to use the rest"
            raise config_error("data.max_lost_fraction", self.max_lost_fraction, rule, remedy)


@datasets.register
@dataclass(frozen=True, kw_only=True)
class Jsonl(_Files):
    """A file, or every .jsonl file below a folder, with one JSON object on each line."""

    dataset: Literal["jsonl"] = "jsonl"
    field: str = "text"
    """Key of a document's text in each JSON object."""

    suffix: ClassVar[str] = ".jsonl"

    @property
    def json_field(self) -> str:
        return self.field

    def has_jsonl(self) -> bool:
        """Return True if `path` is a .jsonl file, or a folder in which .jsonl files are read."""
        place = self._place
        return place.has_files() if place.root.is_dir() else place.root.name.lower().endswith(self.suffix)


def open_source(config: DataConfig) -> Source:
    """Open the dataset of `config`. All files are read and hashed. Raises ConfigError if there is no text."""
    if problems := [problem for problem in config.problems("data") if problem.key != "data.cache_dir"]:
        raise ConfigError(problems)
    return config.open()
