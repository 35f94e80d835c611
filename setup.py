"""Where the packages lie, and the optional native module; everything else is in pyproject.toml.

The folder triton_kernels installs as lora_init.triton_kernels: a package with the bare name exists
already, and vLLM probes for it.

lora_init._C is built where nvcc is found. LORA_INIT_CUDA=1 fails where it cannot be built, 0 leaves
it out; LORA_INIT_CUDA_ARCHS ("90a-real") names the targets where not all are wanted.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
WANTED = os.environ.get("LORA_INIT_CUDA", "auto")
if WANTED not in ("auto", "0", "1"):
    raise SystemExit(f"LORA_INIT_CUDA must be auto, 1 or 0, got {WANTED!r}")


def nvcc() -> str | None:
    if home := os.environ.get("CUDA_HOME"):
        return shutil.which("nvcc", path=f"{home}/bin")
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


class CMakeBuild(build_ext):
    """Builds an extension with CMakeLists.txt, which lists its sources."""

    def build_extension(self, ext: Extension) -> None:
        try:
            self._build(Path(self.get_ext_fullpath(ext.name)).resolve().parent)
        except (ImportError, OSError, subprocess.CalledProcessError) as error:
            # The one kind of error that setuptools makes a warning of where `ext` is optional.
            raise CompileError(f"{error} (LORA_INIT_CUDA=0 leaves it out)") from error

    def _build(self, folder: Path) -> None:
        import pybind11

        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        options = {
            "CMAKE_CUDA_COMPILER": nvcc(),
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": folder,
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
        }
        arguments: list[str] = []
        if ninja := shutil.which("ninja"):
            # pip's isolated builds have another one each time, and CMake would run the first.
            options["CMAKE_MAKE_PROGRAM"] = ninja
            arguments += ["-G", "Ninja"]
        if archs := os.environ.get("LORA_INIT_CUDA_ARCHS"):
            options["LORA_INIT_CUDA_ARCHS"] = archs
        else:
            arguments += ["-U", "LORA_INIT_CUDA_ARCHS"]  # those of the build before
        if ccache := shutil.which("ccache"):
            options |= {
                f"CMAKE_{language}_COMPILER_LAUNCHER": ccache for language in ("CXX", "CUDA")
            }
        arguments += [f"-D{name}={value}" for name, value in options.items()]
        subprocess.run(["cmake", "-S", ROOT, "-B", build, *arguments], check=True)
        subprocess.run(["cmake", "--build", build, "--parallel"], check=True)


def extensions() -> list[Extension]:
    if WANTED == "0":
        return []
    if nvcc() is None:
        reason = "no nvcc in CUDA_HOME, PATH or /usr/local/cuda"
        if WANTED == "1":
            raise SystemExit(f"LORA_INIT_CUDA=1, but there is {reason}")
        print(f"lora_init._C is left out: there is {reason}")
        return []
    return [Extension("lora_init._C", sources=[], optional=WANTED == "auto")]


kernels = find_packages(include=["triton_kernels", "triton_kernels.*"])

setup(
    packages=[
        *find_packages(include=["lora_init", "lora_init.*"]),
        *(f"lora_init.{package}" for package in kernels),
    ],
    package_dir={"lora_init.triton_kernels": "triton_kernels"},
    ext_modules=extensions(),
    cmdclass={"build_ext": CMakeBuild},
)
