"""Which backend runs: what was asked for or the reason why not; only `auto` falls through."""

import logging
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lora_init import BackendError, backend, backends
from lora_init.backends import ENVIRONMENT_VARIABLE, available, select
from lora_init.ops.dual_project import dual_project
from lora_init.parallel import map_layers

W, A, B = torch.eye(3), torch.ones(1, 3), torch.ones(3, 1)


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)


PICKY = """
NAME, PRIORITY = "picky", 100

def why_unsupported(op, group=(), *rest):
    square = all(w.shape[0] == w.shape[1] for w in group)
    return None if op == "dual_project" and square else "is picky"

def dual_project(group, A, B, precision):
    return ["picky" for _ in group]
"""


@pytest.fixture
def picky(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One more file in the package: a backend that `auto` prefers, for square matrices only."""
    (tmp_path / "picky.py").write_text(PICKY)
    monkeypatch.setattr(backends, "__path__", [*backends.__path__, str(tmp_path)])
    available.cache_clear()
    yield
    available.cache_clear()
    del sys.modules["lora_init.backends.picky"]


def test_every_backend_has_the_contract() -> None:
    found = available()
    assert "reference" in found
    assert list(found.values()) == sorted(found.values(), key=lambda b: -b.PRIORITY)
    for name, one in found.items():
        assert name == one.NAME
        assert isinstance(one.why_unsupported("no such op"), str)
        assert one.PRIORITY >= found["reference"].PRIORITY


def test_auto_takes_the_first_that_can_and_logs_why_not(
    picky: None, caplog: pytest.LogCaptureFixture
) -> None:
    assert next(iter(available())) == "picky"
    assert [*available()][-1] == "reference"
    assert dual_project([W], [A], [B]) == ["picky"]
    with caplog.at_level(logging.DEBUG, logger="lora_init.backends"):
        assert select("dual_project", [W[:2]], [A], [B[:2]], "full").NAME == "reference"
    assert "dual_project does not run on picky: is picky" in caplog.text


def test_the_one_asked_for_runs_or_raises_with_the_reason(picky: None) -> None:
    with backend("picky"):
        assert dual_project([W], [A], [B]) == ["picky"]
        with pytest.raises(BackendError, match="no backend can run dual_project: picky: is picky"):
            dual_project([W[:2]], [A], [B[:2]])
    with backend("reference"):
        assert dual_project([W], [A], [B]) != ["picky"]


def test_an_op_that_none_has_says_what_each_lacks(picky: None) -> None:
    with pytest.raises(BackendError, match=r"cannot: picky: is picky; .*reference: .*'cannot'"):
        select("cannot")


def test_the_environment_chooses(picky: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "reference")
    assert select("dual_project", [W]).NAME == "reference"
    with backend("picky"):
        assert select("dual_project", [W]).NAME == "picky"
    with backend("auto"):
        assert select("dual_project", [W]).NAME == "picky"
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "")
    assert select("dual_project", [W]).NAME == "picky"


def test_unknown_names_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendError, match=r"'cuda9'; choose one of auto, .*reference"):  # noqa: SIM117
        with backend("cuda9"):
            pytest.fail("entered")
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "cuda9")
    with pytest.raises(BackendError, match=f"{ENVIRONMENT_VARIABLE}: unknown backend 'cuda9'"):
        dual_project([W], [A], [B])
    with backend("reference"):
        assert len(dual_project([W], [A], [B])) == 1


def test_nested_choices_are_restored_even_by_an_exception(picky: None) -> None:
    def chosen() -> str:
        return select("dual_project", [W]).NAME

    with backend("reference"):
        with backend("picky"):
            assert chosen() == "picky"
            with pytest.raises(BackendError), backend("reference"):
                select("no such op")
            assert chosen() == "picky"
        assert chosen() == "reference"
    assert chosen() == "picky"


def test_a_choice_reaches_the_workers_but_no_other_thread(picky: None) -> None:
    seen = []
    other = threading.Thread(target=lambda: seen.append(select("dual_project", [W]).NAME))
    torch.set_num_threads(2)
    with backend("reference"):
        workers = map_layers(lambda _: select("dual_project", [W]).NAME, range(3))
        other.start()
        other.join()
    assert workers == ["reference"] * 3
    assert seen == ["picky"]
