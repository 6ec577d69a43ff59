"""Eight simulated CPU devices and no network for every test."""

from __future__ import annotations

import os

# Tiny programs: most of the time goes into compiling them, and without LLVM's optimisations that takes half as long.
# What XLA itself does to a program stays the same.
FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}".strip()
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
