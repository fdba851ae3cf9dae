"""From the speculative config that a user writes to the one that vLLM runs, on vLLM's own `EngineArgs`."""

import copy
import dataclasses
import logging
import pickle
import types

import pytest
from vllm.config import CUDAGraphMode, ParallelConfig, SpeculativeConfig
from vllm.config.utils import replace
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.spec_decode.dynamic.utils import build_dynamic_sd_schedule_lookup
from vllm.v1.worker.gpu import cudagraph_utils

from vllm_aasd import plugin
from vllm_aasd.config import Settings
from vllm_aasd.engine import configuration, patching, unsupported


@pytest.fixture(autouse=True)
def registered():
    """The method is known while a test runs, and forgotten after it."""
    replacements = configuration.install()
    yield
    for replacement in replacements:
        replacement.undo()


@pytest.fixture
def create(demo_model):
    """Build the speculative config, and the engine's other settings, from a user's."""

    def build(speculative_config, **options):
        args = EngineArgs(model=demo_model, speculative_config=speculative_config, **options)
        return args.create_engine_config()

    return build


def test_the_method_alone_is_a_configuration(create):
    config = create({"method": "aasd"})
    speculative_config = config.speculative_config
    assert speculative_config.aasd == Settings()
    assert speculative_config.num_speculative_tokens == 32
    assert create({"method": "aasd"}, enable_lora=True).speculative_config.num_speculative_tokens == 7
    assert config.parallel_config.worker_cls == unsupported.CPU_WORKER
    assert "method='aasd'" in repr(speculative_config) and "aasd_beta=0.5" in repr(speculative_config)


@pytest.mark.parametrize("is_v2", [False, True])
def test_the_servers_command_line_gives_a_configuration(demo_model, monkeypatch, is_v2):
    """Its defaults aren't those of `EngineArgs`."""
    monkeypatch.setattr(configuration, "chooses_v2", lambda: is_v2)
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    asked = parser.parse_args(["--model", demo_model, "--speculative-config", '{"method": "aasd"}'])
    args = EngineArgs.from_cli_args(asked)
    model_config = args.create_model_config()
    parallel_config = ParallelConfig()
    found = args.create_speculative_config(model_config, parallel_config)
    assert found.aasd == Settings() and found.method == ("ngram_gpu" if is_v2 else "custom_class")


def test_the_config_survives_what_vllm_does_to_it(create):
    original = create({"method": "aasd", "aasd_beta": 0.75, "num-speculative-tokens": 5}).speculative_config
    for twin in (
        pickle.loads(pickle.dumps(original)),
        copy.deepcopy(original),
        replace(original, num_speculative_tokens=5),
    ):
        assert twin.aasd == Settings(beta=0.75, fly_window=4)
        assert twin.num_speculative_tokens == 5
        assert repr(twin) == repr(original)


@pytest.mark.parametrize(
    ("drafts", "asked", "window"), [(8, {}, 6), (4, {}, 3), (1, {}, 1), (8, {"aasd_fly_window": 2}, 2)]
)
def test_flys_window_leaves_a_place_for_the_mismatch(create, drafts, asked, window):
    config = create({"method": "aasd", "aasd_verification": "fly", "num_speculative_tokens": drafts, **asked})
    assert config.speculative_config.aasd.fly_window == window


def test_the_same_arguments_can_be_built_twice(demo_model):
    args = EngineArgs(model=demo_model, speculative_config={"method": "aasd", "aasd_beta": 0.75})
    first, second = args.create_engine_config(), args.create_engine_config()
    assert first.speculative_config.aasd == second.speculative_config.aasd == Settings(beta=0.75)


def test_a_server_that_takes_no_unknown_variable_of_vllms_takes_ours(create, monkeypatch, tmp_path):
    monkeypatch.setenv("AASD_CACHE_ROOT", str(tmp_path))
    # The second one finds what the first has set.
    for _ in range(2):
        assert create({"method": "aasd"}, fail_on_environ_validation=True).speculative_config.aasd_metrics_folder


def test_the_method_may_come_beside_the_json(create):
    config = create({"aasd_beta": 0.75}, spec_method="aasd", spec_tokens=3).speculative_config
    assert config.aasd == Settings(beta=0.75, fly_window=2) and config.num_speculative_tokens == 3
    assert create(None, spec_method="aasd").speculative_config.aasd == Settings()


def scheduled_lengths(config):
    """By the number of requests, as vLLM's scheduler reads it."""
    of = config.speculative_config
    return build_dynamic_sd_schedule_lookup(of.num_speculative_tokens_per_batch_size, 200, of.num_speculative_tokens)


def test_where_a_step_is_as_wide_as_the_longest_draft_the_width_goes_by_the_number_of_requests(create, on_v2):
    config = create({"method": "aasd"})
    lengths = scheduled_lengths(config)
    assert [lengths[n] for n in (1, 4, 5, 16, 17, 128, 129, 200)] == [7, 7, 3, 3, 1, 1, 0, 0]
    assert "by requests [(1, 4, 7), (5, 16, 3)," in repr(pickle.loads(pickle.dumps(config)).speculative_config)


@pytest.mark.parametrize(("longest", "lengths"), [(16, [16, 3, 1, 0]), (5, [5, 3, 1, 0]), (1, [1, 1, 1, 0])])
@pytest.mark.parametrize("is_flag", [False, True])
def test_drafts_are_at_most_as_long_as_somebody_says(create, on_v2, longest, lengths, is_flag):
    keys, options = ({}, {"spec_tokens": longest}) if is_flag else ({"num_speculative_tokens": longest}, {})
    config = create({"method": "aasd", **keys}, **options)
    assert config.speculative_config.num_speculative_tokens == longest
    assert [scheduled_lengths(config)[n] for n in (4, 16, 128, 200)] == lengths
    assert config.speculative_config.aasd_learns_widths


@pytest.mark.parametrize(
    ("most", "lengths"),
    [(1, [7]), (2, [7, 0]), (5, [7, 0]), (64, [7, 3, 1, 0]), (128, [7, 3, 1, 0]), (129, [7, 3, 1, 0])],
)
def test_vllm_captures_graphs_of_steps_without_drafts_whatever_the_most_requests(create, on_v2, most, lengths):
    of = create({"method": "aasd"}, max_num_seqs=most).speculative_config
    found = build_dynamic_sd_schedule_lookup(of.num_speculative_tokens_per_batch_size, most, of.num_speculative_tokens)
    assert sorted(set(found[1:]), reverse=True) == lengths


def piecewise(config, longest):
    """Steps within what vLLM captures, as (requests, draft length), that vLLM has no full CUDA graph for."""
    config.compilation_config.cudagraph_mode = mode = CUDAGraphMode.FULL_AND_PIECEWISE
    config.compilation_config.cudagraph_capture_sizes = config.compilation_config.max_cudagraph_capture_size = None
    config._set_cudagraph_sizes()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("get_pp_group", "is_breakable_cudagraph_enabled"):
            patch.setattr(cudagraph_utils, name, lambda: types.SimpleNamespace(is_first_rank=True, is_last_rank=True))
        patch.setattr(type(cudagraph_utils.current_platform), "get_global_graph_pool", lambda self: None)
        graphs = cudagraph_utils.CudaGraphManager(config, "cpu", mode, longest + 1)
    graphs._graphs_captured = True
    most = config.compilation_config.max_cudagraph_capture_size
    return [
        (n, length)
        for length in sorted({0, *scheduled_lengths(config)[1:]})
        for n in range(1, min(config.scheduler_config.max_num_seqs, most // (length + 1)) + 1)
        if graphs.dispatch(n, n * (length + 1), length + 1, 0, length + 1).cg_mode != CUDAGraphMode.FULL
    ]


@pytest.mark.parametrize("most", [2, 5, 8, 12, 64, 100, 128, 256, 1024])
def test_every_step_that_vllm_captures_has_a_full_graph(create, on_v2, most):
    assert piecewise(create({"method": "aasd"}, max_num_seqs=most), 7) == []


def test_lengths_that_do_not_nest_have_no_graphs_and_are_warned_of(create, on_v2, caplog):
    with caplog.at_level(logging.WARNING, "vllm.aasd"):
        assert piecewise(create({"method": "aasd", "num_speculative_tokens": 15}, max_num_seqs=256), 15) == []
        assert "CUDA graphs" not in caplog.text
        assert piecewise(create({"method": "aasd", "num_speculative_tokens": 8}, max_num_seqs=256), 8)
    assert "with num_speculative_tokens=8, full CUDA graphs exist for some" in caplog.text


def test_a_scheduler_that_does_not_learn_drafts_for_the_most_requests_too(create, on_v2):
    config = create({"method": "aasd"}, max_num_seqs=16, scheduler_cls="my.Scheduler")
    assert scheduled_lengths(config)[16] == 3


@pytest.mark.parametrize(
    ("keys", "options", "scheduler", "learns"),
    [
        ({}, {}, unsupported.SCHEDULER, True),
        ({}, {"scheduler_cls": "my.Scheduler"}, "my.Scheduler", False),
        ({"num_speculative_tokens_per_batch_size": [[1, 9, 6]]}, {}, unsupported.SCHEDULER, False),
        ({"aasd_draft_length": 3}, {}, unsupported.SCHEDULER, False),
        ({}, {"async_scheduling": False}, unsupported.SCHEDULER, False),
        ({}, {"data_parallel_size": 2}, unsupported.SCHEDULER, False),
    ],
)
def test_the_scheduler_learns_widths_where_it_can_choose_them(create, on_v2, keys, options, scheduler, learns):
    config = create({"method": "aasd", **keys}, **options)
    assert config.scheduler_config.scheduler_cls == scheduler
    found = pickle.loads(pickle.dumps(config)).speculative_config
    assert found.aasd_learns_widths is learns and ("as learned" in repr(found)) is learns


@pytest.mark.parametrize(
    ("keys", "options", "longest"),
    [
        ({}, {"async_scheduling": False}, 7),
        ({}, {"data_parallel_size": 2}, 2),
        ({"num_speculative_tokens": 5}, {"async_scheduling": False}, 5),
        ({"num_speculative_tokens": 5}, {"data_parallel_size": 2}, 5),
        ({"aasd_draft_length": 3}, {}, 3),
        ({"aasd_draft_length": 40, "num_speculative_tokens": 5}, {}, 5),
        ({"aasd_draft_length": 3, "num_speculative_tokens": 5}, {}, 3),
        ({"aasd_draft_length": 3}, {"spec_tokens": 5}, 3),
        ({"aasd_draft_length": 3}, {"data_parallel_size": 2}, 3),
    ],
)
def test_one_width_where_the_server_says_so_or_vllm_takes_no_other(create, on_v2, keys, options, longest):
    found = create({"method": "aasd", **keys}, **options).speculative_config
    assert (found.num_speculative_tokens, found.num_speculative_tokens_per_batch_size) == (longest, None)


def test_vllms_own_methods_are_untouched(create):
    stock = create({"method": "ngram", "num_speculative_tokens": 3})
    assert stock.speculative_config.method == "ngram"
    assert stock.parallel_config.worker_cls != unsupported.CPU_WORKER
    assert create(None).speculative_config is None
    with pytest.raises(ValueError, match="Input should be"):
        create({"method": "aasdf"})


@pytest.mark.parametrize(
    ("keys", "options", "message"),
    [
        ({"aasd_betta": 2}, {}, "Unknown setting 'aasd_betta'. Did you mean 'aasd_beta'?"),
        ({"aasd_top_k": 2}, {}, "The setting 'aasd_top_k' is gone: it is a constant now."),
        ({"aasd_fly_window": 0}, {}, "aasd_fly_window=0 is not allowed: it takes an integer from 1 to 127."),
        ({"num_speculative_tokens": 0}, {}, "num_speculative_tokens=0 is not allowed: it takes an integer from 1"),
        ({"num_speculative_tokens": 129}, {}, "num_speculative_tokens=129 is not allowed"),
        ({"num_speculative_tokens": "5"}, {}, "num_speculative_tokens='5' is not allowed"),
        ({}, {"spec_tokens": 129}, "num_speculative_tokens=129 is not allowed"),
        ({"no_such_key": 1}, {}, "no_such_key"),
        (
            {"prompt_lookup_max": 3},
            {},
            "can't work with prompt_lookup_max=3: it belongs to another speculative method or to a draft model",
        ),
        ({"revision": 1000 * "x"}, {}, f"revision='{76 * 'x'}...: it belongs to another"),
        (
            {"model": "some/drafter"},
            {"tensor_parallel_size": 2},
            "can't work with tensor_parallel_size=2: with a draft model",
        ),
        (
            {"model": "some/drafter"},
            {"data_parallel_size": 2},
            "can't work with data_parallel_size=2: with a draft model",
        ),
        ({"model": "some/drafter"}, {"enable_lora": True}, "can't work with enable_lora=True: with a draft model"),
        (
            {"model": "some/drafter", "draft_tensor_parallel_size": 1},
            {},
            "can't work with draft_tensor_parallel_size=1",
        ),
        ({}, {"spec_model": "some/drafter"}, "can't work with spec_model='some/drafter'"),
        ({"aasd_drafter": "model"}, {}, "can't work with aasd_drafter='model': there is no draft model"),
        ({"aasd_drafter": "eagle"}, {}, "aasd_drafter='eagle' is not allowed: it takes 'both' or 'text' or 'model'."),
        ({"rejection_sample_method": "synthetic"}, {}, "can't work with rejection_sample_method='synthetic'"),
        ({"draft_sample_method": "probabilistic"}, {}, "can't work with draft_sample_method='probabilistic'"),
        ({"enable_adaptive_verification": True}, {}, "can't work with enable_adaptive_verification=True"),
        (
            {"num_speculative_tokens_per_batch_size": [[1, 8, 4]]},
            {},
            "can't work with num_speculative_tokens_per_batch_size=[[1, 8, 4]]: drafts adapt to the load",
        ),
        ({}, {"worker_cls": "my.Worker"}, "can't work with worker_cls='my.Worker'"),
        ({}, {"kv_sharing_fast_prefill": True}, "can't work with kv_sharing_fast_prefill=True"),
        ({}, {"async_scheduling": True}, "can't work with async_scheduling=True"),
        ({}, {"pipeline_parallel_size": 2}, "can't work with pipeline_parallel_size=2"),
        (
            {},
            {"tensor_parallel_size": 2, "decode_context_parallel_size": 2},
            "can't work with decode_context_parallel_size=2",
        ),
    ],
)
def test_what_cannot_work_is_refused_at_start_up(create, keys, options, message):
    with pytest.raises(ValueError) as refusal:
        create({"method": "aasd", **keys}, **options)
    assert message in str(refusal.value)


def test_a_draft_model_has_a_config_of_its_own(create, demo_model):
    config = create({"method": "aasd", "model": demo_model, "max_model_len": 512, "num_speculative_tokens": 5})
    found = config.speculative_config
    assert found.method == configuration.V1_BASE_METHOD and found.num_speculative_tokens == 5
    assert found.draft_model_config is found.target_model_config and config.num_lookahead_tokens == 0
    draft = pickle.loads(pickle.dumps(found)).aasd_draft_model
    assert draft.method == "draft_model" and draft.model == demo_model and draft.num_speculative_tokens == 1
    assert draft.draft_model_config.max_model_len == 512
    assert f"model={demo_model!r}" in repr(found)
    assert create({"method": "aasd", "model": None}).speculative_config.aasd_draft_model is None


def test_drafters_that_are_no_models_are_refused_by_the_method_that_vllm_has_for_them():
    config = types.SimpleNamespace(method="eagle", model="some/eagle-head")
    with pytest.raises(ValueError, match=r"can't work with model='some/eagle-head': for vLLM .* method 'eagle'"):
        unsupported.check_draft_model(config)


def test_a_target_that_sees_images_has_no_draft_model():
    with pytest.raises(ValueError, match="the target takes more than text"):
        unsupported.check_target_of_draft_model(types.SimpleNamespace(is_multimodal_model=True))


@pytest.mark.parametrize(
    ("chosen", "method"), [("0", configuration.V1_BASE_METHOD), ("1", configuration.V2_BASE_METHOD)]
)
def test_the_base_method_leads_to_the_runner_that_vllm_chooses(create, monkeypatch, chosen, method):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", chosen)
    monkeypatch.setattr("vllm.config.vllm.HAS_TRITON", True)
    config = create({"method": "aasd", "num_speculative_tokens": 5})
    assert config.speculative_config.method == method
    assert config.use_v2_model_runner is (chosen == "1")
    assert config.parallel_config.worker_cls == unsupported.CPU_WORKER
    for twin in (pickle.loads(pickle.dumps(config)).speculative_config, replace(config.speculative_config)):
        assert twin.aasd == Settings(fly_window=4) and twin.num_speculative_tokens == 5


def test_without_triton_or_with_microbatches_it_is_v1(monkeypatch):
    arguments = {
        "enable_dbo": False,
        "ubatch_size": 0,
        "distributed_executor_backend": "mp",
        "pipeline_parallel_size": 2,
    }

    def chosen(**changed):
        return configuration.base_method(types.SimpleNamespace(**{**arguments, **changed}))

    monkeypatch.setattr(configuration, "HAS_TRITON", True)
    assert chosen() == configuration.V2_BASE_METHOD
    assert chosen(enable_dbo=True) == chosen(ubatch_size=2) == configuration.V1_BASE_METHOD
    assert chosen(distributed_executor_backend="external_launcher") == configuration.V1_BASE_METHOD
    monkeypatch.setattr(configuration, "HAS_TRITON", False)
    assert chosen() == configuration.V1_BASE_METHOD


@pytest.mark.parametrize(
    ("keys", "options", "message"),
    [
        ({}, {"pipeline_parallel_size": 2}, "can't work with pipeline_parallel_size=2: with synchronous scheduling"),
        ({}, {"enable_lora": True}, "can't work with enable_lora=True: vLLM 0.32's V2"),
        ({"model": "some/model"}, {}, "can't work with model='some/model': a draft model is run on vLLM's V1"),
        (
            {},
            {"enable_lora": True, "lora_target_modules": ["q_proj", "model.lm_head"]},
            "allowed is false, or lora_target_modules without 'lm_head'",
        ),
    ],
)
def test_what_the_v2_runner_cannot_is_refused_at_start_up(create, monkeypatch, keys, options, message):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    with pytest.raises(ValueError) as refusal:
        create({"method": "aasd", **keys}, **options)
    assert message in str(refusal.value)


def test_adapters_that_leave_the_lm_head_alone_run_on_v2():
    unsupported.check("V2", EngineArgs(enable_lora=True, lora_target_modules=["q_proj", "v_proj"]), {}, Settings())


@pytest.mark.parametrize(("scheduling", "is_refused"), [(None, False), (True, False), (False, True)])
def test_on_gpus_pipelines_need_asynchronous_scheduling(monkeypatch, scheduling, is_refused):
    monkeypatch.setattr(unsupported, "current_platform", types.SimpleNamespace(is_cpu=lambda: False))
    args = EngineArgs(pipeline_parallel_size=2, async_scheduling=scheduling)
    if is_refused:
        with pytest.raises(ValueError, match="can't work with pipeline_parallel_size=2"):
            unsupported.check("V2", args, {}, Settings())
    else:
        unsupported.check("V2", args, {}, Settings())


def test_gpus_run_v2_and_nothing_else(create, monkeypatch):
    gpu = types.SimpleNamespace(is_cpu=lambda: False, is_cuda_alike=lambda: True, device_name="cuda")
    monkeypatch.setattr(configuration, "current_platform", gpu)
    monkeypatch.setattr("vllm.config.vllm.HAS_TRITON", True)
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    assert create({"method": "aasd"}).parallel_config.worker_cls == unsupported.GPU_WORKER
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    with pytest.raises(ValueError, match="can't work with model_runner='V1': on GPUs it needs vLLM's V2"):
        create({"method": "aasd"})
    gpu.is_cuda_alike = lambda: False
    with pytest.raises(ValueError, match="it runs on CUDA, ROCm and vLLM's CPU platform"):
        create({"method": "aasd"})


def test_every_key_of_vllms_is_of_another_method_unless_we_say_otherwise(create):
    others = {field.name for field in dataclasses.fields(SpeculativeConfig)} - {
        "method", "num_speculative_tokens", "num_speculative_tokens_per_batch_size", "model",
        "rejection_sample_method", "draft_sample_method", "enable_adaptive_verification",
    }  # fmt: skip
    assert {"draft_tensor_parallel_size", "quantization", "max_model_len", "suffix_decoding_min_token_prob"} < others
    for key in others:
        with pytest.raises(ValueError, match=f"can't work with {key}=1: it belongs to another speculative method"):
            create({"method": "aasd", key: 1})
    create({"method": "aasd", "model": None, "rejection_sample_method": "standard", "draft_sample_method": "greedy"})


@pytest.mark.parametrize("method", [{}, {"method": "ngram"}, {"method": None}])
def test_our_keys_without_our_method_are_refused_with_its_name(create, method):
    with pytest.raises(ValueError, match=r"aasd_beta=0\.75 is a setting of method 'aasd': add \"method\": \"aasd\""):
        create({**method, "num_speculative_tokens": 3, "aasd-beta": 0.75})


def test_models_that_generate_no_tokens_are_refused(create):
    assert create(None, runner="pooling").model_config.runner_type == "pooling"
    with pytest.raises(ValueError, match=r"can't work with runner='pooling': .* leave out --speculative-config"):
        create({"method": "aasd"}, runner="pooling")


@pytest.mark.parametrize("kind", ["is_encoder_decoder", "is_diffusion"])
def test_models_that_generate_otherwise_are_refused(kind):
    model = types.SimpleNamespace(runner_type="generate", is_encoder_decoder=False, is_diffusion=False)
    unsupported.check_model(model)
    setattr(model, kind, True)
    with pytest.raises(ValueError, match=f"can't work with {kind}=True: .* leave out --speculative-config"):
        unsupported.check_model(model)


def test_an_unknown_vllm_refuses_the_method_and_nothing_else(create, monkeypatch):
    monkeypatch.setattr(patching, "vllm_version", lambda: "9.9.9")
    with pytest.raises(patching.UnsupportedVLLMError, match=r"vLLM 9\.9\.9 is installed"):
        create({"method": "aasd"})
    assert create({"method": "ngram", "num_speculative_tokens": 3}).speculative_config.method == "ngram"


def test_register_never_raises(monkeypatch, caplog):
    def broken():
        raise RuntimeError("vLLM has moved")

    monkeypatch.setattr(configuration, "install", broken)
    plugin.register()
    assert "method 'aasd' isn't available" in caplog.text


def test_corpora_are_checked_where_the_server_starts(create, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"aasd_corpora=\{'docs': '/nowhere'\} is not allowed: there is no such file"):
        create({"method": "aasd", "aasd_corpora": {"docs": "/nowhere"}})
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    config = create({"method": "aasd", "aasd_corpora": {"docs": "docs"}}).speculative_config
    assert config.aasd.corpora == (("docs", str(tmp_path / "docs")),) and config.aasd_corpora_file
    assert create({"method": "aasd"}).speculative_config.aasd_corpora_file == ""
