"""Where the packages lie; everything else is in pyproject.toml.

The folder triton_kernels installs as lora_init.triton_kernels: a package with the bare name exists
already, and vLLM probes for it.
"""

from setuptools import find_packages, setup

kernels = find_packages(include=["triton_kernels", "triton_kernels.*"])

setup(
    packages=[
        *find_packages(include=["lora_init", "lora_init.*"]),
        *(f"lora_init.{package}" for package in kernels),
    ],
    package_dir={"lora_init.triton_kernels": "triton_kernels"},
)
