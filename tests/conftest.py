"""Shared models, read-only. One thread: these models are tiny. The hub is never reached."""

import os
from collections.abc import Iterator

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
from worlds import left_behind, planted_sink, random_hooked

from hooks import HookedModel

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--one-each", action="store_true", help="the first case of every test that is not slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Shapes and dtypes are checked on one case of every test: that doubles its time, and cases differ in numbers."""
    if not config.getoption("--one-each"):
        return
    seen: set[str] = set()
    kept, left_out = [], []
    for item in items:
        name = item.nodeid.partition("[")[0]
        chosen = name not in seen and item.get_closest_marker("slow") is None
        seen.add(name)
        (kept if chosen else left_out).append(item)
    config.hook.pytest_deselected(items=left_out)
    items[:] = kept


SHARED = ("demo", "demo_dense", "odd", "sink", "model")


@pytest.fixture(autouse=True)
def shared_models_stay_as_they_are(request: pytest.FixtureRequest) -> Iterator[None]:
    """No test leaves a hook, or a `forward` of its own, in a model that other tests use."""
    used = {name: request.getfixturevalue(name) for name in SHARED if name in request.fixturenames}
    yield
    for name, model in used.items():
        assert not left_behind(model.host.model), f"{name} is not as it was"


@pytest.fixture(scope="session")
def demo() -> HookedModel:
    return HookedModel.load("demo")


@pytest.fixture(scope="session")
def demo_dense() -> HookedModel:
    return HookedModel.load("demo", "demo-dense")


@pytest.fixture(scope="session")
def odd() -> HookedModel:
    """Random Qwen2: 5:1 grouping, head_dim ≠ d/heads, eps 1e-5, tied embeddings, layer 2 without a transcoder."""
    return random_hooked()


@pytest.fixture(scope="session")
def sink() -> HookedModel:
    """A planted attention sink: token `w1` has 100 times the usual norm, and key biases are large."""
    return planted_sink()


@pytest.fixture(scope="session", params=["demo", "demo_dense", "odd"])
def model(request: pytest.FixtureRequest) -> HookedModel:
    """Every engine test runs on the demo, on the dense set, and on a model of another shape."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def prompt(model: HookedModel, odd: HookedModel) -> str:
    return "w1 w2 w3 w4 w5 w6" if model is odd else "fact: the capital of the state containing Dallas is"
