"""Where text comes from: the data section of a run, and the files that it names, listed and hashed."""

import codecs
import hashlib
import logging
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torchtitan_lite.config.load import ConfigError, Problem
from torchtitan_lite.data import cache
from torchtitan_lite.data.documents import (
    PIECE_BYTES,
    Document,
    SourceFile,
    Stamp,
    json_documents,
    unreadable,
    whole_file,
)

_LOG = logging.getLogger(__name__)
_NOT_LIBRARY = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})
_NOTHING = frozenset(hashlib.sha256(content).digest() for content in (b"", codecs.BOM_UTF8))
# Enough for the path of a shard's file below the cache folder.
_CACHE_NAMES_LENGTH = 64


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What text the run learns from, and how it becomes tokens."""

    dataset: Literal["python_stdlib", "text", "jsonl"] = "python_stdlib"
    """python_stdlib: the sources of the running Python's standard library. text: a UTF-8 file, or every UTF-8
    file below a folder. jsonl: one JSON object a line, in a file or in every .jsonl file below a folder."""
    path: str = ""
    """File or folder of the text and jsonl datasets."""
    field: str = "text"
    """Key of the JSON objects that holds a jsonl document's text."""
    tokenizer: str = "bytes"
    """"bytes", or the path of a tokenizer.json or of a folder that holds one."""
    cache_dir: str = ""
    """Folder for the token shards; empty: $XDG_CACHE_HOME/torchtitan_lite, or ~/.cache/torchtitan_lite."""
    validation_fraction: float = 0.05
    """Share of the text that is held out of training, for validation; 0 holds nothing out."""
    num_workers: int = 0
    """Processes per rank that prepare batches ahead. 0: the training process itself does, which is enough
    unless the token shards are on a slow disk."""

    @property
    def cache_folder(self) -> Path:
        """The folder that `cache_dir` stands for."""
        default = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "torchtitan_lite")
        return Path(os.path.expanduser(self.cache_dir or default)).absolute()

    def problems(self, key: str) -> list[Problem]:
        """Range and existence checks that read no file; `load_tokenizer` checks the tokenizer."""
        found = self._path_problems(key) + self._cache_problems(key)
        if not 0 <= self.validation_fraction < 1:
            remedy = "use 0.05 to hold out a twentieth of the text, or 0 for none"
            rule = "is not in [0, 1)"
            found.append(Problem(f"{key}.validation_fraction", self.validation_fraction, rule, remedy))
        if self.num_workers < 0:
            rule, remedy = "must be at least 0", "use 0 for the training process itself"
            found.append(Problem(f"{key}.num_workers", self.num_workers, rule, remedy))
        if self.dataset != "jsonl" and self.field != "text":
            rule = f'is an option of dataset "jsonl", and the dataset is "{self.dataset}"'
            remedy = f'leave it out, or set {key}.dataset = "jsonl"'
            found.append(Problem(f"{key}.field", self.field, rule, remedy))
        return found

    def _path_problems(self, key: str) -> list[Problem]:
        path = os.path.expanduser(self.path)
        kind = ".jsonl file" if self.dataset == "jsonl" else "text file"
        remedy = f"name a {kind} or a folder of them"
        if self.dataset == "python_stdlib":
            rule = 'is an option of datasets "text" and "jsonl", and the dataset is "python_stdlib"'
            remedy = f'leave it out, or set {key}.dataset = "text"'
            return [Problem(f"{key}.path", self.path, rule, remedy)] if path else []
        if not path:
            rule = f'is needed by dataset "{self.dataset}"'
        elif not os.path.exists(path):
            rule = "does not exist"
        elif not os.access(path, os.R_OK | (os.X_OK if os.path.isdir(path) else 0)):
            rule, remedy = "cannot be read", "change its permissions, or name another"
        elif not _has_files(path, self.dataset):
            rule = f"holds no {kind}"
        else:
            return []
        return [Problem(f"{key}.path", self.path, rule, remedy)]

    def _cache_problems(self, key: str) -> list[Problem]:
        folder = self.cache_folder
        nearest = next(place for place in (folder, *folder.parents) if os.path.exists(place))
        # Only the file system knows, and it looks no further than the first folder that does not exist.
        longest, in_all = (os.pathconf(nearest, f"PC_{what}_MAX") for what in ("NAME", "PATH"))
        lengths = [len(os.fsencode(part)) for part in folder.parts]
        if max(lengths) > longest or len(os.fsencode(folder)) + _CACHE_NAMES_LENGTH > in_all:
            rule = f"is too long for a folder: a name has at most {longest} bytes, a path {in_all}"
            return [Problem(f"{key}.cache_dir", str(folder), rule, "use a shorter one")]
        # A folder that exists may be complete and read-only; only a build finds out that it cannot write.
        if os.path.isdir(nearest) and (nearest == folder or os.access(nearest, os.W_OK | os.X_OK)):
            return []
        rule = "is not a folder" if nearest == folder else f"cannot be made in {nearest}"
        return [Problem(f"{key}.cache_dir", str(folder), rule, "name a folder that you can write to")]


@dataclass(frozen=True, kw_only=True)
class Source:
    """The files of a dataset, each of which holds some text."""

    files: tuple[SourceFile, ...]
    json_field: str | None
    """Where each line's document is, when the files are JSON lines."""

    @property
    def digest(self) -> str:
        """Hash of every file's name and content."""
        whole = hashlib.sha256()
        for file in self.files:
            whole.update(os.fsencode(file.name) + b"\0" + file.sha256)
        return whole.hexdigest()

    @property
    def n_bytes(self) -> int:
        """Size of all files."""
        return sum(file.stamp.size for file in self.files)

    def documents(self) -> Iterator[Document]:
        """All documents, file by file; each one's pieces are gone when the next is asked for."""
        for file in self.files:
            if self.json_field is None:
                yield whole_file(file)
            else:
                yield from json_documents(file, self.json_field)


def open_source(config: DataConfig) -> Source:
    """The dataset of `config`, every file of it read once to be hashed; ConfigError if it has no text."""
    if problems := [problem for problem in config.problems("data") if problem.key != "data.cache_dir"]:
        raise ConfigError(problems)
    is_jsonl, is_library = config.dataset == "jsonl", config.dataset == "python_stdlib"
    root = Path(sysconfig.get_path("stdlib") if is_library else os.path.expanduser(config.path))
    kept, n_empty, n_not_text = [], 0, 0
    names = _named(root, config.dataset)
    for name in sorted(names):
        file, is_text = _inspect(names[name], name)
        if file.sha256 in _NOTHING:
            n_empty += 1
        elif not is_text and not is_jsonl:
            n_not_text += 1
        else:
            kept.append(file)
    if not kept:
        raise ConfigError([_no_text(config, root, n_empty, n_not_text)])
    if n_empty + n_not_text and not is_library:
        _LOG.warning("%s: left out %d empty files and %d that are not UTF-8 text", root, n_empty, n_not_text)
    return Source(files=tuple(kept), json_field=config.field if is_jsonl else None)


def _has_files(path: str, dataset: str) -> bool:
    try:
        return next(_paths(Path(path), dataset), None) is not None
    except ConfigError:
        # Some of it cannot be read, which `open_source` says better.
        return True


def _named(root: Path, dataset: str) -> dict[str, Path]:
    """The files of a dataset by relative path; each once, by its own path, else by the first link to it."""
    base = root if root.is_dir() else root.parent
    names = {path.relative_to(base).as_posix(): path for path in _paths(root, dataset)}
    links = {name for name, path in names.items() if path.is_symlink()}
    real_base = os.path.realpath(base)
    # Folders below it are no links.
    taken = {os.path.join(real_base, name) for name in names.keys() - links}
    for name in sorted(links):
        real = os.path.realpath(names[name])
        if real in taken:
            del names[name]
        taken.add(real)
    return names


def _paths(root: Path, dataset: str) -> Iterator[Path]:
    """The files at or below `root` that may hold text, in no particular order."""
    if not root.is_dir():
        yield root
        return
    suffix = {"python_stdlib": ".py", "text": "", "jsonl": ".jsonl"}[dataset]
    left_out = _NOT_LIBRARY if dataset == "python_stdlib" else frozenset()
    for folder, subfolders, names in os.walk(root, onerror=unreadable):
        subfolders[:] = [name for name in subfolders if name not in left_out and not _is_hidden(name)]
        paths = (Path(folder, name) for name in names if name.endswith(suffix) and not _is_hidden(name))
        yield from (path for path in paths if os.path.isfile(path))


def _is_hidden(name: str) -> bool:
    # The cache may be within the dataset's folder, and is none of its text.
    return name.startswith(".") or cache.is_ours(name)


def _inspect(path: Path, name: str) -> tuple[SourceFile, bool]:
    """The hash of a file, and whether all of it is text: UTF-8 without a NUL byte."""
    whole, decoder, is_text = hashlib.sha256(), codecs.getincrementaldecoder("utf-8")(), True
    try:
        with path.open("rb") as stream:
            stamp = Stamp.of(stream)
            while block := stream.read(PIECE_BYTES):
                whole.update(block)
                is_text = is_text and _decodes(decoder, block)
    except OSError as error:
        unreadable(error, path)
    is_text = is_text and _decodes(decoder, b"", final=True)
    return SourceFile(path=path, name=name, stamp=stamp, sha256=whole.digest()), is_text


def _decodes(decoder: codecs.IncrementalDecoder, block: bytes, *, final: bool = False) -> bool:
    try:
        decoder.decode(block, final)
    except UnicodeDecodeError:
        return False
    return b"\0" not in block


def _no_text(config: DataConfig, root: Path, n_empty: int, n_not_text: int) -> Problem:
    if config.dataset == "python_stdlib":
        rule = f"finds no source file of the standard library in {root}"
        return Problem("data.dataset", config.dataset, rule, 'use a Python that has them, or dataset "text"')
    if root.is_file():
        rule = "is empty" if n_empty else "is not UTF-8 text"
        return Problem("data.path", config.path, rule, "name a file that holds text, or convert it to UTF-8")
    kind = ".jsonl file that is not empty" if config.dataset == "jsonl" else "UTF-8 text file"
    rule = f"holds no {kind} ({n_empty} empty, {n_not_text} not UTF-8, hidden ones not counted)"
    return Problem("data.path", config.path, rule, "name a folder that does, or a file")
