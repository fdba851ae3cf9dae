"""The corpora of a worker: tokenized once, the same on all ranks, and drafted from again after a restart."""

import logging
from types import SimpleNamespace

import numpy as np
import pytest

from vllm_aasd.config import Settings
from vllm_aasd.drafting import corpus_files
from vllm_aasd.drafting.drafter import NO_ALIGNMENT, Drafter
from vllm_aasd.drafting.known_text import KnownTexts
from vllm_aasd.engine import corpora

TEXT = "abcdefghijklmnopqrstuvwxyz0123456789"


class Tokenizer:
    """A token for each character; counts the texts that it was given."""

    def __init__(self):
        self.num_texts = 0

    def get_vocab(self):
        return {chr(token): token for token in range(128)}

    def encode(self, text, add_special_tokens):
        assert not add_special_tokens
        self.num_texts += 1
        return [ord(letter) for letter in text]


@pytest.fixture
def tokenizer(monkeypatch, tmp_path):
    """That of the model; token files lie in a folder of the test."""
    one = Tokenizer()
    monkeypatch.setattr(corpora, "cached_tokenizer_from_config", lambda model: one)
    monkeypatch.setattr(corpora, "get_tp_group", lambda: SimpleNamespace(world_size=1, rank_in_group=0))
    (tmp_path / "cache").mkdir()
    monkeypatch.setattr(corpus_files, "cache_folder", lambda: tmp_path / "cache")
    return one


def served(tmp_path, **paths):
    """The corpora of a worker that starts."""
    settings = Settings.parse({"aasd_corpora": {name: str(path) for name, path in paths.items()}, "aasd_memory": 1})
    config = SimpleNamespace(aasd=settings, aasd_corpora_file=str(tmp_path / "names"))
    return corpora.ServerCorpora(SimpleNamespace(get_vocab_size=lambda: 128), config)


def drafted(of, *names):
    drafter = Drafter(128, 4, 0.02, texts=KnownTexts(1 << 20, 4, of))
    drafter.admit("", None, None, names)
    context = np.array([*map(ord, TEXT[:9])], np.int32)
    return "".join(map(chr, drafter.draft("", context, NO_ALIGNMENT, 4)[0]))


def test_after_a_restart_it_is_drafted_from_without_being_tokenized_again(tokenizer, tmp_path):
    (tmp_path / "docs").write_text(TEXT)
    (tmp_path / "other").write_text("ZYXW")
    for _ in range(2):
        found = served(tmp_path, docs=tmp_path / "docs", other=tmp_path / "other")
        assert drafted(found, "docs") == TEXT[9:13]
        assert drafted(found, "other") == drafted(found) == ""
    assert tokenizer.num_texts == 2
    (tmp_path / "docs").write_text("ZYXW, too")
    assert drafted(served(tmp_path, docs=tmp_path / "docs"), "docs") == ""
    assert tokenizer.num_texts == 3 and len(list((tmp_path / "cache").iterdir())) == 2


@pytest.mark.parametrize("content", [b"", b"\0" * 1000, b"not a tensor"])
def test_a_damaged_file_costs_a_warning(tokenizer, tmp_path, caplog, content):
    (tmp_path / "docs").write_text(TEXT)
    served(tmp_path, docs=tmp_path / "docs")
    (file,) = (tmp_path / "cache").iterdir()
    file.write_bytes(content)
    with caplog.at_level(logging.WARNING, "vllm.aasd"):
        assert drafted(served(tmp_path, docs=tmp_path / "docs"), "docs") == TEXT[9:13]
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1 and warnings[0].startswith(f"aasd: corpus 'docs' is tokenized again: {file}")
    assert drafted(served(tmp_path, docs=tmp_path / "docs"), "docs") == TEXT[9:13] and tokenizer.num_texts == 2


def test_what_is_added_and_dropped_is_known_to_front_ends(tokenizer, tmp_path):
    (tmp_path / "docs").write_text(TEXT)
    found = served(tmp_path)
    assert found.add_from("docs", str(tmp_path / "docs")) == ["docs"]
    assert (tmp_path / "names").read_text() == '["docs"]' and drafted(found, "docs") == TEXT[9:13]
    with pytest.raises(ValueError, match="name='a b' is not allowed"):
        found.add_from("a b", str(tmp_path / "docs"))
    with pytest.raises(ValueError, match="corpus 'x' at /nowhere can't be loaded: "):
        found.add_from("x", "/nowhere")
    assert found.remove("docs") == [] and (tmp_path / "names").read_text() == "[]"
    assert drafted(found, "docs") == ""


def test_on_another_machine_than_the_servers_nothing_changes(tokenizer, tmp_path):
    (tmp_path / "docs").write_text(TEXT)
    found = served(tmp_path, docs=tmp_path / "docs")
    found._names_file = str(tmp_path / "gone" / "names")
    for change in (lambda: found.remove("docs"), lambda: found.add_from("more", str(tmp_path / "docs"))):
        with pytest.raises(ValueError, match="the first worker isn't on the server's machine"):
            change()
    assert found.names == ["docs"]


def test_ranks_that_do_not_have_the_same_refuse_it_alike(tokenizer, tmp_path, monkeypatch):
    (tmp_path / "docs").write_text(TEXT)
    for other, message in (("can't be loaded: gone", "gone"), ("another digest", "isn't the same on all nodes")):
        monkeypatch.setattr(corpora, "gathered", lambda value, ranks, other=other: [value, other])
        with pytest.raises(ValueError, match=message):
            served(tmp_path, docs=tmp_path / "docs")


def test_without_a_tokenizer_there_are_none(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "cached_tokenizer_from_config", lambda model: None)
    (tmp_path / "docs").write_text(TEXT)
    with pytest.raises(ValueError, match="skip_tokenizer_init is set"):
        served(tmp_path, docs=tmp_path / "docs")
    assert served(tmp_path).names == []
