"""Checks that several formats share: names, shapes and dtypes, one dictionary per layer, one pair of sites."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from hooks.errors import CheckpointError
from hooks.files import FLOATS, npz_shapes, open_pt, safetensors_dtypes, safetensors_shapes, shown
from hooks.files import read_json as read_any_json
from hooks.sites import Site, SiteSpec

Shapes = Mapping[str, tuple[int, ...]]


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: there is no such file, or it holds something else.
    """
    content = read_any_json(path)
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path.name} cannot be read",
            expected="a JSON object",
            found=f"a {type(content).__name__}",
            where=str(path),
            repair="download it again",
        )
    return content


def float_shapes(path: Path, buffers: Iterable[str] = ()) -> dict[str, tuple[int, ...]]:
    """Names and shapes in a weight file of any kind. Only the tensors in `buffers` may have a dtype that is no float.

    Raises:
        CheckpointError: it is damaged, or holds something else than named floating-point tensors.
    """
    if path.suffix == ".npz":
        return npz_shapes(path)  # refuses other numbers itself
    if path.suffix == ".safetensors":
        shapes = safetensors_shapes(path)
        floats = {key: dtype in FLOATS for key, dtype in safetensors_dtypes(path).items()}
    else:
        state = state_dict(path)
        shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
        floats = {key: tensor.dtype in FLOATS for key, tensor in state.items()}
    for key, is_float in floats.items():
        if not is_float and key not in buffers:
            raise CheckpointError(
                f"{path.name}: {key} holds no floating-point numbers",
                expected="weights in fp64, fp32, fp16 or bf16",
                found="numbers of another kind",
                where=str(path),
                repair="download it again, or open the right folder",
            )
    return shapes


def state_dict(path: Path) -> dict[str, Tensor]:
    """A `.pt` file that holds named tensors and nothing else, memory-mapped.

    Raises:
        CheckpointError: it is damaged, or holds something else.
    """
    content = open_pt(path)
    named = isinstance(content, Mapping) and all(isinstance(key, str) for key in content)
    if not named or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        parts = [*content, *content.values()] if isinstance(content, Mapping) else [content]
        kinds = {type(part).__name__ for part in parts}
        raise CheckpointError(
            f"{path.name} is no state dict",
            expected="names and their tensors, nothing else",
            found=", ".join(sorted(kinds)),
            where=str(path),
            repair="download it again, or open the right folder",
        )
    return dict(content)


def matrix(shapes: Shapes, key: str, path: Path) -> tuple[int, int]:
    """The shape of the matrix with which the shapes of the other tensors are compared.

    Raises:
        CheckpointError: it is missing, or no matrix.
    """
    shape = shapes.get(key)
    if shape is None:
        raise CheckpointError(
            f"{path.name} lacks the tensor {key}",
            expected=key,
            found=", ".join(shapes)[:300] or "no tensors",
            where=str(path),
            repair="download it again, or open the right folder",
        )
    if len(shape) != 2 or 0 in shape:
        raise CheckpointError(
            f"{path.name}: {key} must be a matrix",
            expected="two axes, neither of them empty",
            found=str(shape),
            where=str(path),
            repair="download it again, or open the right folder",
        )
    return shape[0], shape[1]


def check_shapes(shapes: Shapes, expected: Shapes, path: Path, ignored: Iterable[str] = ()) -> None:
    """Refuse a file whose tensors are not exactly those of the format.

    Raises:
        CheckpointError: a tensor is missing, of another shape, or unknown; the message names the first one.
    """
    for key, shape in expected.items():
        if key not in shapes:
            raise CheckpointError(
                f"{path.name} lacks the tensor {key}",
                expected=", ".join(expected),
                found=", ".join(shapes)[:300] or "no tensors",
                where=str(path),
                repair="download it again, or open the right folder",
            )
        if shapes[key] != shape:
            raise CheckpointError(
                f"{path.name}: {key} has the wrong shape",
                expected=str(shape),
                found=str(shapes[key]),
                where=str(path),
                repair="download it again, or open the right folder",
            )
    unknown = sorted(set(shapes) - set(expected) - set(ignored))
    if unknown:
        raise CheckpointError(
            f"{path.name} has the unknown tensor {unknown[0]}",
            expected=f"only {', '.join(expected)}: another tensor may change what is computed",
            found=", ".join(unknown)[:300],
            where=str(path),
            repair="open it with the library that wrote it, and save what this project can hold",
        )


def check_size(name: str, stated: object, true: int, path: Path) -> None:
    """Refuse a configuration that contradicts the tensors; `stated` None means that it states nothing.

    Raises:
        CheckpointError: they differ; the message has both numbers.
    """
    if stated is not None and (type(stated) is not int or stated != true):
        raise CheckpointError(
            f"{path.name} says {name} {shown(stated)}",
            expected=f"{true}, from the files beside it",
            found=shown(stated),
            where=str(path),
            repair="bring configuration and weights of the same training run together",
        )


def one_per_layer(found: Iterable[tuple[int, Path]], root: Path) -> None:
    """Refuse several dictionaries for one layer, naming their folders.

    Raises:
        CheckpointError: there are several.
    """
    by_layer: dict[int, list[str]] = {}
    for layer, folder in found:
        by_layer.setdefault(layer, []).append(str(folder.relative_to(root)))
    for layer, folders in sorted(by_layer.items()):
        if len(folders) > 1:
            raise CheckpointError(
                f"several dictionaries for layer {layer}",
                expected="one per layer",
                found=", ".join(sorted(folders))[:400],
                where=str(root),
                repair="open the folder of one of them, or put one of each layer into a folder of their own",
            )


Sites = tuple[Site | None, Site | None]


def one_convention(sites: Mapping[int, Sites], root: Path) -> tuple[SiteSpec | None, SiteSpec | None]:
    """Read and write site relative to the layer, from those of each layer.

    Raises:
        CheckpointError: the layers differ.
    """

    def relative(layer: int, pair: Sites) -> tuple[SiteSpec | None, SiteSpec | None]:
        read, write = (SiteSpec(site.name, site.layer - layer) if site else None for site in pair)
        return read, write

    found = {layer: relative(layer, pair) for layer, pair in sites.items()}
    if len(set(found.values())) > 1:
        raise CheckpointError(
            "the layers sit at several sites",
            expected="one pair of read and write sites for the whole set",
            found="; ".join(f"layer {n}: {read} -> {write}" for n, (read, write) in sorted(found.items()))[:400],
            where=str(root),
            repair="open one of them at a time",
        )
    return next(iter(found.values()))


def spread_threshold(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """JumpReLU's threshold for each feature: a single one is repeated, and a negative one becomes 0, which is ReLU."""
    threshold = weights["threshold"].clamp_min(0)
    return {**weights, "threshold": threshold.expand(weights["b_enc"].shape).clone()}
