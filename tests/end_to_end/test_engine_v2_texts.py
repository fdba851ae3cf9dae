"""Earlier answers on the V2 model runner, its kernels interpreted, through the real engine."""

import pytest

from aasd_testing.engines import engine, greedy, with_options

pytestmark = pytest.mark.engine

# Their answers repeat little of them.
PROMPTS = ["Write two sentences about the sea.", "Why do cats sleep so much?"]
MAX_TOKENS = 20


def of(salt, **options):
    return [{**request, "salt": salt} for request in with_options(greedy(PROMPTS, MAX_TOKENS), **options)]


def test_answers_are_drafted_from_by_their_tenant_alone_and_corpora_by_who_names_them(
    demo_model, plain_engine, tmp_path
):
    """Twice the same, then for two other tenants, then for the first again, which wants nothing of it."""
    answers = plain_engine.run(greedy(PROMPTS, MAX_TOKENS))
    plain = answers.token_ids
    (tmp_path / "answers").write_text("".join(f"{output['text']}\n" for output in answers.outputs))
    corpora = {"answers": str(tmp_path), "other": __file__}
    aasd = {"aasd_verification": "strict", "num_speculative_tokens": 4, "aasd_memory": 4}
    aasd |= {"aasd_corpora": corpora, "aasd_default_corpora": "off"}
    alone = {"aasd_memory": "off"}
    requests = [of("one"), of("one"), of("two"), of(None), of("one", **alone), of(None, aasd_corpora="other", **alone)]
    with engine(demo_model, v2=True, aasd=aasd) as v2:
        rounds = [v2.run(of_round) for of_round in requests]
        named = v2.run(of(None, aasd_corpora=["other", "answers"], **alone))
        assert v2.rpc("aasd_drop_corpus", "answers") == [["other"]]
        assert v2.rpc("aasd_add_corpus", "again", str(tmp_path)) == [["other", "again"]]
        again = v2.run(of(None, aasd_corpora="again", **alone))
        assert v2.rpc("aasd_drop_corpus", "again") == [["other"]]
        rounds.append(v2.run(of(None, aasd_corpora="other", **alone)))
        log = v2.log()
    for found in (named, again):
        assert found.token_ids == plain and found.faults == {}
        assert sum(map(len, plain)) - found.accepted < 0.6 * (sum(map(len, plain)) - rounds[0].accepted)
    assert [found.token_ids for found in rounds] == [plain] * len(rounds)
    assert all(found.faults == {} for found in rounds) and "failed" not in log
    steps = [sum(map(len, plain)) - found.accepted for found in rounds]
    assert steps[1] < 0.6 * steps[0], steps
    # They find no text, and draft from their own context as the first did.
    assert min(steps[2:]) > 0.9 * steps[0], steps
