"""Earlier answers as a source of drafts in the real engine: what they gain, and who gets none of them."""

import pytest

from aasd_testing.engines import greedy, with_options
from aasd_testing.prompts import real_prompts

pytestmark = [pytest.mark.engine, pytest.mark.xdist_group("V1 engines")]

PROMPTS = real_prompts(4, max_chars=600)
TENANT = "tenant of this module"


def asked(salt=TENANT, **options):
    requests = with_options(greedy(PROMPTS, 40), aasd_verification="strict", **options)
    return [{**request, "salt": salt} for request in requests]


@pytest.fixture(scope="module")
def plain(plain_engine):
    return plain_engine.run(greedy(PROMPTS, 40))


@pytest.fixture(scope="module")
def cold(aasd_engine):
    return aasd_engine.run(asked())


def share(of):
    """Accepted draft tokens by emitted token."""
    return of.accepted / sum(map(len, of.token_ids))


def test_answers_are_the_targets_own_and_the_second_time_take_few_steps(aasd_engine, plain, cold):
    again = aasd_engine.run(asked())
    assert cold.token_ids == again.token_ids == plain.token_ids
    assert share(again) > 0.7 > 2 * share(cold)
    assert again.faults == cold.faults == {}


@pytest.mark.parametrize("by", ["salt", "no salt", "aasd_memory"])
def test_others_get_nothing_of_them(aasd_engine, plain, cold, by):
    requests = {"salt": asked("other"), "no salt": asked(), "aasd_memory": asked(aasd_memory="off")}[by]
    if by == "no salt":
        for request in requests:
            del request["salt"]
    found = aasd_engine.run(requests)
    assert found.token_ids == plain.token_ids
    assert share(found) < 0.6 < share(aasd_engine.run(asked()))


def test_who_keeps_out_leaves_nothing(aasd_engine, cold):
    for _ in range(2):
        assert share(aasd_engine.run(asked("kept out", aasd_memory="off"))) < 0.6
    assert share(aasd_engine.run(asked("kept out"))) < 0.6
    assert share(aasd_engine.run(asked("kept out"))) > 0.7


@pytest.mark.parametrize("how", ["reset_prefix_cache", "aasd_clear_memory", "reload_weights"])
def test_what_is_forgotten_is_not_drafted_from(aasd_engine, plain, how):
    salt = f"before {how}"
    aasd_engine.run(asked(salt))
    assert share(aasd_engine.run(asked(salt))) > 0.7
    aasd_engine.forget(how)
    found = aasd_engine.run(asked(salt))
    assert found.token_ids == plain.token_ids
    assert share(found) < 0.6


@pytest.mark.parametrize("kind", ["text", "token ids"])
def test_a_prediction_is_drafted_from(aasd_engine, plain, kind):
    """Without memory, and not by the same requests without it."""
    requests = []
    for request, output in zip(asked("predicting", aasd_memory="off"), plain.outputs, strict=True):
        prediction = output["text"] if kind == "text" else output["token_ids"]
        requests += with_options([request], aasd_prediction=prediction)
    found = aasd_engine.run(requests)
    assert found.token_ids == plain.token_ids
    assert share(found) > 0.7
    assert share(aasd_engine.run(asked("predicting", aasd_memory="off"))) < 0.6


def test_a_corpus_is_drafted_from_by_who_names_it_while_it_is_there(aasd_engine, plain, tmp_path):
    """Added and dropped while the engine serves; answers stay the target's own."""
    for number, output in enumerate(plain.outputs):
        (tmp_path / f"{number}.txt").write_text(output["text"])
    (tmp_path / "binary").write_bytes(b"\0")

    def answered(**options):
        return aasd_engine.run(asked("of corpora", aasd_memory="off", **options))

    with pytest.raises(Exception, match="aasd_corpora is not allowed.*Known: none"):
        answered(aasd_corpora="answers")
    assert aasd_engine.rpc("aasd_add_corpus", "answers", str(tmp_path)) == [["answers"]]
    with_it = answered(aasd_corpora=["answers"])
    assert with_it.token_ids == plain.token_ids and with_it.faults == {}
    assert share(with_it) > 0.7
    for options in ({}, {"aasd_corpora": "off"}, {"aasd_corpora": []}):
        assert share(answered(**options)) < 0.6
    with pytest.raises(Exception, match="aasd_corpora is not allowed.*Known: 'answers'"):
        answered(aasd_corpora="another")
    with pytest.raises(Exception, match="corpus 'x' at /nowhere can't be loaded"):
        aasd_engine.rpc("aasd_add_corpus", "x", "/nowhere")
    # What it says now is another text: the old one is gone.
    for file in tmp_path.glob("*.txt"):
        file.write_text("nothing of it")
    assert aasd_engine.rpc("aasd_add_corpus", "answers", str(tmp_path)) == [["answers"]]
    assert share(answered(aasd_corpora="answers")) < 0.6
    assert aasd_engine.rpc("aasd_drop_corpus", "answers") == [[]]
    assert "1 files were skipped" in aasd_engine.log()
