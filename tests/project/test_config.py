"""The settings: what is accepted, and what is refused and with which words."""

import dataclasses
from typing import get_args

import pytest

from vllm_aasd import config, corpus_names
from vllm_aasd.config import Settings


def test_defaults_are_valid_and_survive_parsing():
    defaults = Settings()
    given = {config.PREFIX + name: value for name, value in dataclasses.asdict(defaults).items()}
    assert Settings.parse(given) == defaults
    # Integers are numbers, and a word may stand beside a number or a switch.
    given = {"aasd_alpha": 0, "aasd_beta": 2, "aasd_draft_length": 5, "aasd_alignment": False}
    assert Settings.parse(given) == Settings(alpha=0.0, beta=2.0, draft_length=5, alignment=False)


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("aasd_beta", 2.1, "a number from 0 to 2"),
        ("aasd_beta", float("nan"), "a number from 0 to 2"),
        ("aasd_beta", True, "a number from 0 to 2"),
        ("aasd_draft_length", "long", "'adaptive' or an integer from 1 to 128"),
        ("aasd_draft_length", 4.0, "'adaptive' or an integer from 1 to 128"),
        ("aasd_draft_length", True, "'adaptive' or an integer from 1 to 128"),
        ("aasd_prior", True, "'off' or an integer from 0 to 86400"),
        ("aasd_memory", True, "'off' or an integer from 1 to 65536"),
        ("aasd_memory", "process", "'off' or an integer from 1 to 65536"),
        ("aasd_memory", "/tmp/x", "'off' or an integer from 1 to 65536"),
        ("aasd_alignment", "auto", "true or false"),
        ("aasd_alignment", 1, "true or false"),
        ("aasd_verification", "lossy", "'strict' or 'conditional' or 'fly' or 'budget'"),
        ("aasd_alpha", -1e-9, "a number from 0 to 10"),
        ("aasd_fly_window", 0, "an integer from 1 to 127"),
        ("aasd_fly_window", 2.5, "an integer from 1 to 127"),
        ("aasd_fly_threshold", 2, "a number from 0 to 1.1"),
        ("aasd_budget_nats", -0.1, "a number from 0 to 10000"),
        ("aasd_relax_sampling", "yes", "true or false"),
        ("aasd_corpora", "/srv/docs", corpus_names.ALLOWED_PATHS),
        ("aasd_corpora", {"a b": "/srv"}, corpus_names.ALLOWED_PATHS),
        ("aasd_corpora", {"off": "/srv"}, corpus_names.ALLOWED_PATHS),
        ("aasd_corpora", {"docs": ""}, corpus_names.ALLOWED_PATHS),
        ("aasd_default_corpora", ["a", "b", "c", "d", "e"], corpus_names.ALLOWED_NAMES),
        ("aasd_default_corpora", 3, corpus_names.ALLOWED_NAMES),
        ("aasd_default_corpora", "docs", "names of aasd_corpora: there are none"),
    ],
)
def test_a_refusal_names_the_key_the_value_and_what_is_allowed(key, value, allowed):
    with pytest.raises(ValueError) as refusal:
        Settings.parse({key: value})
    assert str(refusal.value) == f"{key}={value!r} is not allowed: it takes {allowed}."


def test_a_typo_is_refused_with_the_nearest_key():
    with pytest.raises(ValueError, match=r"Unknown setting 'aasd_betta'\. Did you mean 'aasd_beta'\? Known: "):
        Settings.parse({"aasd_betta": 2})


def test_what_is_gone_is_refused_with_what_to_use_instead():
    with pytest.raises(ValueError, match=r"^The setting 'aasd_draft' is gone: .* method to 'ngram'"):
        Settings.parse({"aasd_draft": "mixture"})
    settings = {config.PREFIX + field.name for field in dataclasses.fields(Settings)}
    for key, instead in config.REMOVED.items():
        assert key.startswith(config.PREFIX) and key not in settings and instead.endswith(".")


def test_a_refusal_shows_80_characters_of_a_name_or_a_value():
    with pytest.raises(ValueError) as refusal:
        Settings.parse({"aasd_" + 1000 * "x": 1})
    assert str(refusal.value).startswith(f"Unknown setting 'aasd_{71 * 'x'}.... Known: aasd_a")
    for value, shown in ((1000 * "y", f"'{76 * 'y'}..."), ([1] * 1000, f"[{25 * '1, '}1...")):
        with pytest.raises(ValueError) as refusal:
            Settings.parse({"aasd_fly_window": value})
        assert str(refusal.value) == f"aasd_fly_window={shown} is not allowed: it takes an integer from 1 to 127."


def test_every_setting_is_typed_documented_and_ranged():
    for field in dataclasses.fields(Settings):
        metadata = field.metadata
        kinds = set(get_args(field.type) or (field.type,))
        assert metadata["takes"] or kinds <= {str, bool, int, float}
        assert metadata["doc"].endswith(".")
        if metadata["takes"]:
            continue
        assert (str in kinds) == bool(metadata["choices"]), field.name
        assert bool(kinds & {int, float}) == bool(metadata["within"]), field.name
