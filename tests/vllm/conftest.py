"""A real vLLM on the CPU, in the process of the tests; `make test-vllm` has it, in a venv of its own."""

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.update(
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_LOGGING_LEVEL="ERROR",
    VLLM_WORKER_MULTIPROC_METHOD="spawn",
)

Start = Callable[..., Any]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start an engine on a folder; it ends with the test."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    engines = []

    def started(folder: Path, **arguments: Any) -> Any:
        engines.append(LLM(str(folder), dtype="float32", max_model_len=128, enforce_eager=True, **arguments))
        return engines[-1]

    yield started
    for engine in engines:
        engine.llm_engine.engine_core.shutdown()
    engines.clear()
    gc.collect()
    cleanup_dist_env_and_memory()
