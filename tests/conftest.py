import os

# The models are tiny and each worker of pytest -n has a core: two threads on one wait for each other. Set before torch
# is imported, and inherited by what the tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The hub of the tests runs on this machine, and answers late only where others work on it, too.
os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", "300")
os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", "300")

import random
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

SEED = int(os.environ.get("QSURGEON_SEED", "0"))  # another one tries the tests on other numbers


def _seed() -> None:
    """Begin from the same random numbers, whatever ran in this process before."""
    random.seed(SEED)
    torch.manual_seed(SEED)


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup() -> None:
    """Let what a fixture draws depend on no other."""
    _seed()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call() -> None:
    """Let what a test draws depend on no other, nor on which fixtures were there already."""
    _seed()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cases", type=int, metavar="N", help="run at most N cases of each parametrized test, spread out")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    most: int | None = config.getoption("--cases")
    if most is None:
        return
    of_test: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        of_test[item.nodeid.partition("[")[0]].append(item)
    spread = max(most - 1, 1)
    kept = {cases[(len(cases) - 1) * place // spread] for cases in of_test.values() for place in range(most)}
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


@pytest.fixture(scope="session")
def qwen2_config() -> Callable[..., Any]:
    """Return a maker of tiny Qwen2 configs; its keywords replace fields."""
    from transformers import Qwen2Config

    def make(**fields: Any) -> Qwen2Config:
        tiny = {
            "vocab_size": 96,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "tie_word_embeddings": True,
            "architectures": ["Qwen2ForCausalLM"],
        }
        return Qwen2Config(**{**tiny, **fields})

    return make


@pytest.fixture(scope="session")
def make_qwen2(qwen2_config: Callable[..., Any]) -> Callable[..., Any]:
    """Return a maker of tiny Qwen2 models, always with the same weights; its keywords replace config fields."""
    from transformers import Qwen2ForCausalLM

    def make(**fields: Any) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return Qwen2ForCausalLM(qwen2_config(**fields)).eval()

    return make


@pytest.fixture(scope="session")
def small_model(make_qwen2: Callable[..., Any]) -> Callable[..., Any]:
    """Return a maker of Qwen2 models of two layers, whose output head is its own unless told otherwise."""
    return lambda **fields: make_qwen2(**{"num_hidden_layers": 2, "tie_word_embeddings": False, **fields})


@pytest.fixture(scope="session")
def plain_folder(small_model: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of such a model in full precision. It is shared: copy it before changing it."""
    folder = tmp_path_factory.mktemp("checkpoints") / "plain"
    small_model().save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_qwen2(make_qwen2: Callable[..., Any]) -> Any:
    """A live model: 3 layers, hidden 64, lm_head tied to embed_tokens; 22 Linear modules."""
    return make_qwen2()


@pytest.fixture(scope="session")
def tiny_folder(make_qwen2: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of such a model as save_pretrained writes it. It is shared: copy it before changing it."""
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny-qwen2"
    make_qwen2().save_pretrained(folder)
    return folder


@pytest.fixture
def heard() -> Any:
    """What listens to a long run: ``estimates``, ``bytes`` in all, and ``notes``."""
    from qsurgeon.checkpoint import Estimate, Events

    class Heard(Events):
        def __init__(self) -> None:
            self.bytes = 0
            self.estimates: list[Estimate] = []
            self.notes: list[str] = []

        def begin(self, estimate: Estimate) -> None:
            self.estimates.append(estimate)

        def advance(self, count: int) -> None:
            self.bytes += count

        def note(self, text: str) -> None:
            self.notes.append(text)

    return Heard()


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process group of this process."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # torch leaves another there
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
