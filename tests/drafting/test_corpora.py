"""Corpora: who drafts from them, what is left of one that was dropped, and their files."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from aasd_testing.texts import Documents
from vllm_aasd.drafting import corpus_files
from vllm_aasd.drafting.corpora import Corpora, num_pages
from vllm_aasd.drafting.drafter import NO_ALIGNMENT, Drafter
from vllm_aasd.drafting.known_text import KnownTexts
from vllm_aasd.drafting.tensor_file import TensorFileError
from vllm_aasd.kernels.text import PAGE_SIZE, cpu

VOCAB_SIZE, NUM_DRAFT_TOKENS = 1000, 4
MARKER = [*range(100, 140)]
OTHER = [*range(300, 500)]


def text_of(*documents):
    return np.array([token for document in documents for token in (*document, -1)], np.int32)


def drafted(corpora, *names, context=MARKER[:10]):
    """What a request that names some corpora drafts."""
    drafter = Drafter(VOCAB_SIZE, NUM_DRAFT_TOKENS, 0.02, texts=KnownTexts(1 << 20, NUM_DRAFT_TOKENS, corpora))
    drafter.admit("", 1, None, names)
    return drafter.draft("", np.array(context, np.int32), NO_ALIGNMENT, NUM_DRAFT_TOKENS)[0].tolist()


def test_only_who_names_a_corpus_drafts_from_it():
    corpora = Corpora({"a": text_of(OTHER), "b": text_of([1, 2, 3], MARKER)})
    assert drafted(corpora, "b") == drafted(corpora, "missing", "a", "b") == MARKER[10:14]
    assert drafted(corpora) == drafted(corpora, "a") == drafted(corpora, "missing") == []


def test_what_was_dropped_is_gone_also_for_who_had_it_and_also_from_its_pages():
    corpora = Corpora(texts={"a": text_of(OTHER), "b": text_of(MARKER)}, spare_pages=1)
    drafter = Drafter(VOCAB_SIZE, NUM_DRAFT_TOKENS, 0.02, texts=KnownTexts(1 << 20, NUM_DRAFT_TOKENS, corpora))
    drafter.admit("", 1, None, ["b"])

    def goes_on(length):
        return drafter.draft("", np.array(MARKER[:length], np.int32), NO_ALIGNMENT, NUM_DRAFT_TOKENS)[0].tolist()

    assert goes_on(10) == MARKER[10:14]
    corpora.drop("b")
    assert goes_on(11) == []
    assert not np.isin(MARKER, corpora.index.tokens).any()
    # Of the same name and in the same pages, it is another one: requests that run go on without.
    corpora.add("b", text_of(MARKER))
    assert goes_on(12) == [] and drafted(corpora, "b") == MARKER[10:14]
    assert drafted(corpora, "a", context=OTHER[:10]) == OTHER[10:14]


def test_an_index_after_a_drop_is_as_if_the_text_had_never_been_there():
    rng = np.random.default_rng(0)
    texts = {name: text_of(*rng.integers(30, size=(5, 100)).tolist()) for name in "abc"}
    corpora = Corpora(texts=texts)
    corpora.drop("b")
    assert corpora.names == ["a", "c"]
    plain = Documents(cpu, len(corpora.index.pages))
    for name in "ac":
        (namespace,) = corpora.namespaces([name])
        for document in np.split(texts[name], np.flatnonzero(texts[name] < 0) + 1)[:-1]:
            plain.extend(plain.begin(namespace), document[:-1].tolist())
    for ours, theirs in zip(corpora.index, plain.index, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_what_does_not_fit_is_refused_and_changes_nothing():
    corpora = Corpora(texts={"a": text_of(OTHER)}, spare_pages=1)
    before = [array.copy() for array in corpora.index]
    with pytest.raises(ValueError, match=r"corpus 'b' takes 0\.0 MiB, and there is room for 0\.0"):
        corpora.add("b", text_of([1] * (PAGE_SIZE + 1)))
    with pytest.raises(ValueError, match=r"corpus 'a' takes .* MiB"):
        corpora.add("a", text_of([1] * 6 * PAGE_SIZE))
    for ours, theirs in zip(corpora.index, before, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    corpora.add("b", text_of(MARKER))
    corpora.add("a", text_of([1] * 4 * PAGE_SIZE))
    assert corpora.names == ["b", "a"]
    with pytest.raises(ValueError, match="there is no corpus 'c'; there are 'b', 'a'"):
        corpora.drop("c")


def test_answers_and_corpora_do_not_take_each_others_place():
    corpora = Corpora(texts={"a": text_of(MARKER)})
    texts = KnownTexts(1 << 16, NUM_DRAFT_TOKENS, corpora)
    before = [array.copy() for array in corpora.index]
    drafter = Drafter(VOCAB_SIZE, NUM_DRAFT_TOKENS, 0.02, texts=texts)
    rng = np.random.default_rng(0)
    for number in range(100):
        drafter.admit(f"{number}", 0)
        drafter.draft(f"{number}", rng.integers(VOCAB_SIZE, size=100).astype(np.int32), NO_ALIGNMENT, 0)
    assert int(texts._indexes[0].begun[0]) > len(texts._indexes[0].pages)
    for ours, theirs in zip(corpora.index, before, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_text_files_of_a_folder_are_read_and_others_counted(tmp_path):
    for name, content in {
        "b.txt": b"\xef\xbb\xbfsecond",
        "a/c.py": b"first",
        "empty": b"",
        "latin": "café".encode("latin-1"),
        "binary": b"a\0b",
        ".hidden": b"secret",
        ".git/config": b"secret",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    found = corpus_files.read_documents(str(tmp_path))
    assert sorted(found.texts) == ["first", "second"] and found.num_skipped == 4
    assert corpus_files.read_documents(str(tmp_path / "b.txt")) == (["second"], 0)
    digest = found.digest()
    (tmp_path / "b.txt").write_text("Second")
    assert corpus_files.read_documents(str(tmp_path)).digest() != digest
    with pytest.raises(FileNotFoundError):
        corpus_files.read_documents(str(tmp_path / "missing"))


def test_long_texts_are_tokenized_by_lines(monkeypatch):
    monkeypatch.setattr(corpus_files, "_PIECE_CHARS", 10)
    seen = []
    documents = corpus_files.Documents(["abc\ndefgh\nij", "k" * 25], 0)
    token_ids = corpus_files.tokenize(documents, lambda text: seen.append(text) or [len(text)])
    assert seen == ["abc\ndefgh\n", "ij", "k" * 10, "k" * 10, "k" * 5]
    assert token_ids.tolist() == [10, 2, -1, 10, 10, 5, -1]
    monkeypatch.setattr(corpus_files, "MAX_TOKENS", 4)
    with pytest.raises(ValueError, match="more than 4 tokens"):
        corpus_files.tokenize(documents, lambda text: [0])
    assert len(corpus_files.tokenize(corpus_files.Documents([], 3), len)) == num_pages(np.empty(0, np.int32)) == 0


def test_tokens_are_kept_for_their_user_and_for_the_same_text_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_files, "cache_folder", lambda: tmp_path)
    path, text = corpus_files.cache_path("/srv/docs", "tokenizer"), text_of(MARKER)
    assert path != corpus_files.cache_path("/srv/docs", "another")
    with pytest.raises(FileNotFoundError):
        corpus_files.load(path, "key", VOCAB_SIZE)
    corpus_files.save(path, text, "key")
    assert path.stat().st_mode & 0o777 == 0o600 and list(tmp_path.iterdir()) == [path]
    np.testing.assert_array_equal(corpus_files.load(path, "key", VOCAB_SIZE), text)
    for key, vocab_size in (("edited", VOCAB_SIZE), ("key", MARKER[-1])):
        with pytest.raises(TensorFileError):
            corpus_files.load(path, key, vocab_size)
    for damaged in (text[:-1], text.astype(np.int64), text.reshape(1, -1)):
        corpus_files.save(path, damaged, "key")
        with pytest.raises(TensorFileError):
            corpus_files.load(path, "key", VOCAB_SIZE)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(TensorFileError, match="can't be read"):
        corpus_files.load(path, "key", VOCAB_SIZE)


_WRITER = """
import sys
from pathlib import Path
import numpy as np
from vllm_aasd.drafting import corpus_files

path = Path(sys.argv[1])
for number in range(10**6):
    corpus_files.save(path, np.array([*[number % 900] * 20000, -1], np.int32), "key")
    if number == 3:
        print("written", flush=True)
"""


def test_a_killed_writer_leaves_a_whole_file(tmp_path):
    path = tmp_path / "corpus.safetensors"
    for _ in range(3):
        with subprocess.Popen([sys.executable, "-c", _WRITER, str(path)], stdout=subprocess.PIPE) as writer:
            assert writer.stdout.readline() == b"written\n"
            writer.send_signal(signal.SIGKILL)
        token_ids = corpus_files.load(path, "key", VOCAB_SIZE)
        assert len(token_ids) == 20001 and len(set(token_ids[:-1].tolist())) == 1
