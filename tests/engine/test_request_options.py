"""The options of a request where vLLM takes it in, and in a worker that gets what should have been refused."""

import inspect
import logging
import types

import pytest
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams, StructuredOutputsParams

from vllm_aasd.config import Settings
from vllm_aasd.engine import corpus_names, request_options
from vllm_aasd.engine.failsafe import Faults
from vllm_aasd.engine.v1.requests import V1Requests
from vllm_aasd.kernels.verify.policies import BETA, CONDITIONAL, STRICT

# Another test of this process may have had vLLM load the plugin, whose replacements stay.
STOCK = {name: inspect.unwrap(getattr(SamplingParams, name)) for name in ("verify", "__repr__")}


@pytest.fixture
def verify(monkeypatch):
    """vLLM's check with ours on top, by a server's settings; None for another method."""
    for name, stock in STOCK.items():
        monkeypatch.setattr(SamplingParams, name, stock)
    replacements = request_options.install()
    assert len(replacements) == len(STOCK) and request_options.install() == []
    monkeypatch.setattr(SamplingParams, "_validate_logprobs", lambda *args: None)
    for check in ("logit_bias", "trace_replay", "stop_token_ids", "allowed_token_ids", "diffusion"):
        monkeypatch.setattr(SamplingParams, f"_validate_{check}", lambda *args: None)
    monkeypatch.setattr(SamplingParams, "_validate_structured_outputs", lambda *args: None)

    def check(server, **params):
        config = types.SimpleNamespace(aasd=server) if server is not None else None
        SamplingParams(**params).verify(None, config, None, None)

    yield check
    for replacement in replacements:
        replacement.undo()
    assert {name: getattr(SamplingParams, name) for name in STOCK} == STOCK


def test_a_bad_option_is_the_clients_error(verify):
    with pytest.raises(ValueError, match=r"^The request's aasd_beta is not allowed: it takes a number from") as refusal:
        verify(Settings(), extra_args={"aasd_beta": 7})
    assert isinstance(refusal.value, VLLMValidationError) and refusal.value.parameter == "extra_args"


def test_good_options_and_those_of_others_pass(verify):
    verify(Settings())
    verify(Settings(), extra_args={"kv_transfer_params": {"x": 1}})
    verify(Settings(), extra_args={"aasd_verification": "strict", "mine": "x"})


def test_vllms_own_checks_still_hold(verify):
    with pytest.raises(VLLMValidationError, match="min_p"):
        verify(Settings(), min_p=0.5, extra_args={"aasd_enabled": True})


def test_other_methods_take_no_notice(verify):
    verify(None, extra_args={"aasd_beta": 7})
    config = types.SimpleNamespace(method="ngram")
    SamplingParams(extra_args={"aasd_beta": 7}).verify(None, config, None, None)


def admitted(settings, *options):
    requests = V1Requests(settings, Faults())
    params = [SamplingParams(temperature=0.0, extra_args=extra) for extra in options]
    states = {str(number): types.SimpleNamespace(sampling_params=one) for number, one in enumerate(params)}
    requests.admit(states, states)
    return requests


def test_a_worker_ignores_what_should_have_been_refused_and_says_so_once(caplog):
    request_options._warn_once.cache_clear()
    bad = {"aasd_beta": "secret", "aasd_enabled": False}
    with caplog.at_level(logging.WARNING, "vllm.aasd"):
        requests = admitted(Settings(), bad, {"aasd_verification": "strict"}, None, {"aasd_nonsense": [1]})
    rules = [requests[str(number)].verification.policy.rule for number in range(4)]
    assert rules == [CONDITIONAL, STRICT, CONDITIONAL, CONDITIONAL]
    assert requests.is_drafted("0"), "of a bad request nothing is followed, so that it is the server's own"
    assert len(caplog.records) == 1 and "secret" not in caplog.text


def test_a_request_keeps_its_policy_object_and_is_forgotten_with_its_end():
    requests = admitted(Settings(), {"aasd_beta": 0.75}, {"aasd_enabled": 0})
    policy = requests["0"].verification.policy
    requests.admit(["0", "1"], {})
    assert requests["0"].verification.policy is policy and policy.parameters[BETA] == 0.75
    assert requests.is_drafted("0") and not requests.is_drafted("1")
    requests.forget(["1", "never seen"])
    assert len(requests) == 1
    requests.admit(["1"], {"1": types.SimpleNamespace(sampling_params=SamplingParams())})
    assert requests.is_drafted("1"), "a later request may have that id"


def test_a_pooling_request_has_no_sampling_parameters():
    requests = V1Requests(Settings(), Faults())
    requests.admit(["p"], {"p": types.SimpleNamespace(sampling_params=None)})
    assert requests["p"].verification.stop_token_ids == []


@pytest.mark.parametrize(
    ("relaxes_sampling", "asked", "is_strict"),
    [
        (False, {"temperature": 0.7}, True),
        (True, {"temperature": 0.7}, False),
        (False, {}, False),
        (True, {"logprobs": 1}, True),
        (True, {"structured_outputs": StructuredOutputsParams(regex="a*")}, True),
    ],
)
def test_sampling_grammars_and_logprobs_make_a_request_strict(relaxes_sampling, asked, is_strict):
    params = SamplingParams(**{"temperature": 0.0, "stop_token_ids": [5, 3], **asked})
    asked = request_options.verification_of(Settings(relax_sampling=relaxes_sampling), params)
    assert asked.is_strict is is_strict and asked.stop_token_ids == ([] if is_strict else [3, 5])


def test_a_corpus_that_is_not_there_is_the_clients_error(verify, tmp_path):
    server = Settings.parse({"aasd_corpora": {"docs": "/srv/docs", "api": "/srv/api"}})
    config = types.SimpleNamespace(aasd=server, aasd_corpora_file=str(tmp_path / "names"))

    def ask(*names):
        params = SamplingParams(extra_args={"aasd_corpora": list(names)})
        params.verify(None, config, None, None)

    ask("api", "docs")
    ask()
    with pytest.raises(ValueError) as refusal:
        ask("secret")
    allowed = "a name, a list of at most 4 names, or 'off'. Known: 'docs', 'api'."
    assert str(refusal.value).startswith(f"The request's aasd_corpora is not allowed: it takes {allowed}")
    # What workers have added and dropped since the start.
    corpus_names.write_names(config.aasd_corpora_file, ["new"])
    ask("new")
    with pytest.raises(ValueError, match="Known: 'new'"):
        ask("docs")
    corpus_names.write_names(config.aasd_corpora_file, [f"name{number}" for number in range(1000)])
    with pytest.raises(ValueError, match=r"'name19', \.\.\.\. "):
        ask("docs")


def test_a_draft_model_that_is_not_there_is_the_clients_error(verify):
    with pytest.raises(ValueError, match="The request's aasd_drafter is not allowed: the server has no draft model"):
        verify(Settings(), extra_args={"aasd_drafter": "model"})
    verify(Settings(), extra_args={"aasd_drafter": "text"})
    config = types.SimpleNamespace(aasd=Settings(), aasd_draft_model=object())
    SamplingParams(extra_args={"aasd_drafter": "model"}).verify(None, config, None, None)
