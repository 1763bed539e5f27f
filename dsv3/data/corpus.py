"""A corpus: named documents, read from files in an order that never changes.

    'stdlib'                      the running interpreter's own standard library, *.py
    a folder                      its text and code files (by suffix) and JSONL, recursively
    a glob                        every file it matches
    a file                        .jsonl: a document a line; other text: cut into passages

Any file may be compressed (.gz, .zst). A document is one text file, or `data.text_field` of one
JSONL line. Documents stream: a corpus larger than memory is fine, each pass reads it again.

What is dropped is counted by reason in `Corpus.skipped`: empty documents, exact copies (§4.1
reduces redundancy), in a folder the files that are not text by their name, and in the standard
library the few test files that are badly encoded on purpose. Elsewhere a file that is binary,
badly encoded or damaged is an error: what was asked for is read whole or not at all. A lone
surrogate, which JSON can spell and UTF-8 cannot, becomes U+FFFD.
"""

import difflib
import glob
import gzip
import hashlib
import io
import json
import os
import sysconfig
import zlib
from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

import zstandard

from dsv3.config import Data
from dsv3.errors import DataError, nearest

TEXT_SUFFIXES = frozenset(
    ".txt .text .md .markdown .rst .tex .org .adoc .html .htm .xml .css .csv .tsv .json .yaml .yml"
    " .toml .ini .cfg .py .pyi .pyx .ipynb .c .h .cc .cpp .cxx .hpp .cu .cuh .java .kt .scala .go"
    " .rs .js .jsx .ts .tsx .rb .pl .pm .php .lua .r .jl .m .swift .cs .fs .hs .ml .mli .ex .exs"
    " .erl .clj .el .lisp .scm .sql .sh .bash .zsh .ps1 .bat .cmake .mk .v .sv .vhd .asm .s .f .f90"
    " .proto .graphql .tf .nix .zig .dart .patch .diff .jsonl".split()
)
COMPRESSED_SUFFIXES = (".gz", ".zst")
PASSAGE_CHARACTERS = (1024, 16384)  # shortest and longest passage of a lone text file


class Document(NamedTuple):
    """A text and where it came from: a path relative to the corpus, ':line' added for JSONL."""

    name: str
    text: str

    @property
    def number(self) -> int:
        """A 256-bit number from the text alone, by which documents are split and drawn."""
        return int.from_bytes(hashlib.sha256(self.text.encode()).digest())


class Corpus:
    """The documents `data.corpus` names. Raises DataError where it is missing or holds no file."""

    def __init__(self, data: Data):
        self.data = data
        self.lenient = data.corpus == "stdlib"
        self._not_text = Counter()
        with _reading(Path(data.corpus)):
            self.files = self._stdlib() if self.lenient else self._named()
        self.root = Path(os.path.commonpath([file.parent for file in self.files]))
        self.skipped = Counter()

    def digest(self) -> str:
        """SHA-256 of every file's name and bytes: what identifies the corpus."""
        total = hashlib.sha256()
        for file in self.files:
            with _reading(file), file.open("rb") as stream:
                content = hashlib.file_digest(stream, "sha256")
            total.update(self._name(file).encode() + b"\0")
            total.update(content.digest())
        return total.hexdigest()

    def documents(self) -> Iterator[Document]:
        """Each document once, copies and empty ones left out; stops at `data.max_bytes`.

        Fills `skipped`. Raises DataError naming the file, and line, that cannot be read.
        """
        self.skipped = Counter(self._not_text)
        seen, size = set(), 0
        for document in self._all_documents():
            if not document.text:
                self.skipped["empty"] += 1
            elif (number := document.number) in seen:
                self.skipped["duplicate"] += 1
            else:
                seen.add(number)
                size += len(document.text.encode())
                if self.data.max_bytes is not None and size > self.data.max_bytes:
                    break
                yield document
        if not seen:
            raise DataError(f"data.corpus = {self.data.corpus!r} holds no text")

    def _all_documents(self) -> Iterator[Document]:
        for file in self.files:
            try:
                yield from self._documents_of(file)
            except DataError:
                if not self.lenient:
                    raise
                self.skipped["unreadable"] += 1

    def _documents_of(self, file: Path) -> Iterator[Document]:
        name = self._name(file)
        if _kind(file) == ".jsonl":
            for number, text in _jsonl_texts(file, self.data.text_field):
                yield Document(f"{name}:{number}", text)
        elif len(self.files) == 1:
            text = _text(file)
            for start, passage in _passages(text):
                yield Document(f"{name}@{start}", passage)
        else:
            yield Document(name, _text(file))

    def _name(self, file: Path) -> str:
        return well_formed(file.relative_to(self.root).as_posix())

    def _stdlib(self) -> list[Path]:
        root = Path(sysconfig.get_path("stdlib"))
        installed = {"site-packages", "dist-packages"}
        files = [f for f in root.rglob("*.py") if not installed & set(f.relative_to(root).parts)]
        if not files:
            raise DataError(f"data.corpus = 'stdlib': no source files in {root}")
        return sorted(files, key=Path.as_posix)

    def _named(self) -> list[Path]:
        pattern = os.path.expanduser(self.data.corpus)
        path = Path(pattern)
        if path.is_dir():
            return self._folder(path)
        if path.exists():
            return [path]
        if not glob.has_magic(pattern):
            raise DataError(f"data.corpus = {self.data.corpus!r} does not exist{_neighbour(path)}")
        files = sorted(f for f in map(Path, glob.glob(pattern, recursive=True)) if f.is_file())
        if not files:
            raise DataError(f"data.corpus = {self.data.corpus!r} matches no file")
        return files

    def _folder(self, folder: Path) -> list[Path]:
        files = []
        for file in sorted(folder.rglob("*"), key=Path.as_posix):
            hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
            if hidden or not file.is_file():
                continue
            if _kind(file) in TEXT_SUFFIXES:
                files.append(file)
            else:
                self._not_text[f"not text by its name ({file.suffix or 'no suffix'})"] += 1
        if not files:
            raise DataError(f"data.corpus = {self.data.corpus!r} holds no text, code or JSONL file")
        return files


def well_formed(text: str) -> str:
    """`text` with each lone surrogate replaced by U+FFFD, so that UTF-8 can spell it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def cut(text: str, longest: int) -> Iterator[str]:
    """Pieces of at most `longest` characters that make up `text`, cut at line ends if possible."""
    start = 0
    while start < len(text):
        end = start + longest
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        yield text[start:end]
        start = end


def _kind(file: Path) -> str:
    """The suffix that tells a file's format: the one before .gz or .zst."""
    suffix = file.suffix.lower()
    return Path(file.stem).suffix.lower() if suffix in COMPRESSED_SUFFIXES else suffix


def _neighbour(path: Path) -> str:
    around = path.parent.iterdir() if path.parent.is_dir() else ()
    names = [*map(str, around), "stdlib", "synthetic"]
    close = difflib.get_close_matches(str(path), names, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


# --- reading one file --------------------------------------------------------------------------


class _ZstdFile(io.RawIOBase):
    """The decompressed bytes of a .zst file. Unlike zstandard's own reader, which ends quietly
    there, it raises EOFError where the last frame is cut short."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._unread = b""
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._ready and (compressed := self._unread or self._file.read(1 << 16)):
            if self._frame.eof:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
            self._ready = memoryview(self._frame.decompress(compressed))
            self._unread = self._frame.unused_data
        if not self._ready and not self._frame.eof:
            raise EOFError("the last frame is cut short")
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        return size


@contextmanager
def _reading(file: Path) -> Generator[None]:
    """Turn what goes wrong while reading `file` into a DataError that names it."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
        raise DataError(f"{file} is damaged or cut short: {error}") from error
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from error


@contextmanager
def _opened(file: Path) -> Generator[io.BufferedIOBase]:
    with _reading(file), file.open("rb") as raw:
        match file.suffix.lower():
            case ".gz":
                yield gzip.open(raw)
            case ".zst":
                yield io.BufferedReader(_ZstdFile(raw), 1 << 16)
            case _:
                yield raw


def _decode(data: bytes, where: str) -> str:
    if b"\0" in data:
        raise DataError(f"{where} holds NUL bytes: it is binary, or text that is not UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not UTF-8: {error.reason} at byte {error.start}") from error


def _text(file: Path) -> str:
    with _opened(file) as stream:
        return _decode(stream.read(), str(file))


def _passages(text: str) -> Iterator[tuple[int, str]]:
    """A lone text file as passages, with the position of each.

    A file of its own could not be split into training and held-out documents otherwise.
    """
    shortest, longest = PASSAGE_CHARACTERS
    start = 0
    for passage in cut(text, max(shortest, min(len(text) // 64, longest))):
        yield start, passage
        start += len(passage)


def _jsonl_texts(file: Path, field: str) -> Iterator[tuple[int, str]]:
    with _opened(file) as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                yield number, _jsonl_text(_decode(line, f"{file}:{number}"), field, file, number)


def _jsonl_text(line: str, field: str, file: Path, number: int) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}:{number} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{file}:{number} is JSON but no object: {line.strip()[:40]!r}")
    if field not in value:
        hint = nearest(field, value) if value else ""
        raise DataError(f"{file}:{number} lacks data.text_field = {field!r}{hint}")
    if not isinstance(value[field], str):
        raise DataError(f"{file}:{number}: field {field!r} is no string: {value[field]!r:.40}")
    return well_formed(value[field])
