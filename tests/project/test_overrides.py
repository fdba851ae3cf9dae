"""What a request may ask for: how its options are read, and that `stricter` means what it says."""

import dataclasses
import itertools
import time

import pytest
import torch

from vllm_aasd.config import Settings, looser_than, with_overrides
from vllm_aasd.kernels.verify import VerifyBatch, verify
from vllm_aasd.verification.table import PolicyBatch

ANY = Settings(allow_request_override="any")
STRICT = Settings(verification="strict")


def test_a_request_without_options_of_ours_has_the_servers_settings_themselves():
    assert with_overrides(ANY, {}) is ANY
    assert with_overrides(ANY, {"kv_transfer_params": {}, "session_id": "x", "AASD_beta": 1}) is ANY


@pytest.mark.parametrize("override", ["no", "stricter", "any"])
def test_a_prediction_changes_no_setting_and_may_always_come(override):
    server = Settings(allow_request_override=override)
    assert with_overrides(server, {"aasd_prediction": [1, 2]}) is server
    with pytest.raises(ValueError, match="Did you mean 'aasd_prediction'"):
        with_overrides(server, {"aasd_predicton": [1, 2]})


def test_options_are_the_servers_settings_by_the_same_names():
    options = {"aasd_verification": "conditional", "aasd_alpha": 0, "aasd_beta": 0.25, "other": None}
    for server in (ANY, dataclasses.replace(ANY, verification="strict")):
        assert with_overrides(server, options) == dataclasses.replace(ANY, alpha=0.0, beta=0.25)


def test_switches_may_come_as_http_front_ends_write_them_and_nothing_else_is_one():
    for value, wanted in [(True, True), (False, False), (1, True), (0, False), ("true", True), ("false", False)]:
        assert with_overrides(ANY, {"aasd_enabled": value}).enabled is wanted
    for value in (2, -1, 1.0, "True", "yes", "1", "", None, [1]):
        with pytest.raises(ValueError) as refusal:
            with_overrides(ANY, {"aasd_enabled": value})
        assert str(refusal.value) == "The request's aasd_enabled is not allowed: it takes true or false."


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("aasd_verification", "lossy", "'strict' or 'conditional' or 'fly' or 'budget'"),
        ("aasd_fly_window", 1.5, "an integer from 1 to 127"),
        ("aasd_budget_nats", -1, "a number from 0 to 10000"),
        ("aasd_alpha", [0.1], "a number from 0 to 10"),
        ("aasd_beta", float("nan"), "a number from 0 to 2"),
        ("aasd_beta", 10**30, "a number from 0 to 2"),
    ],
)
def test_refusals_are_in_the_servers_words_without_the_clients_value(key, value, allowed):
    with pytest.raises(ValueError) as refusal:
        with_overrides(ANY, {key: value})
    assert str(refusal.value) == f"The request's {key} is not allowed: it takes {allowed}."
    with pytest.raises(ValueError) as of_the_server:
        Settings.parse({key: value})
    assert str(of_the_server.value) == f"{key}={value!r} is not allowed: it takes {allowed}."


def test_unknown_options_and_the_servers_own_are_refused():
    with pytest.raises(
        ValueError, match=r"^Unknown request option 'aasd_betta'\. Did you mean 'aasd_beta'\? Known: aasd_a"
    ):
        with_overrides(ANY, {"aasd_betta": 0.5})
    for field in dataclasses.fields(Settings):
        if not field.metadata["looser"] and field.name != "corpora":
            with pytest.raises(ValueError, match=rf"^Unknown request option 'aasd_{field.name}'\."):
                with_overrides(ANY, {f"aasd_{field.name}": field.default})


@pytest.mark.parametrize(
    "options",
    [
        {"aasd_" + 5_000_000 * "secret": 1},
        {"aasd_betta": "secret"},
        {"aasd_alpha": ["secret"] * 1_000_000},
        {"aasd_verification": 5_000_000 * "secret"},
    ],
    ids=["name", "value of an unknown name", "list", "word"],
)
def test_a_refusal_takes_no_time_and_shows_no_value_however_long_the_option_is(options):
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        with pytest.raises(ValueError) as refusal:
            with_overrides(Settings(), options)
        seconds.append(time.perf_counter() - began)
    assert min(seconds) < 0.01
    text = str(refusal.value)
    assert len(text) < 1000 and text.count("secret") <= 80 // len("secret")
    assert "secret" not in text or text.startswith(f"Unknown request option 'aasd_{11 * 'secret'}")


def test_a_parameter_needs_its_rule():
    with pytest.raises(ValueError) as refusal:
        with_overrides(STRICT, {"aasd_beta": 0.75})
    text = "The request's aasd_beta is not allowed: it takes effect only with aasd_verification='conditional'."
    assert str(refusal.value) == text
    with pytest.raises(ValueError, match="takes effect only with"):
        with_overrides(ANY, {"aasd_verification": "budget", "aasd_beta": 0.75})


def test_no_means_nothing_at_all():
    server = Settings(allow_request_override="no")
    for key, value in {"aasd_enabled": False, "aasd_verification": "conditional", "aasd_beta": 1.0}.items():
        with pytest.raises(ValueError) as refusal:
            with_overrides(server, {key: value})
        text = f"The request's {key} is not allowed: the server's aasd_allow_request_override is 'no'."
        assert str(refusal.value) == text


@pytest.mark.parametrize(
    ("server", "options", "looser"),
    [
        (Settings(), {"aasd_alpha": 0.2}, "alpha"),
        (Settings(), {"aasd_beta": 0.4}, "beta"),
        (Settings(), {"aasd_relax_sampling": 1}, "relax_sampling"),
        (Settings(), {"aasd_collapse_guard": False}, "collapse_guard"),
        (Settings(), {"aasd_verification": "fly"}, "verification"),
        (Settings(verification="budget"), {"aasd_budget_nats": 3}, "budget_nats"),
        (Settings(verification="budget"), {"aasd_budget_nats": 0}, None),
        (Settings(verification="fly"), {"aasd_fly_window": 5}, "fly_window"),
        (Settings(verification="fly"), {"aasd_fly_window": 7, "aasd_collapse_guard": True}, None),
        # Stricter in one parameter doesn't make up for another.
        (Settings(), {"aasd_alpha": 0.0, "aasd_beta": 0.49}, "beta"),
        (STRICT, {"aasd_verification": "conditional"}, "verification"),
        (STRICT, {"aasd_verification": "conditional", "aasd_alpha": 0.0, "aasd_beta": 2.0}, "verification"),
        (Settings(), {"aasd_enabled": 0}, None),
        (Settings(enabled=False), {"aasd_enabled": 1}, None),
        (Settings(), {"aasd_verification": "strict"}, None),
        (STRICT, {"aasd_verification": "strict"}, None),
        (Settings(), {"aasd_alpha": 0.1, "aasd_beta": 0.5, "aasd_relax_sampling": 0}, None),
        (Settings(), {"aasd_alpha": 0.0, "aasd_beta": 0.6}, None),
        (Settings(relax_sampling=True), {"aasd_relax_sampling": "false"}, None),
    ],
)
def test_by_default_a_request_may_be_no_looser_than_the_server(server, options, looser):
    relaxed = with_overrides(dataclasses.replace(server, allow_request_override="any"), options)
    assert looser_than(relaxed, server) == looser
    if looser is None:
        assert with_overrides(server, options) == dataclasses.replace(relaxed, allow_request_override="stricter")
        return
    with pytest.raises(ValueError) as refusal:
        with_overrides(server, options)
    own = getattr(server, looser)
    assert str(refusal.value) == (
        f"The request's aasd_{looser} is not allowed: it is looser than the server's own {own!r}, and its "
        "aasd_allow_request_override is 'stricter'."
    )


GRIDS = {
    "conditional": {"alpha": (0.0, 0.05, 0.1, 0.2, 0.3), "beta": (0.35, 0.4, 0.45, 0.5, 1.5)},
    "fly": {"fly_window": (1, 2, 3), "fly_threshold": (0.1, 0.3, 0.5, 0.8, 1.0)},
    "budget": {"budget_nats": tuple(0.1 * step for step in range(1, 16))},
}


@pytest.mark.parametrize("rule", GRIDS)
def test_what_is_no_looser_accepts_nothing_that_the_server_would_reject(rule):
    """By the verify op itself, over random distributions, drafts often likely, and every pair of a grid of policies."""
    generator = torch.Generator().manual_seed(0)
    num_reqs, width, vocab_size = 300, 4, 6
    num_rows = num_reqs * width
    logits = torch.randn(num_rows, vocab_size, generator=generator) * torch.rand(num_rows, 1, generator=generator) * 3
    drafts = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0].int()
    is_greedy = torch.ones(num_reqs, dtype=torch.bool)
    cu_num = torch.arange(width, num_rows + 1, width, dtype=torch.int32)
    bonus = torch.zeros(num_reqs, 1, dtype=torch.int64)
    # What the collapse guard holds back depends on what was let by before.
    of_rule = Settings(verification=rule, collapse_guard=False)
    values = itertools.product(*GRIDS[rule].values())
    grid = [dataclasses.replace(of_rule, **dict(zip(GRIDS[rule], of, strict=True))) for of in values]
    grid.append(STRICT)
    accepted = {}
    for settings in grid:
        policies, stops = PolicyBatch(num_reqs).fill(
            [str(i) for i in range(num_reqs)], [settings.policy()] * num_reqs, [[]] * num_reqs
        )
        result = verify(VerifyBatch(drafts, cu_num, width, logits, bonus, is_greedy, policies, stops))
        accepted[settings] = result.num_sampled - 1
    assert max(int(counts.sum()) for counts in accepted.values()) > accepted[STRICT].sum() > 0
    allowed = denied = 0
    for asked, server in itertools.product(grid, grid):
        if looser_than(asked, server) is None:
            allowed += 1
            assert (accepted[asked] <= accepted[server]).all(), (asked, server)
        else:
            denied += bool((accepted[asked] > accepted[server]).any())
    assert allowed > 50 and denied > 50, "the order must allow some and its refusals be worth something"


def test_every_parameter_of_a_rule_has_its_rule_and_its_direction():
    for field in dataclasses.fields(Settings):
        rule, looser = field.metadata["rule"], field.metadata["looser"]
        assert looser in (None, "higher", "lower", "other", "none"), field.name
        of_a_rule = field.metadata["doc"].startswith("`")
        assert of_a_rule == (rule is not None), f"{field.name}: the text begins with the rule's name, or names none"
        if rule is not None:
            assert looser is not None and field.metadata["doc"].startswith(f"`{rule}`:"), field.name


@pytest.mark.parametrize("value", ["off", False, 0, "false"])
def test_a_request_can_keep_out_of_the_memory(value):
    assert with_overrides(Settings(), {"aasd_memory": value}).memory == "off"


@pytest.mark.parametrize(
    ("value", "allowed"), [(128, "'off', since requests share"), ("on", "'off' or"), (True, "'off'")]
)
def test_a_request_can_not_change_how_much_is_kept(value, allowed):
    with pytest.raises(ValueError, match=f"aasd_memory is not allowed: it takes {allowed}"):
        with_overrides(Settings(), {"aasd_memory": value})


@pytest.mark.parametrize(
    ("asked", "wanted"),
    [
        ({}, ("a", "b", "c", "d")),
        ("off", ()),
        ([], ()),
        ("e", ("e",)),
        (["e", "a", "e"], ("e", "a")),
        ("new", ("new",)),
    ],
)
def test_a_request_draws_from_the_corpora_that_it_names_or_from_the_servers_default(asked, wanted):
    server = Settings.parse({"aasd_corpora": {name: f"/{name}" for name in "abcde"}})
    options = {} if asked == {} else {"aasd_corpora": asked}
    assert with_overrides(server, options).asked_corpora == wanted
    default = dataclasses.replace(server, default_corpora=("b",))
    assert with_overrides(default, options).asked_corpora == (("b",) if asked == {} else wanted)


@pytest.mark.parametrize("value", [None, {}, 3, "a b", ["a", 1], ["a", "b", "c", "d", "e"], {"a": "/"}, "secret" * 20])
def test_what_names_no_corpora_is_refused_without_the_value(value):
    with pytest.raises(ValueError) as refusal:
        with_overrides(Settings(), {"aasd_corpora": value})
    assert str(refusal.value) == (
        "The request's aasd_corpora is not allowed: it takes a name, a list of at most 4 names, or 'off'."
    )
