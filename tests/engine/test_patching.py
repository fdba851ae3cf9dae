"""What we replace in vLLM: checked first, once or not at all, undone, and refused on a vLLM that we don't know."""

import sys
import types

import pytest

from vllm_aasd.engine import patching
from vllm_aasd.engine.patching import PatchTarget, UnsupportedVLLMError


@pytest.fixture
def host(monkeypatch):
    """A module like vLLM's, with two functions that we replace."""
    module = types.ModuleType("host_of_targets")
    module.first = lambda a, b, c=0: ("stock", a, b, c)
    module.second = lambda a: ("stock", a)
    monkeypatch.setitem(sys.modules, "host_of_targets", module)
    return module


FIRST = PatchTarget("host_of_targets", "first", ("a", "b"))
SECOND = PatchTarget("host_of_targets", "second", ("a",))


def ours(stock):
    def replacement(a, *rest):
        return ("ours", *stock(a, *rest)[1:])

    replacement.__wrapped__ = stock
    return replacement


def test_replaced_once_and_undone(host):
    stock = host.first
    (replacement,) = patching.replace({FIRST: ours})
    assert host.first(1, 2) == ("ours", 1, 2, 0)
    assert patching.replace({FIRST: ours}) == []
    assert host.first(1, 2) == ("ours", 1, 2, 0), "a second time must not wrap the first"
    replacement.undo()
    assert host.first is stock


def test_undo_leaves_what_somebody_else_has_put_there(host):
    (replacement,) = patching.replace({FIRST: ours})
    host.first = another = lambda a, b: None
    replacement.undo()
    assert host.first is another


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (PatchTarget("host_of_targets", "third", ("a",)), "has no host_of_targets.third any more"),
        (PatchTarget("no_such_module_of_vllm", "x", ()), "has no no_such_module_of_vllm.x any more"),
        (PatchTarget("host_of_targets", "second", ("b",)), r"takes \('a',\), expected \('b',\) first"),
    ],
)
def test_all_or_nothing(host, broken, message):
    stock = host.first
    with pytest.raises(UnsupportedVLLMError, match=message):
        patching.replace({FIRST: ours, broken: ours})
    assert host.first is stock


def test_every_target_in_the_installed_vllm_is_as_we_know_it():
    known = {value for value in vars(patching).values() if isinstance(value, PatchTarget)}
    assert known == {target for targets in patching.TARGETS.values() for target in targets}
    assert patching.problems(known) == []
    patching.check_version()


@pytest.mark.parametrize("version", ["0.31.4", "0.34.0", "1.0.0"])
def test_an_unknown_version_is_refused(monkeypatch, version):
    monkeypatch.setattr(patching, "vllm_version", lambda: version)
    message = rf"supports vLLM 0\.32\.\*, 0\.33\.\*, and vLLM {version} is installed"
    with pytest.raises(UnsupportedVLLMError, match=message):
        patching.check_version()
