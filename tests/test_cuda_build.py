"""The optional native module: built where nvcc is, left out with a reason where it is not."""

import hashlib
import os
import shutil
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import pytest

from lora_init import build_info, native

ROOT = Path(__file__).resolve().parents[1]

needs_module = pytest.mark.skipif(native.module() is None, reason="lora_init._C is not built")


def setup(**env: str) -> subprocess.CompletedProcess[str]:
    """What setup.py decides, with nothing built."""
    command = [sys.executable, "setup.py", "--version"]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | env, capture_output=True, text=True, check=False
    )


def test_without_nvcc_auto_says_in_one_line_why_it_is_left_out() -> None:
    done = setup(LORA_INIT_CUDA="auto", CUDA_HOME="/nowhere")
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stdout.splitlines() if "lora_init._C" in line)
    assert "no nvcc" in line


def test_without_nvcc_1_fails_loudly() -> None:
    done = setup(LORA_INIT_CUDA="1", CUDA_HOME="/nowhere")
    assert done.returncode != 0
    assert "LORA_INIT_CUDA=1, but there is no nvcc" in done.stderr


def test_an_unknown_choice_is_refused() -> None:
    done = setup(LORA_INIT_CUDA="yes")
    assert done.returncode != 0
    assert "must be auto, 1 or 0, got 'yes'" in done.stderr


def test_a_build_takes_neither_ninja_nor_targets_from_the_one_before(tmp_path: Path) -> None:
    pytest.importorskip("pybind11")
    for name in ("cmake", "ninja", "nvcc"):
        tool = tmp_path / "bin" / name
        tool.parent.mkdir(exist_ok=True)
        tool.write_text(f'#!/bin/sh\necho "{name} $*" >> {tmp_path}/called\n')
        tool.chmod(0o755)
    env = os.environ | {
        "CUDA_HOME": str(tmp_path),
        "LORA_INIT_CUDA": "1",
        "LORA_INIT_CUDA_ARCHS": "",
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
    }
    command = [sys.executable, "setup.py", "build_ext", "-b", tmp_path, "-t", tmp_path]
    subprocess.run(command, cwd=ROOT, env=env, capture_output=True, check=True)
    configured, built = (tmp_path / "called").read_text().splitlines()
    assert "-U LORA_INIT_CUDA_ARCHS" in configured
    assert f"-DCMAKE_MAKE_PROGRAM={tmp_path}/bin/ninja" in configured
    assert built.startswith("cmake --build")


def test_build_info_without_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "module", lambda: None)
    info = build_info()
    assert info["version"]
    assert info["cuda"] is info["archs"] is None


def test_a_module_that_does_not_load_is_left_out_with_a_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(name: str) -> None:
        raise ImportError("version `GLIBCXX_9' not found")

    monkeypatch.setattr(native, "import_module", fails)
    with pytest.warns(UserWarning, match="_C does not load and is not used .*GLIBCXX_9"):
        assert native.module.__wrapped__() is None


def test_a_module_of_other_sources_is_left_out_with_a_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    old = types.SimpleNamespace(__file__="_C.so")  # of before it had an interface
    monkeypatch.setattr(native, "import_module", lambda name: old)
    with pytest.warns(UserWarning, match=r"_C\.so was built of another .* build it again"):
        assert native.module.__wrapped__() is None
    interface = (ROOT / "csrc" / "bindings.cpp").read_bytes()
    old.interface = hashlib.sha256(interface).hexdigest()
    assert native.module.__wrapped__() is old
    # A wheel has no source beside it.
    del old.interface
    monkeypatch.setattr(native, "_INTERFACE", ROOT / "nowhere")
    assert native.module.__wrapped__() is old


@needs_module
def test_build_info_names_compiler_and_targets() -> None:
    info = build_info()
    assert info["cuda"]
    assert info["archs"]


@needs_module
def test_the_module_links_neither_torch_nor_the_driver() -> None:
    path = native.module().__file__  # type: ignore[union-attr]
    linked = subprocess.run(["ldd", path], capture_output=True, text=True, check=True).stdout
    for library in ("torch", "libcuda.", "libcudart.", "c10"):
        assert library not in linked


@needs_module
def test_its_kernels_keep_their_bounds() -> None:
    pytest.importorskip("triton")  # brings a disassembler
    from benchmarks import native_report

    rows = list(native_report.rows(native.module().__file__))  # type: ignore[union-attr, arg-type]
    kernels = {row.kernel.split("<")[0] for row in rows}
    assert kernels >= {"lora_linear_kernel", "project_kernel", "dual::dual_project"}
    assert [(row.kernel, row.arch, row.broken()) for row in rows if row.broken()] == []


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc")
def test_the_wheel_with_the_module_installs_and_imports(tmp_path: Path) -> None:
    source, site = tmp_path / "source", tmp_path / "site"
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    for name in tracked.stdout.decode().strip("\0").split("\0"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    env = os.environ | {"LORA_INIT_CUDA": "1", "LORA_INIT_CUDA_ARCHS": "90a-real"}
    pip = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        tmp_path,
    ]
    done = subprocess.run([*pip, source], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(site)
    code = "import lora_init; print(lora_init.__file__, lora_init.build_info()['archs'])"
    printed = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert printed.split() == [str(site / "lora_init" / "__init__.py"), "90a-real"]
