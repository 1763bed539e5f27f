"""Documents are read as they are; what cannot be read is named; what is left out is counted."""

import gzip
import json
import os
import sysconfig
from pathlib import Path

import pytest
import zstandard

from dsv3.config import Data
from dsv3.data import corpus as corpora
from dsv3.data.corpus import Corpus, Document, cut
from dsv3.errors import DataError


def documents(path, **fields) -> list[Document]:
    return list(Corpus(Data(corpus=str(path), **fields)).documents())


def jsonl(*texts: str) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def test_stdlib_is_the_interpreters_own_source():
    corpus = Corpus(Data(corpus="stdlib"))
    names = [corpus._name(file) for file in corpus.files]
    assert corpus.root == Path(sysconfig.get_path("stdlib"))
    assert {"os.py", "json/decoder.py"} <= set(names)
    assert not any("site-packages" in name for name in names)
    assert names == sorted(names) == [corpus._name(file) for file in Corpus(Data()).files]


def test_stdlib_skips_what_is_badly_encoded_on_purpose(tmp_path, monkeypatch):
    write(tmp_path / "good.py", b"x = 1\n")
    write(tmp_path / "test" / "bad.py", b"# \xe9\n")
    write(tmp_path / "site-packages" / "other.py", b"y = 2\n")
    monkeypatch.setattr(corpora.sysconfig, "get_path", lambda name: str(tmp_path))
    corpus = Corpus(Data(corpus="stdlib"))
    assert list(corpus.documents()) == [Document("good.py", "x = 1\n")]
    assert corpus.skipped == {"unreadable": 1}


def test_folder_takes_text_and_says_what_it_left_out(tmp_path):
    write(tmp_path / "b.py", b"b\r\n\tb")
    write(tmp_path / "a" / "z.md", "Grüße 漢字 🙂".encode())
    write(tmp_path / "c.jsonl", jsonl("one", "", "b\r\n\tb"))
    write(tmp_path / "copy.txt", b"one")
    write(tmp_path / "empty.py", b"")
    write(tmp_path / "image.PNG", b"\x89PNG\0")
    write(tmp_path / "Makefile", b"all:")
    write(tmp_path / ".git" / "config.txt", b"hidden")
    corpus = Corpus(Data(corpus=str(tmp_path)))
    assert list(corpus.documents()) == [
        Document("a/z.md", "Grüße 漢字 🙂"),
        Document("b.py", "b\r\n\tb"),
        Document("c.jsonl:1", "one"),
    ]
    assert corpus.skipped == {
        "empty": 2,
        "duplicate": 2,
        "not text by its name (.PNG)": 1,
        "not text by its name (no suffix)": 1,
    }
    assert list(corpus.documents()) == list(corpus.documents())


def test_glob_takes_every_file_it_matches(tmp_path):
    write(tmp_path / "x" / "1.odd", b"one")
    write(tmp_path / "x" / "y" / "2.odd", b"two")
    write(tmp_path / "3.txt", b"three")
    found = documents(tmp_path / "**" / "*.odd")
    assert found == [Document("1.odd", "one"), Document("y/2.odd", "two")]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_jsonl_however_compressed(tmp_path, suffix):
    content = jsonl("first\nline", "zwei\u2028 \x85") + b"\n \n" + jsonl("last")[:-1]
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[suffix]
    path = write(tmp_path / f"data.jsonl{suffix}", pack(content[:20]) + pack(content[20:]))
    assert documents(path) == [
        Document(f"data.jsonl{suffix}:1", "first\nline"),
        Document(f"data.jsonl{suffix}:2", "zwei\u2028 \x85"),
        Document(f"data.jsonl{suffix}:5", "last"),
    ]


def test_text_field_names_the_text(tmp_path):
    path = write(tmp_path / "data.jsonl", b'{"text": 1, "body": "here"}\n')
    assert documents(path, text_field="body") == [Document("data.jsonl:1", "here")]


def test_lone_surrogates_become_replacement_characters(tmp_path):
    path = write(tmp_path / "data.jsonl", rb'{"text": "a\ud800b \ud83d\ude42 \udc00"}')
    assert [document.text for document in documents(path)] == ["a\ufffdb 🙂 \ufffd"]


def test_byte_order_mark_is_no_text(tmp_path):
    write(tmp_path / "a.txt", b"\xef\xbb\xbfone")
    write(tmp_path / "b.txt", b"two")
    assert [document.text for document in documents(tmp_path)] == ["one", "two"]


def test_lone_text_file_is_cut_into_passages(tmp_path):
    text = "".join(f"line {i}\n" for i in range(20_000))
    found = documents(write(tmp_path / "input.txt", text.encode()))
    assert "".join(document.text for document in found) == text
    assert 60 <= len(found) <= 70
    assert all(document.text.endswith("\n") for document in found)
    assert found[1].name == f"input.txt@{len(found[0].text)}"


def test_five_megabyte_line_is_cut_too(tmp_path):
    text = "".join(map(str, range(800_000)))
    found = documents(write(tmp_path / "line.txt", text.encode()))
    assert "".join(document.text for document in found) == text
    assert max(len(document.text) for document in found) <= 16384


def test_cut_keeps_everything_and_its_bound():
    for text in ("", "a", "a\n" * 50, "x" * 100, "ab\n" + "y" * 30 + "\n\nz"):
        pieces = list(cut(text, 7))
        assert "".join(pieces) == text
        assert all(0 < len(piece) <= 7 for piece in pieces)


def test_max_bytes_bounds_the_text(tmp_path):
    write(tmp_path / "data.jsonl", jsonl("aaaa", "ééé", "c", "dddd"))
    assert [document.text for document in documents(tmp_path, max_bytes=11)] == ["aaaa", "ééé", "c"]
    assert [document.text for document in documents(tmp_path, max_bytes=10)] == ["aaaa", "ééé"]


def test_digest_follows_names_and_content(tmp_path):
    def digest():
        return Corpus(Data(corpus=str(tmp_path))).digest()

    path = write(tmp_path / "a.txt", b"one")
    first = digest()
    assert first == digest()
    path.write_bytes(b"two")
    second = digest()
    path.rename(tmp_path / "b.txt")
    assert len({first, second, digest()}) == 3


def test_missing_corpus_names_the_neighbour(tmp_path):
    write(tmp_path / "corpus.txt", b"x")
    with pytest.raises(DataError, match=r"corpsu.txt' does not exist; did you mean '.*corpus.txt'"):
        documents(tmp_path / "corpsu.txt")
    with pytest.raises(DataError, match="'stdlb' does not exist; did you mean 'stdlib'"):
        documents("stdlb")
    with pytest.raises(DataError, match="cannot be read: File name too long"):
        documents("x" * 5000)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "holds no text"),
        ("blank.jsonl", b"\n\n", "holds no text"),
        ("binary.txt", b"abc\0def", r"binary.txt holds NUL bytes"),
        ("utf16.txt", "hello".encode("utf-16"), r"utf16.txt holds NUL bytes"),
        ("latin.txt", "café".encode("latin-1"), r"latin.txt is not UTF-8: .* at byte 3"),
        ("bad.jsonl", jsonl("ok") + b"{oops\n", r"bad.jsonl:2 is not JSON"),
        ("deep.jsonl", b"[" * 100_000, r"deep.jsonl:1 is not JSON"),
        ("list.jsonl", jsonl("ok", "ok2") + b"[1]\n", r"list.jsonl:3 is JSON but no object"),
        ("lacks.jsonl", b'{"txt": "x"}\n', r"lacks.jsonl:1 lacks .* = 'text'; .* 'txt'"),
        ("bare.jsonl", b"{}\n", r"bare.jsonl:1 lacks data.text_field = 'text'"),
        ("typed.jsonl", b'{"text": 5}\n', r"typed.jsonl:1: field 'text' is no string: 5"),
        ("latin.jsonl", b'{"text": "\xe9"}\n', r"latin.jsonl:1 is not UTF-8"),
        ("nul.jsonl", jsonl("ok") + b"\0\n", r"nul.jsonl:2 holds NUL bytes"),
        ("plain.jsonl.gz", jsonl("x"), r"plain.jsonl.gz is damaged or cut short"),
        ("plain.jsonl.zst", jsonl("x"), r"plain.jsonl.zst is damaged or cut short"),
        ("none.jsonl.zst", b"", r"none.jsonl.zst is damaged or cut short"),
    ],
)
def test_bad_file_is_named(tmp_path, name, content, message):
    path = write(tmp_path / name, content)
    for corpus in (path, tmp_path, tmp_path / "*"):
        with pytest.raises(DataError, match=message):
            documents(corpus)


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".zst", zstandard.compress)])
def test_truncation_and_flips_of_compressed_files_never_pass(tmp_path, suffix, pack):
    texts = [os.urandom(40).hex() for _ in range(50)]
    whole = pack(jsonl(*texts))
    path = tmp_path / f"data.jsonl{suffix}"
    for length in (1, 5, 12, len(whole) // 2, len(whole) - 1):
        write(path, whole[:length])
        with pytest.raises(DataError, match=r"data.jsonl.* is damaged or cut short"):
            documents(path)


def test_glob_and_folder_without_files(tmp_path):
    with pytest.raises(DataError, match=r"\*.txt' matches no file"):
        documents(tmp_path / "*.txt")
    write(tmp_path / "image.png", b"x")
    with pytest.raises(DataError, match="holds no text, code or JSONL file"):
        documents(tmp_path)
