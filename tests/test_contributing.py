"""CONTRIBUTING's method works as it stands there: it is found, listed and run like the others."""

import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import lora_init
from lora_init import LoraInitError, approximate
from lora_init.cli import main
from lora_init.testing import DTYPES, gaussian, misaligned, transposed
from tests.test_peft import adapted, distance, llama, logits

ROOT = Path(__file__).parents[1]
PACKAGE = sys.modules["lora_init.methods"]


def example() -> str:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    return code


@pytest.fixture(autouse=True)
def columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The example as a file in a folder that the package looks for methods in."""
    folder = tmp_path / "methods"
    folder.mkdir()
    (folder / "columns.py").write_text(example())
    monkeypatch.setattr(PACKAGE, "__path__", [*PACKAGE.__path__, str(folder)])
    monkeypatch.setattr(PACKAGE, "_REGISTRY", dict(PACKAGE._REGISTRY))
    yield folder
    sys.modules.pop("lora_init.methods.columns", None)
    vars(PACKAGE).pop("columns", None)


def test_it_is_short() -> None:
    assert len([line for line in example().splitlines() if line.strip()]) <= 30


def test_it_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert lora_init.methods()["columns"].base == "residual"
    assert main(["methods"]) == 0
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("columns ")]
    assert line.split()[1:4] == ["nothing", "residual", "CONTRIBUTING.md"]
    assert line.endswith(str(lora_init.methods()["columns"]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_is_what_it_says(dtype: torch.dtype) -> None:
    weight = gaussian(24, 17, dtype)
    weight[:, 3] = weight[:, 5]  # among the chosen: then A is the least of many
    weight[:, 3] *= 4
    weight[:, 5] *= 4
    f = approximate({"q": weight}, 5, "columns", scaling=2.0)["q"]
    W = weight.double().numpy()
    order = np.argsort(-(W**2).sum(0), kind="stable")[:5]
    assert {3, 5} <= set(order.tolist())
    best = W[:, order] @ np.linalg.lstsq(W[:, order], W, rcond=None)[0]
    np.testing.assert_allclose(f.product(), best, atol=1e-5 * np.abs(W).max())
    np.testing.assert_allclose(f.B, W[:, order] / np.sqrt(2), rtol=1e-6)


def test_its_bits_depend_on_the_values_alone() -> None:
    weight = gaussian(24, 17, torch.float64)
    expected = approximate({"q": weight}, 5, "columns")["q"]
    torch.set_num_threads(2)
    for view in (transposed(weight), misaligned(weight)):
        f = approximate({"p": gaussian(3, 4), "q": view}, {"p": 2, "q": 5}, "columns")["q"]
        assert torch.equal(f.A, expected.A)
        assert torch.equal(f.B, expected.B)


def test_a_model_starts_with_it() -> None:
    base = llama()
    model = adapted(base)
    report = lora_init.initialize(model, "columns")
    assert (report.method, len(report.layers)) == ("columns", 4)
    assert distance(logits(model), logits(base)) < 2e-5
    with pytest.raises(LoraInitError, match=r"q_proj: r = 49 exceeds"):
        lora_init.initialize(adapted(base, r=49), "columns")


def test_a_checkpoint_starts_with_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llama().save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    assert main(["run", str(tmp_path / "model"), "--out", str(out), "--method", "columns"]) == 0
    assert "columns: 4 layers (4 solved" in capsys.readouterr().out
    assert (out / "residual" / "model.safetensors").exists()


def test_it_passes_the_projects_own_checks(columns: Path) -> None:
    if importlib.util.find_spec("ruff") is None:
        pytest.skip("ruff is not installed")
    for arguments in (["check"], ["format", "--check"]):
        command = [
            sys.executable,
            "-m",
            "ruff",
            *arguments,
            "--config",
            str(ROOT / "pyproject.toml"),
        ]
        done = subprocess.run([*command, str(columns)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
