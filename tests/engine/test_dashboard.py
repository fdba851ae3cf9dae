"""The dashboard: everything that it asks for exists, and it ships with the package."""

import json
import re

from vllm_aasd import metrics
from vllm_aasd.counters import METRICS, PREFIX

DASHBOARD = json.loads(metrics.dashboard())
EXPRESSIONS = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
QUERIES = [variable["definition"] for variable in DASHBOARD["templating"]["list"] if variable["type"] == "query"]


def series():
    """Every name that a server's page has of us, with its own label."""
    for metric in METRICS:
        for suffix in ("_bucket", "_sum", "_count") if metric.bounds else ("_total",):
            yield PREFIX + metric.name + suffix, "le" if suffix == "_bucket" else metric.label


def test_every_name_is_one_of_ours_and_every_metric_is_shown():
    known = dict(series())
    asked = {name for text in (*EXPRESSIONS, *QUERIES) for name in re.findall(r"aasd:\w+", text)}
    assert asked <= known.keys()
    for metric in METRICS:
        assert any(name.startswith(PREFIX + metric.name + "_") for name in asked), metric.name


def test_series_are_told_apart_by_labels_that_they_have():
    known = dict(series())
    for expression in EXPRESSIONS:
        for label, name in re.findall(r"by \((\w+)\) \(\w+\((aasd:\w+)", expression):
            assert known[name] == label, expression
        for selector in re.findall(r"aasd:\w+(\{[^}]*\})?", expression):
            assert selector == '{model_name=~"$model_name",engine=~"$engine"}', expression


def test_panels_do_not_overlap_and_have_ids_of_their_own():
    places = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & places and place["x"] + place["w"] <= 24
        places |= cells
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids) == 12


def test_the_command_prints_it(capsys):
    metrics.main([])
    assert json.loads(capsys.readouterr().out) == DASHBOARD
