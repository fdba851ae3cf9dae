"""Who shares text with whom."""

from types import SimpleNamespace

import numpy as np
import pytest
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.scheduler import Scheduler

from vllm_aasd.config import Settings
from vllm_aasd.engine import scheduler
from vllm_aasd.engine.failsafe import Faults
from vllm_aasd.engine.namespaces import Namespaces, namespace_of, prediction_of
from vllm_aasd.engine.v1.requests import V1Requests


def request(salt=None, adapter=None, params=None):
    lora = None if adapter is None else SimpleNamespace(lora_name=adapter)
    params = SamplingParams() if params is None else params
    return SimpleNamespace(cache_salt=salt, lora_request=lora, sampling_params=params)


def assigned(namespaces, **of):
    asked = request(**of)
    namespaces.assign(asked)
    return namespace_of(asked.sampling_params)


def test_requests_share_by_salt_and_adapter():
    namespaces = Namespaces()
    kinds = [{}, {"salt": "a"}, {"salt": "b"}, {"adapter": "a"}, {"salt": "a", "adapter": "a"}]
    first, again = ([assigned(namespaces, **of) for of in kinds] for _ in range(2))
    assert first == again
    assert len(set(first)) == len(kinds)
    assert all(0 <= namespace < 2**63 for namespace in first)
    assert assigned(namespaces, salt="") == first[0], "vLLM takes an empty salt for none"


def test_a_reset_parts_later_requests_from_earlier_ones():
    namespaces = Namespaces()
    before = assigned(namespaces, salt="a")
    namespaces.reset()
    assert assigned(namespaces, salt="a") != before


def test_a_client_can_not_choose_its_namespace():
    params = SamplingParams(extra_args={"vllm_aasd.namespace": 7, "kept": 1})
    given = params.extra_args
    assert assigned(Namespaces(), params=params) != 7
    assert params.extra_args["kept"] == 1
    assert given == {"vllm_aasd.namespace": 7, "kept": 1}, "the client's own object"


def test_namespaces_of_engines_differ():
    assert assigned(Namespaces(), salt="a") != assigned(Namespaces(), salt="a")


def test_a_request_without_sampling_parameters_is_left_alone():
    pooling = SimpleNamespace(cache_salt=None, lora_request=None, sampling_params=None)
    Namespaces().assign(pooling)
    assert namespace_of(None) is None


@pytest.mark.parametrize(
    ("settings", "shares_text", "options", "expected"),
    [
        (Settings(), True, {}, 5),
        (Settings(), False, {}, None),
        (Settings(memory="off"), True, {}, None),
        (Settings(), True, {"aasd_memory": "off"}, None),
        (Settings(), True, {"aasd_memory": False}, None),
    ],
)
def test_whose_text_a_v1_request_gets(settings, shares_text, options, expected):
    requests = V1Requests(settings, Faults(), shares_text)
    params = SamplingParams(extra_args={"vllm_aasd.namespace": 5, **options})
    assert requests.admit(["a"], {"a": SimpleNamespace(sampling_params=params)}) == ["a"]
    assert requests["a"].namespace == expected


def test_a_prediction_is_token_ids():
    assert prediction_of(SamplingParams(extra_args={"aasd_prediction": [1, 2]})).tolist() == [1, 2]
    assert prediction_of(SamplingParams(extra_args={"aasd_prediction": [1, 2]})).dtype == np.int32
    for nothing in (None, [], "text"):
        assert prediction_of(SamplingParams(extra_args={"aasd_prediction": nothing})) is None


@pytest.fixture
def new_scheduler(monkeypatch):
    """Our scheduler over a fake of vLLM's, which notes the namespaces of what is added."""
    added = []

    def init(self, **_):
        self.dynamic_sd_lookup, self.num_spec_tokens, self.max_num_running_reqs = None, 4, 2
        self.structured_output_manager = None

    monkeypatch.setattr(Scheduler, "__init__", init)
    monkeypatch.setattr(Scheduler, "add_request", lambda self, one: added.append(namespace_of(one.sampling_params)))
    monkeypatch.setattr(Scheduler, "reset_prefix_cache", lambda self, *_: True)

    def make(is_v2):
        config = SimpleNamespace(
            speculative_config=None,
            scheduler_config=SimpleNamespace(async_scheduling=False),
            model_config=SimpleNamespace(skip_tokenizer_init=True),
            use_v2_model_runner=is_v2,
        )
        return scheduler.AASDScheduler(vllm_config=config), added

    return make


def test_the_scheduler_assigns_and_resets(new_scheduler):
    ours, added = new_scheduler(is_v2=False)
    for _ in range(2):
        ours.add_request(request(salt="a"))
    assert ours.reset_prefix_cache()
    ours.add_request(request(salt="a"))
    assert added[0] == added[1] != added[2]
    assert None not in added


def test_v1_steps_are_not_filled_up_with_drafts(new_scheduler):
    """vLLM does so where it has no schedule of lengths."""
    assert new_scheduler(is_v2=False)[0].dynamic_sd_lookup == [4, 4, 4]
    assert new_scheduler(is_v2=True)[0].dynamic_sd_lookup is None
