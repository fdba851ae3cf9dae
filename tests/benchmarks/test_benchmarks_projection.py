"""Step times by bytes and operations, batches replayed, the ablation: against known answers. No engine."""

import math

import numpy as np
import pytest

from benchmarks import (
    ablation,
    figures,
    measured_curve,
    projection,
    projection_report,
    replay,
    results,
    roofline,
    traces,
)
from benchmarks.ngram import NgramDrafter
from vllm_aasd.drafting.drafter import Drafter
from vllm_aasd.kernels.draft import Prior
from vllm_aasd.tuning import statistics

# vLLM's n-gram proposer hands numba a list.
pytestmark = pytest.mark.filterwarnings("ignore::numba.core.errors.NumbaPendingDeprecationWarning")

SPAN = list(range(10, 30))
NO_SUCCESSORS = Prior(np.full((40, 1), -1, np.int32), np.zeros((40, 1), np.float32))


def trace(prompt, answer, category="copy", prompt_logprobs=None):
    logprobs = [{str(token): math.log(0.9), "1": math.log(0.1)} for token in answer]
    given = {"token_ids": answer, "logprobs": logprobs, "prompt_logprobs": prompt_logprobs or [None] * len(prompt)}
    return replay._trace(category, prompt, given)


def copying():
    return trace([*SPAN, 1, *SPAN[:2]], SPAN[2:])


# Step times


def test_the_shapes_have_the_published_numbers_of_weights():
    weights = {target.name: target.layer_weights + 2 * target.head_weights for target in projection.TARGETS}
    assert weights == {
        "Llama-3.1-8B": pytest.approx(8.03e9, rel=0.002),
        "Qwen2.5-32B": pytest.approx(32.76e9, rel=0.002),
    }
    assert projection.TARGETS[0].kv_bytes == 128 * 1024


def test_a_step_is_bytes_over_bandwidth_and_operations_over_arithmetic():
    target = roofline.Target("t", 1, 2, 1, 1, 2, 3, 5)
    # 2 * 2 * 2 * (1 + 1) = 16 of attention and 3 * 2 * 3 = 18 of the feed-forward: 34; head 10; KV 8 bytes a token.
    assert (target.layer_weights, target.head_weights, target.kv_bytes) == (34, 10, 8)
    machine = roofline.Machine("m", 1.0, 1.0, overhead=1000.0, request_overhead=100.0, overlap=False)
    found = roofline.step_time(target, machine, 2, 6, context=7, logit_passes=1)
    moved = 2 * 34 + 2 * 7 * 8 + (2 * 10 + 4 * 5 * 6)
    computed = 2 * 34 * 6 + 4 * 2 * 7 * 6 + 2 * 10 * 6
    assert found == 1000 + 2 * 100 + moved + computed
    overlapped = roofline.step_time(target, machine._replace(overlap=True), 2, 6, context=7, logit_passes=1)
    assert overlapped == 1200 + max(68, 408) + max(112, 336) + max(140, 120)


def test_requests_fit_beside_the_weights():
    target = roofline.Target("t", 1, 2, 1, 1, 2, 3, 5)
    machine = roofline.Machine("m", 1.0, 1.0, memory=2 * (34 + 20) + 3 * 7 * 8 + 1)
    assert roofline.most_requests(target, machine, 7) == 3
    assert roofline.most_requests(target, machine._replace(memory=10.0), 7) == 0


def test_a_curve_that_the_model_made_is_found_again(monkeypatch):
    made = roofline.Machine("made", 3e10, 2e11, request_overhead=5e-4, overlap=False)
    plain = {n: float(roofline.step_time(measured_curve.SMOLLM2, made, n, n, 512, 2)) for n in (1, 16)}
    monkeypatch.setattr(measured_curve, "SECONDS", plain)
    monkeypatch.setattr(measured_curve, "RELATIVE", {n: tuple(measured_curve.relative(made, n)) for n in (1, 4, 16)})
    assert measured_curve.check(overlap=False)["largest_error"] < 0.01
    # Another form doesn't fit it.
    assert measured_curve.check(overlap=True)["largest_error"] > 0.05


def test_the_form_that_the_projection_uses_is_the_one_that_follows_the_measured_curve():
    used, other = measured_curve.check(projection.MODES[0].overlap), measured_curve.check(overlap=True)
    assert used["mean_error"] < 0.06 < other["mean_error"]
    assert used["predicted"]["mean_error"] < 0.06


# Batches


def test_one_request_at_a_time_is_a_batch_of_one():
    members = [copying(), trace([2, 3, 4, 2], [3, 7, 8, 9])]
    one = replay.replay(members, Drafter(40, 8, 0.0), 8, 0.01)
    batch = replay.closed_loop(members, Drafter(40, 8, 0.0), 8, replay.priced(8, 0.01))
    assert one[:4] == batch[:4]
    assert len(batch.batches) == batch.steps


def test_a_batch_emits_every_token_once_and_in_fewer_steps():
    members = [copying() for _ in range(5)]
    times = np.ones(3 * 9 + 1)
    found = replay.closed_loop(members, Drafter(40, 8, 0.0), 8, times, 3)
    assert found.emitted == 5 * 17 == sum(step.emitted for step in found.batches)
    assert found.seconds == len(found.batches) < found.steps


def test_only_full_batches_count_in_a_steady_run():
    members = [copying() for _ in range(7)]
    found = replay.closed_loop(members, Drafter(40, 8, 0.0), 8, np.ones(28), 3, steady=np.random.default_rng(0))
    assert found.steps == 3 * len(found.batches) > 0


def test_drafts_cost_more_in_a_batch_and_get_shorter():
    members = [copying() for _ in range(4)]
    cheap = replay.closed_loop(members, Drafter(40, 8, 0.0), 8, np.ones(19), 2)
    dear = replay.closed_loop(members, Drafter(40, 8, 0.0), 8, np.maximum(np.arange(19) - 1.0, 1) ** 2, 2)
    assert cheap.drafted > dear.drafted == 0
    assert dear.steps == dear.emitted


def test_ngram_is_replayed_whole():
    found = replay.closed_loop([copying()], NgramDrafter(64), 5, np.ones(7), 1, replay.whole_drafts)
    # A perfect copy in drafts of 5: 17 tokens in 3 steps, all accepted.
    assert (found.steps, found.emitted) == (3, 17) and found.accepted.all()


# Traces


def test_predictions_at_prompt_positions_stand_before_the_tokens_that_they_predict():
    at_prompt = [None, {"6": math.log(0.8), "2": math.log(0.1)}, {"3": math.log(0.6)}]
    full = trace([5, 6, 7], [8, 9], prompt_logprobs=at_prompt)
    assert full.table[:, 0].tolist() == [5, 6, 7, 8, -1]
    assert full.table[0, 1:3].tolist() == [6, 2] and full.table[1, 1] == 3
    assert np.array_equal(replay.generated_only(full).table, trace([5, 6, 7], [8, 9]).table)
    assert (replay.without_predictions(full).table == -1).all()


def test_traces_come_back_as_they_were_saved(tmp_path):
    members = [copying(), trace([2, 3], [4], "other")]
    traces.save(tmp_path / "t.npz", members)
    for one, other in zip(traces.load(tmp_path / "t.npz"), members, strict=True):
        assert one[::2] == (other.category, other.num_prompt_tokens)
        assert np.array_equal(one.token_ids, other.token_ids) and np.array_equal(one.table, other.table)
    assert [path.name for path in tmp_path.iterdir()] == ["t.npz"]


# Projection


def projected(monkeypatch, batches=(1, 4)):
    monkeypatch.setattr(projection, "MODES", projection.MODES[:2])
    monkeypatch.setattr(projection, "DRAFT_SCHEDULE", ((2, 4), (3, 2)))
    members = [copying()] * 3 + [trace([2, 3, 4, 2], [3, 7, 8, 9], "qa")] * 3
    rows = projection.rows(members, NO_SUCCESSORS, list(batches))
    return {
        "metadata": {
            "command": "c", "time": "t", "commit": "x", "uncommitted_changes": False,
            "versions": {}, "machine": {"cpu": "c", "cores": 1, "memory_gib": 1}, "conditions": {"pays": 1.05},
        },
        "assumptions": list(projection.ASSUMPTIONS),
        "check": {"no overlap": measured_curve.check(overlap=False)},
        "targets": [projection.alignment_cost(target, name) for target in projection.TARGETS for name in projection.PEAKS],
        "rows": rows,
        "fixed_lengths": projection.fixed_lengths(members, NO_SUCCESSORS),
    }  # fmt: skip


def test_a_projection_says_what_it_is_and_all_that_it_assumes(monkeypatch):
    result = projected(monkeypatch)
    text = projection_report.report(result)
    assert projection_report.TITLE in text and all(one in text for one in projection.ASSUMPTIONS)
    # Two targets, machines and batches each; two mixes in the first mode (nothing leans on its input), one in the other.
    assert len(result["rows"]) == 8 * (2 + 1)
    axes = [axis for axis in figures.projection(result).axes if axis.get_visible()]
    assert [axis.get_title() for axis in axes] == [f"{t}, {m}" for t, m in projection_report.places(result)]


def test_speed_up_is_tokens_by_time_over_plain_decoding():
    steps = [replay.Step(8, 4), replay.Step(4, 0)]
    times = np.array([0.0, 0.0, 0.0, 0.0, 2.0, 0.0, 0.0, 0.0, 4.0])
    # 12 tokens in 4 + 2 seconds; plain: 4 in 2.
    found = projection.figures(steps, times, batch=4, plain=2.0)
    assert found["speed_up"] == 1.0 and found["mal"] == 1.5 and found["drafted_per_step"] == 0.5
    assert found["drafting_may_take_ms"] == pytest.approx(projection.DRAFTING * 1e3)


def test_what_is_served_pays_for_the_longest_draft_of_every_request(monkeypatch):
    rows = projected(monkeypatch)["rows"]
    first = next(row for row in rows if row["batch"] == 1 and row["traffic"] == "all")
    device = projection.machine(first["machine"], projection.MODES[0])
    wide = roofline.step_time(projection.TARGETS[0], device, 1, 5, projection.CONTEXT, projection.ALIGNED_LOGIT_PASSES)
    served = first["methods"][projection.SERVED]
    assert first["longest_draft"] == 4 and served["drafted_per_step"] < 4
    assert served["step_ms"] == pytest.approx(1e3 * (wide + projection.DRAFTING))


def test_what_is_served_is_the_best_of_the_widths_that_the_scheduler_has(monkeypatch):
    result = projected(monkeypatch, batches=(4,))
    widths = {row["length"]: row["speed_up"] for row in result["fixed_lengths"] if row["batch"] == 4}
    rows = [row for row in result["rows"] if row["traffic"] == "all"]
    for mode in projection.MODES:
        found = [row["methods"][projection.SERVED]["speed_up"] for row in rows if row["mode"] == mode.name]
        best = [max(speeds) for speeds in zip(*(widths[length][mode.name] for length in (0, 2, 4)), strict=True)]
        assert found == pytest.approx(best)
    # Where a position costs a step there is none.
    monkeypatch.setattr(
        projection, "wide_step_times", lambda target, device, batch, length: np.full(99, 1.0 + 9 * length)
    )
    (row, *_) = projected(monkeypatch, batches=(4,))["rows"]
    assert row["longest_draft"] == 0 and row["methods"][projection.SERVED]["mal"] == 1.0


def test_widths_that_were_not_chosen_stand_beside_the_one_that_was(monkeypatch):
    result = projected(monkeypatch)
    assert [row["batch"] for row in result["fixed_lengths"][:: len(projection.FIXED_LENGTHS)]] == [1, 2, 3, 4, 6]
    found = projection_report.widths(result, 1)
    assert [one["length"] for one in found if one["first"]] == [4]
    assert found[0]["lowest"] < found[0]["mean"] < 1 < found[4]["lowest"]
    assert f"{found[4]['mean']:.2f} [{found[4]['lowest']:.2f}] *" in projection_report.report(result)


def test_no_longest_draft_of_the_schedule_is_projected_to_cost_speed():
    result = results.read(results.RESULTS / "projection.json")
    batches = list(dict.fromkeys(row["batch"] for row in result["fixed_lengths"]))
    for batch in batches:
        found = projection_report.widths(result, batch)
        (first,) = (one for one in found if one["first"])
        assert first["length"] == projection.first_length(batch)
        assert first["lowest"] > 0.985, batch
        if first["length"]:
            assert first["mean"] > 0.97 * max(one["mean"] for one in found), batch
    assert first["length"] == 0 and all(one["lowest"] < 0.98 for one in found if one["length"]), batch


def test_a_method_stops_paying_behind_the_last_batch_that_pays():
    rows = [{"batch": b, "methods": {"m": {"speed_up": s}}} for b, s in ((1, 1.5), (2, 1.0), (4, 1.2), (8, 1.01))]
    assert projection_report.stops(rows, "m", 1.05) == "8"
    assert projection_report.stops(rows[:3], "m", 1.05) == "beyond 4"
    assert projection_report.stops(rows, "m", 2.0) == "1"


# Ablation


def test_a_gain_is_paired():
    ours, theirs = ([2, 4, 6], [1, 1, 1]), ([1, 2, 3], [1, 1, 1])
    found = statistics.stratified_gain(ours, theirs, ["a", "a", "b"])
    # Twice as fast on each question, whichever are drawn.
    assert found == {"value": 2.0, "low": 2.0, "high": 2.0}


def test_every_stage_is_replayed_at_every_price():
    members = ablation.mixed([copying() for _ in range(4)] + [trace([2, 3, 4, 2], [3, 7, 8, 9], "other")] * 2)
    found = ablation.ablate(members, NO_SUCCESSORS)
    assert list(found) == [stage.name for stage in ablation.STAGES]
    first = found["retrieval only"]
    assert all(of["gain"]["value"] == 1.0 for of in first.values())
    # Length doesn't follow the price before the last stage, speed does.
    assert len({of["mal"]["value"] for of in first.values()}) == 1
    assert len({of["speed"]["value"] for of in first.values()}) == 3
    adaptive, fixed = found["+ adaptive length"]["0.33"], found["+ memory"]["0.33"]
    assert adaptive["drafted_per_step"] < fixed["drafted_per_step"]
