"""What the tests of every checkpoint format do: a dense formula, to native and back, refusals."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hooks.checkpoints import TranscoderStore
from hooks.errors import CheckpointError
from hooks.formats import FORMATS, Checkpoint, native, recognise
from hooks.transcoder import WEIGHTS, Transcoder

D, FEATURES = 12, 40
Formula = tuple[Tensor, Tensor]  # features [token feature], reconstruction [token d_model]


def randoms(seed: int, **shapes: tuple[int, ...]) -> dict[str, Tensor]:
    """Random tensors by name."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def inputs(d: int = D) -> Tensor:
    return 2 * torch.randn(33, d, generator=torch.Generator().manual_seed(77)) + 0.3


def topk(pre: Tensor, k: int) -> Tensor:
    """The k largest of each row, where positive; zero elsewhere. By sorting, not by a kernel."""
    least = pre.sort(-1, descending=True).values[:, k - 1 : k]
    return torch.where((pre >= least) & (pre > 0), pre, 0)


def jumprelu(pre: Tensor, threshold: Tensor | float) -> Tensor:
    return torch.where((pre > threshold) & (pre > 0), pre, 0)


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def check_formula(transcoder: Transcoder, x: Tensor, formula: Formula) -> None:
    """The sets of active features are equal, their values and the reconstruction to the rounding of fp32."""
    acts = transcoder.encode(x)
    dense = acts.dense(transcoder.d_features)
    features, reconstruction = formula
    assert 0 < (features > 0).float().mean() < 1  # the formula selects something, and not everything
    assert torch.equal(dense > 0, features > 0)
    torch.testing.assert_close(dense, features, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(transcoder.reconstruct(acts, x), reconstruction, rtol=1e-5, atol=1e-4)


def check_native_round_trip(root: Path, out: Path, **options: object) -> None:
    """Saved as native and opened again, weights and features are the same bits, and so is what is known."""
    store = TranscoderStore.open(root, **options)
    described = recognise(root)
    native.save(
        out,
        list(store),
        read=store.convention.read,
        write=store.convention.write,
        sites_source=store.convention.source,
        encoder_source=described.encoder_source,
        activation_source=store.k_source(store.layers[0]),
        base_model=described.base_model,
    )
    again = TranscoderStore.open(out)
    assert (again.layers, again.convention) == (store.layers, store.convention)
    for layer in store.layers:
        before, after = store[layer], again[layer]
        for name in WEIGHTS:
            one, other = getattr(before, name), getattr(after, name)
            assert (one is None) == (other is None), name
            assert one is None or (torch.equal(one, other) and one.dtype == other.dtype), name
        x = inputs(before.d_model)
        assert torch.equal(before.encode(x).dense(before.d_features), after.encode(x).dense(after.d_features))
        assert torch.equal(before.reconstruct(before.encode(x), x), after.reconstruct(after.encode(x), x))
    kept = {"base_model", "read", "write", "input_norm", "activation", "k"}
    facts = recognise(out).facts()
    assert {name: facts[name][0] for name in kept - {"k"}} == {
        name: value for name, (value, _) in known(described, store).items() if name != "k"
    }


def known(described: Checkpoint, store: TranscoderStore) -> dict[str, tuple[object, object]]:
    """What a format knows, with the sites that the store was opened with."""
    sites = {"read": (str(store.convention.read), None), "write": (str(store.convention.write), None)}
    return {**described.facts(), **sites}


def check_only(name: str, root: Path) -> None:
    """One format recognises the folder, and no other."""
    assert [found for found, module in FORMATS.items() if module.matches(root)] == [name]
    assert recognise(root).format == name


def refused(root: Path, **options: object) -> CheckpointError:
    """Opening and reading it ends with a message that says more than that it is wrong."""
    with pytest.raises(CheckpointError) as caught:
        list(TranscoderStore.open(root, **options))
    assert all((caught.value.expected, caught.value.found, caught.value.where, caught.value.repair)), caught.value
    return caught.value
