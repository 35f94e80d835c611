"""What an installation puts where, and what importing it costs."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run_python(code: str, cwd: Path, **env: str) -> str:
    """Run `code` outside the repository, where only what is installed or in `env` can be found."""
    environment = {**os.environ, "PYTHONPATH": "", **env}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def files(package: str) -> set[str]:
    paths = (path for path in (ROOT / package).rglob("*") if path.is_file())
    sources = (path for path in paths if not path.match("_C.*"))
    return {str(path.relative_to(ROOT)) for path in sources if "__pycache__" not in path.parts}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    # From a copy: setuptools builds in the source tree, and packs what an older build left there.
    source = tmp_path_factory.mktemp("source")
    for name in ("lora_init", "triton_kernels", "benchmarks", "tests"):
        shutil.copytree(
            ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "_C.*")
        )
    for name in ("pyproject.toml", "setup.py", "CMakeLists.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    pip += ["-w", "dist", "."]
    env = os.environ | {"LORA_INIT_CUDA": "0"}  # the wheel with it: test_cuda_build.py
    done = subprocess.run(pip, cwd=source, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (source / "dist").iterdir()
    return zipfile.ZipFile(path)


def test_wheel_holds_one_package_and_all_of_it(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    metadata = {name for name in names if ".dist-info/" in name}
    # A top-level triton_kernels would break vLLM, which probes for another package of that name.
    kernels = {f"lora_init/{name}" for name in files("triton_kernels")}
    assert names - metadata == files("lora_init") | kernels
    assert any(name.endswith("/LICENSE") for name in metadata)


def test_wheel_imports_the_kernels_as_a_subpackage(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path)
    code = "import lora_init.triton_kernels as k; print(k.__file__)"
    where = Path(run_python(code, tmp_path.parent, PYTHONPATH=str(tmp_path)))
    assert where == tmp_path / "lora_init" / "triton_kernels" / "__init__.py"


def test_this_installation_imports_the_kernels_as_a_subpackage_only(tmp_path: Path) -> None:
    code = (
        "import importlib.util, lora_init.triton_kernels\n"
        "spec = importlib.util.find_spec('triton_kernels')\n"
        "print(spec and spec.origin)"
    )
    assert not run_python(code, tmp_path).startswith(str(ROOT / "triton_kernels"))


def test_importing_the_core_imports_no_extra(tmp_path: Path) -> None:
    code = "import lora_init, sys; print(*sys.modules)"
    loaded = run_python(code, tmp_path).split()
    assert "lora_init" in loaded
    extras = "accelerate bitsandbytes huggingface_hub matplotlib peft transformers typer"
    for extra in extras.split():
        assert extra not in loaded
