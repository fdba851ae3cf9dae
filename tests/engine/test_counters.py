"""The figures: their names, what is read of the counters, and the line in the log."""

import torch

from vllm_aasd.counters import LENGTH_BOUNDS, METRICS, TIME_BOUNDS, Counters, summary
from vllm_aasd.kernels import count


def read(counters):
    return {(name, label): value for name, label, value in counters.read()}


def counted():
    counters = Counters("cpu")
    count.count_drafts(
        counters.totals,
        torch.tensor([5, 6, 7, 8, 9]),
        torch.tensor([0, 2, 5]),
        0,
        torch.tensor([2, 4]),
        torch.tensor([0, 1]),
        torch.tensor([[0.9, 0.4, 0.0], [1.0, 0.95, 0.9]]),
        torch.tensor([False, False, True, False, False]),
        torch.tensor([0.0, 0.0, 0.5, 0.0, 0.0]),
        torch.empty(0, dtype=torch.bool),
        torch.tensor([True, False]),
    )
    counters.lookups += torch.tensor([6, 3, 1])
    counters.drafter_time.observe(0.0004)
    counters.drafter_time.observe(0.0006)
    counters.verifier_time.observe(9.0)
    return counters


def test_every_metric_is_read_from_the_start():
    figures = Counters("cpu").read()
    assert list(dict.fromkeys(figure.name for figure in figures)) == [m.name for m in METRICS if m.name != "faults"]
    assert all(figure.value == 0 or not any(figure.value.counts) for figure in figures)


def test_what_was_counted_is_read():
    got = read(counted())
    assert got["draft_tokens", ""] == 5 and got["accepted_tokens", ""] == 4
    assert got["relaxed_tokens", ""] == 1 and got["regret_nats", ""] == 0.5
    assert got["budget_exhausted", ""] == 0 and got["collapse_guard_engaged", ""] == 1
    lengths = got["draft_length", ""]
    assert dict(zip(LENGTH_BOUNDS, lengths.counts, strict=False))[2] == lengths.counts[2] == 1 and lengths.sum == 5
    assert sum(lengths.counts) == 2
    assert got["survival_tokens", "0.9-1.0"] == 4 and got["survival_accepted", "0.9-1.0"] == 4
    assert abs(got["survival_promised", "0.9-1.0"] - 3.75) < 1e-6
    assert got["survival_tokens", "0.4-0.5"] == 1 and got["survival_accepted", "0.4-0.5"] == 0
    assert [got["store_lookups", result] for result in ("hit", "miss", "stale")] == [6, 3, 1]
    assert got["verifier_time_seconds", ""].counts[len(TIME_BOUNDS)] == 1
    assert got["drafter_time_seconds", ""].counts[TIME_BOUNDS.index(5e-4)] == 1


def test_each_length_falls_into_its_bucket():
    for length in (1, 5, 6, 7, 128):
        counters = Counters("cpu")
        counters.totals[count.LENGTHS + length - 1] = 1
        counts = read(counters)["draft_length", ""].counts
        bucket = counts.index(1)
        assert sum(counts) == 1
        assert length <= LENGTH_BOUNDS[bucket] and (bucket == 0 or length > LENGTH_BOUNDS[bucket - 1])


def test_faults_are_read_by_place():
    counters = Counters("cpu")
    counters.faults = {"draft": 2, "store": 0}
    assert read(counters)["faults", "draft"] == 2 and read(counters)["faults", "store"] == 0


def test_clearing_forgets_the_warm_up():
    counters = counted()
    totals = counters.totals
    counters.clear()
    assert counters.totals is totals, "somebody holds it"
    assert counters.read() == Counters("cpu").read()


def test_the_line_in_the_log():
    counters = counted()
    assert summary(Counters("cpu").read(), counters.read()) == (
        "Drafted: 5 tokens, 2.50 a draft, Accepted: 80.0%, Promised: 83.0% and kept 80.0%, "
        "Relaxed: 1 tokens, 0.50 nats, Drafter: 0.50 ms a step, Verifier: 9000.00 ms a step, Store hit rate: 60.0%"
    )
    before = counters.read()
    assert summary(before, counters.read()) is None, "nothing new"
