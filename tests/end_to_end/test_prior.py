"""The prior: its file against damage and strangers, what it is asked for, and a real model's own successors."""

import os
import re
import stat
import subprocess
import sys
import tracemalloc
import types

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors.numpy import save_file

from aasd_testing import engines
from aasd_testing.chat_tokenizer import Tokenizer
from vllm_aasd import prior
from vllm_aasd.drafting import prior as prior_file
from vllm_aasd.drafting import tensor_file
from vllm_aasd.drafting.drafter import NO_ALIGNMENT, Drafter
from vllm_aasd.engine import prior_builder, prior_maker, shared_prior
from vllm_aasd.engine.model_key import model_key
from vllm_aasd.engine.prior_builder import emulates_bfloat16
from vllm_aasd.engine.prior_maker import assistant_prefix
from vllm_aasd.kernels.draft import Prior

VOCAB_SIZE = 7
FORMAT = {"format": "vllm-aasd prior, version 4", "model": "m"}
KEYS = ("ids", "probs")


def small_prior():
    rng = np.random.default_rng(0)
    ids = rng.integers(0, VOCAB_SIZE, (VOCAB_SIZE, 2)).astype(np.int32)
    return Prior(ids, np.full((VOCAB_SIZE, 2), 0.4, np.float32))


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_what_is_saved_is_loaded_by_those_whom_the_umask_lets(tmp_path, umask, mode):
    path = tmp_path / "folder" / "prior.safetensors"
    before = os.umask(umask)
    try:
        prior_file.save(path, small_prior(), "m")
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == mode
    loaded = prior_file.load(path, "m", VOCAB_SIZE)
    for found, saved in zip(loaded, small_prior(), strict=True):
        np.testing.assert_array_equal(found, saved)
    assert [file.name for file in path.parent.iterdir()] == [path.name], "no leftovers"


def test_a_failed_write_leaves_the_old_file_and_no_leftovers(tmp_path, monkeypatch):
    path = tmp_path / "prior.safetensors"
    prior_file.save(path, small_prior(), "m")
    before = path.read_bytes()
    monkeypatch.setattr(tensor_file.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        prior_file.save(path, small_prior(), "another")
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def damaged(**changes):
    return {**dict(zip(KEYS, small_prior(), strict=True)), **changes}


@pytest.mark.parametrize(
    ("tensors", "metadata", "reason"),
    [
        (damaged(), {}, "isn't a file of the format"),
        (damaged(), {**FORMAT, "format": "vllm-aasd prior, version 0"}, "isn't a file of the format"),
        ({"ids": small_prior().ids}, FORMAT, "isn't a file of the format"),
        (damaged(), {**FORMAT, "model": "other"}, "made with another model"),
        *(
            (damaged(ids=np.zeros(shape, np.int32)), FORMAT, "holds ids of type int32 and shape")
            for shape in [(), (0,), (7,), (0, 2), (7, 0), (7, 65), (1, 7, 2), (5, 2)]
        ),
        (damaged(ids=small_prior().ids.astype(np.int64)), FORMAT, "holds ids of type int64"),
        (damaged(ids=np.full((7, 2), 7, np.int32)), FORMAT, "outside of the vocabulary"),
        (damaged(ids=np.full((7, 2), -2, np.int32)), FORMAT, "outside of the vocabulary"),
        (damaged(probs=np.full((7, 2), 0.6, np.float32)), FORMAT, "no probabilities"),
        (damaged(probs=np.full((7, 2), -0.1, np.float32)), FORMAT, "no probabilities"),
        (damaged(probs=np.full((7, 2), np.nan, np.float32)), FORMAT, "no probabilities"),
    ],
)
def test_a_foreign_or_damaged_file_is_refused_with_its_reason(tmp_path, tensors, metadata, reason):
    path = tmp_path / "prior.safetensors"
    save_file(tensors, path, metadata)
    with pytest.raises(tensor_file.TensorFileError, match=reason):
        prior_file.load(path, "m", VOCAB_SIZE)


def cut_off(path):
    prior_file.save(path, small_prior(), "m")
    os.truncate(path, path.stat().st_size // 2)


def of_type(path, dtype):
    """A type that numpy doesn't know."""
    tensors = {name: torch.zeros(VOCAB_SIZE, 2).to(dtype) for name in KEYS}
    safetensors.torch.save_file(tensors, path, FORMAT)


def half_a_gibibyte(path):
    with path.open("wb") as file:
        file.truncate(1 << 29)


IN_ITS_PLACE = {
    "empty": lambda path: path.write_bytes(b""),
    "noise": lambda path: path.write_bytes(b"\xff" * 64),
    "cut off": cut_off,
    "bfloat16": lambda path: of_type(path, torch.bfloat16),
    "float8": lambda path: of_type(path, torch.float8_e4m3fn),
    "a FIFO": os.mkfifo,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "512 MiB": half_a_gibibyte,
    "a folder": lambda path: path.mkdir(),
    "a loop": lambda path: path.symlink_to(path),
    "runs of shape (0,)": lambda path: save_file(damaged(runs=np.empty(0, np.int32)), path, FORMAT),
}


@pytest.fixture
def load_prior(tmp_path, monkeypatch):
    """Has a server of the model ``m`` load its prior, from the path that is given first."""
    monkeypatch.setenv("AASD_CACHE_ROOT", str(tmp_path))
    monkeypatch.setattr(shared_prior, "model_key", lambda model, revision: "m")
    model = types.SimpleNamespace(model="m", revision=None, get_vocab_size=lambda: VOCAB_SIZE)
    return prior_file.cache_path("m"), lambda: shared_prior.own_prior(model)


@pytest.mark.parametrize("put", IN_ITS_PLACE.values(), ids=IN_ITS_PLACE)
def test_a_bad_file_costs_one_warning_and_the_server_starts_without(load_prior, put, caplog):
    path, load = load_prior
    put(path)
    tracemalloc.start()
    try:
        assert load() is None
        assert tracemalloc.get_traced_memory()[1] < 50 << 20
    finally:
        tracemalloc.stop()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert f"serving without a prior: {path}" in caplog.text


def stand_in(monkeypatch):
    """Has the command believe that there is a model ``m``."""
    model_config = types.SimpleNamespace(get_vocab_size=lambda: VOCAB_SIZE)
    engine = types.SimpleNamespace(model="m", revision=None, create_model_config=lambda: model_config)
    monkeypatch.setattr(prior_builder, "engine_arguments", lambda *_: engine)
    monkeypatch.setattr("vllm_aasd.engine.model_key.model_key", lambda model, revision: "m")


def test_the_command_says_before_it_works_that_it_can_not_write(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    stand_in(monkeypatch)
    monkeypatch.setattr(prior_builder, "ask_for_successors", lambda engine: pytest.fail("it has begun"))
    monkeypatch.setenv("AASD_CACHE_ROOT", str(tmp_path / "file"))
    with pytest.raises(SystemExit, match="can't be written to"):
        prior.main(["m", "--force"])
    monkeypatch.setenv("AASD_CACHE_ROOT", "relative")
    with pytest.raises(SystemExit, match="no folder to keep the prior in: set AASD_CACHE_ROOT"):
        prior.main(["m"])


def test_the_cache_is_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("AASD_CACHE_ROOT", raising=False)
    assert prior_file.cache_path("k") == tmp_path / "vllm_aasd" / "prior-k.safetensors"
    monkeypatch.setenv("AASD_CACHE_ROOT", str(tmp_path / "shared"))
    assert prior_file.cache_path("k") == tmp_path / "shared" / "prior-k.safetensors"


def model_folder(path, **files):
    path.mkdir()
    for name, content in {"config.json": b"{}", "model.safetensors": bytes(1 << 23), **files}.items():
        (path / name).write_bytes(content)
    return path


def test_a_models_key_is_its_content(tmp_path):
    key = model_key(str(model_folder(tmp_path / "a")))
    assert model_key(str(model_folder(tmp_path / "copy"))) == key
    changed = [
        {"config.json": b"{ }"},
        {"tokenizer.json": b"{}"},
        {"model.safetensors": bytes((1 << 23) + 1)},
        *({"model.safetensors": bytes(at) + b"x" + bytes((1 << 23) - at - 1)} for at in (0, 1 << 22, (1 << 23) - 1)),
    ]
    keys = [model_key(str(model_folder(tmp_path / f"b{i}", **files))) for i, files in enumerate(changed)]
    assert len({key, *keys}) == 1 + len(changed)
    assert model_key(str(model_folder(tmp_path / "c", **{"README.md": b"words"}))) == key


def test_a_model_that_is_not_here_has_no_key(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert model_key("nobody/no-such-model") is None
    assert model_key("s3://bucket/model") is None
    (tmp_path / "empty").mkdir()
    assert model_key(str(tmp_path / "empty")) is None


def test_the_prefix_is_what_the_template_puts_before_an_answer_or_what_begins_a_text():
    assert assistant_prefix(Tokenizer(lambda text, answer: f"U:{text}" + "A:" * answer)) == [ord("A"), ord(":")]
    for unusable in (lambda text, _: text, lambda text, answer: "x" * answer + text + "y", lambda *_: 1 / 0):
        tokenizer = Tokenizer(unusable)
        assert assistant_prefix(tokenizer) == [1]
        tokenizer.bos_token_id = None
        assert assistant_prefix(tokenizer) == []


def test_the_prior_drafts_where_nothing_matches():
    ids = np.array([[1], [2], [3], [0]], np.int32)
    drafter = Drafter(4, 3, 0.0, Prior(ids, np.full((4, 1), 0.5, np.float32)))
    draft_token_ids, survival = drafter.draft("a", np.array([0, 2], np.int32), NO_ALIGNMENT, 3)
    assert draft_token_ids[0] == 3 and survival[0] == pytest.approx(0.5)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    """A random Llama with a vocabulary of 300, and a tokenizer that knows as many words."""
    from tokenizers import Tokenizer as Words
    from tokenizers import models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=300, max_position_embeddings=512, **shape))
    # A fresh model's logits are all alike; these differ enough for an order that rounding does not change.
    model.lm_head.weight.data *= 40
    model.save_pretrained(path)
    words = Words(models.WordLevel({f"w{i}": i for i in range(300)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"bos_token": "w1", "eos_token": "w2", "unk_token": "w0"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(path)
    return path, model


@pytest.fixture(scope="module")
def successors(tiny_model):
    """What the tiny model says after each token at the beginning of a text: ids and probabilities."""
    pairs = torch.stack([torch.ones(300, dtype=torch.long), torch.arange(300)], dim=1)
    with torch.inference_mode():
        said = torch.softmax(tiny_model[1](pairs).logits[:, 1].float(), dim=-1).topk(prior_file.NUM_SUCCESSORS)
    return said.indices.numpy(), said.values.numpy()


@pytest.fixture
def command(tiny_model, tmp_path):
    """Runs the command on the tiny model, with more arguments."""
    environment = {
        **os.environ,
        "AASD_CACHE_ROOT": str(tmp_path),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }

    def run(*arguments):
        line = [sys.executable, "-m", "vllm_aasd.prior", str(tiny_model[0]), "--dtype", "float32"]
        done = subprocess.run([*line, *arguments], env=environment, text=True, capture_output=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return run


@pytest.mark.engine
def test_the_command_asks_for_what_is_missing(tiny_model, successors, tmp_path, command, monkeypatch, capsys):
    path, _ = tiny_model
    key = model_key(str(path))
    file = tmp_path / f"prior-{key}.safetensors"
    partial = prior_file.empty(300)
    # What an earlier start has asked for is kept.
    partial.ids[:100] = 7
    prior_file.save(file, partial, key)
    assert "written" in command()
    found = prior_file.load(file, key, 300)
    np.testing.assert_array_equal(found.ids[100:], successors[0][100:])
    np.testing.assert_allclose(found.probs[100:], successors[1][100:], rtol=1e-3)
    assert (found.ids[:100] == 7).all()

    monkeypatch.setenv("AASD_CACHE_ROOT", str(tmp_path))
    prior.main([str(path), "--dtype", "float32"])
    assert "there already" in capsys.readouterr().out


@pytest.mark.engine
@pytest.mark.parametrize("v2", [False, True])
def test_a_models_first_start_makes_its_prior(v2, tiny_model, successors, tmp_path, monkeypatch):
    path, _ = tiny_model
    monkeypatch.setenv("AASD_CACHE_ROOT", str(tmp_path))
    aasd = {"aasd_prior": 60, "aasd_verification": "strict"}
    with engines.engine(str(path), aasd=aasd, v2=v2, max_model_len=512) as started:
        # In these contexts nothing but the prior says what follows.
        served = started.run(engines.greedy([[1, token_id] for token_id in range(200, 216)], max_tokens=4))
        assert re.search(r"asked \S+ what follows 300 of its 300 tokens, in \d+ s", started.log())
    key = model_key(str(path))
    found = prior_file.load(prior_file.cache_path(key), key, 300)
    np.testing.assert_array_equal(found.ids, successors[0])
    np.testing.assert_allclose(found.probs, successors[1], rtol=1e-3)
    assert served.accepted > 0 and not any(served.faults.values())


def test_a_prior_is_made_within_its_time_the_most_frequent_tokens_first(monkeypatch):
    """A step takes a second on this clock; ids are those of a tokenizer that merges pairs, the most frequent first."""
    clock = iter(range(1000))
    monkeypatch.setattr(prior_maker.time, "monotonic", lambda: next(clock))
    steps = []

    def take_logits():
        req_ids = [request.req_id for request in steps[-1].scheduled_new_reqs]
        return req_ids[::-1], torch.eye(40)[[int(req_id.rpartition("-")[2]) for req_id in req_ids[::-1]]]

    made = prior_file.empty(40)
    made.ids[2] = 5
    maker = prior_maker.PriorMaker([], *engine_limits(max_num_seqs=4), steps.append, take_logits)
    assert maker.fill(made, 5.0, lambda answer: answer) == 8
    assert made.ids[:, 0].tolist() == [0, 1, 5, *range(3, 9), *[-1] * 31]
    asked = [[request.prompt_token_ids for request in step.scheduled_new_reqs] for step in steps]
    assert asked == [[[0], [1], [3], [4]], [[5], [6], [7], [8]], []]
    assert [len(step.finished_req_ids) for step in steps] == [0, 4, 4], "no request of ours is left"


@pytest.mark.parametrize(
    ("limits", "most"),
    [
        ({"max_num_seqs": 3}, 3),
        ({"max_num_batched_tokens": 5}, 5),
        ({"num_blocks": 6}, 5),
        ({"num_groups": 2, "num_blocks": 7}, 3),
    ],
)
def test_steps_stay_within_the_engines_limits(limits, most):
    steps = []

    def take_logits():
        req_ids = [request.req_id for request in steps[-1].scheduled_new_reqs]
        return req_ids, torch.zeros(len(req_ids), 40)

    maker = prior_maker.PriorMaker([], *engine_limits(**limits), steps.append, take_logits)
    assert maker.fill(prior_file.empty(40), 1e9, lambda answer: answer) == 40
    assert max(len(step.scheduled_new_reqs) for step in steps) == most
    for step in steps:
        blocks = [block for request in step.scheduled_new_reqs for group in request.block_ids for block in group]
        assert len(set(blocks)) == len(blocks) and 0 not in blocks


def engine_limits(max_num_seqs=256, max_num_batched_tokens=2048, num_blocks=1000, num_groups=1):
    """The parts of an engine's configuration that limit its steps."""
    groups = [types.SimpleNamespace(kv_cache_spec=types.SimpleNamespace(block_size=16))] * num_groups
    return (
        types.SimpleNamespace(max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens),
        types.SimpleNamespace(num_blocks=num_blocks, kv_cache_groups=groups),
    )


@pytest.mark.parametrize(
    ("is_cpu", "emulates", "dtype"), [(True, True, "float32"), (True, False, "auto"), (False, True, "auto")]
)
def test_the_prior_is_made_in_float32_where_bfloat16_is_emulated(monkeypatch, is_cpu, emulates, dtype):
    monkeypatch.setattr(prior_builder, "current_platform", types.SimpleNamespace(is_cpu=lambda: is_cpu))
    monkeypatch.setattr(prior_builder, "emulates_bfloat16", lambda: emulates)
    assert prior_builder.engine_arguments("model", []).dtype == dtype
    assert prior_builder.engine_arguments("model", ["--dtype", "float16"]).dtype == "float16"


@pytest.mark.parametrize(
    ("described", "emulates"),
    [
        ("processor : 0\nflags\t\t: fpu sse2 avx2 fma\n", True),
        ("flags\t\t: fpu avx2 avx512f avx512_bf16\n", False),
        ("flags\t\t: fpu amx_bf16\n", False),
        ("Features\t: fp asimd bf16\n", False),
        ("", False),
    ],
)
def test_older_x86_cpus_emulate_bfloat16(described, emulates):
    assert emulates_bfloat16(described) is emulates
