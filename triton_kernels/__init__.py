"""Triton kernels and their launchers, one file per op; imported as `lora_init.triton_kernels`."""
