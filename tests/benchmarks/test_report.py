"""Results as files, and the tables of the docs."""

import json
import pathlib
import sys

import pytest

from benchmarks import report, results


def test_results_come_back_as_written_and_what_fits_stands_on_one_line(tmp_path):
    result = {"a": {"b": [1, 2], "c": None}, "rows": [{"id": i, "text": "x" * 100} for i in range(5)], "empty": []}
    results.write(tmp_path / "new" / "r.json", result)
    text = (tmp_path / "new" / "r.json").read_text()
    assert json.loads(text) == result == results.read(tmp_path / "new" / "r.json")
    assert max(line.count('"id"') for line in text.splitlines()) == 1 and '"a": {"b": [1, 2], "c": null}' in text


def test_metadata_keeps_no_absolute_path(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/home/me/benchmarks/drafter.py", "--data", "/home/me/questions.jsonl"])
    run = results.metadata(data=pathlib.Path("/home/me/questions.jsonl"), limit=3)
    assert run["command"] == "python -m benchmarks.drafter --data questions.jsonl"
    assert run["conditions"] == {"data": "questions.jsonl", "limit": 3}


@pytest.mark.parametrize("page", [page for page in report.PAGES if page.exists()], ids=lambda page: page.name)
def test_the_tables_of_a_page_are_what_the_results_say(page):
    assert report.filled(page.read_text()) == page.read_text(), "run `python -m benchmarks.report`"


def test_a_page_is_filled_between_its_markers_and_what_others_mark_stays():
    others = "<!-- settings -->\nold\n<!-- end -->\n"
    filled = report.filled(f"a\n<!-- ablation -->\nold\n<!-- end -->\n{others}")
    assert filled.startswith("a\n<!-- ablation -->\n| drafter") and filled.endswith(f").\n<!-- end -->\n{others}")


def test_the_newest_result_of_each_method_counts_and_a_missing_one_is_a_dash(tmp_path, monkeypatch):
    found = results.read(results.RESULTS / "end_to_end_one.json")
    del found["methods"]["suffix"]
    results.write(tmp_path / "end_to_end_one.json", found)
    found["metadata"]["time"] = "2100-01-01T00:00:00+00:00"
    del found["methods"]["ngram"]
    found["figures"]["1"]["mean"]["aasd verification=strict"]["tpot"]["value"] = 7.0
    results.write(tmp_path / "end_to_end_new.json", found)
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    assert report.speed(True) == ""
    for table in (report.speed(False, ("1", "8")), report.speed(False), report.categories()):
        assert "| - " in table and "7.00" in table and "1.92" in table
    assert "2100-01-01" in report.speed(False)
