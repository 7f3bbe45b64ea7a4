"""What a training leaves on disk until it is done: enough to go on after a kill, to the same bytes.

    OUT/training/state.json            recipe, text, model; group and chunk that come next; curves; which files belong
    OUT/training/layer_03.00012.safetensors   a layer's parameters and moments behind chunk 12

Files of layers are written first, then `state.json` is replaced, then files that it no longer names are removed: a
kill at any moment leaves a state that is whole.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hooks.errors import UserError
from hooks.files import read_json, safetensors_tensors, write_json, write_safetensors
from hooks.train.layer import TrainedLayer
from hooks.train.recipe import Recipe

FOLDER, FILE = "training", "state.json"

Curves = dict[str, list[dict[str, float | int]]]  # by layer: tokens, fvu, l0, dead on held-out text


@dataclass
class State:
    """Where a training is.

    Attributes:
        root: the folder of the set.
        facts: what must be the same for a training to go on: recipe, text, model, layers, groups, products.
        group, chunk: what comes next.
        files: by layer, the file of its tensors.
        curves: what was measured so far.
    """

    root: Path
    facts: dict[str, Any]
    group: int = 0
    chunk: int = 0
    files: dict[str, str] = field(default_factory=dict)
    curves: Curves = field(default_factory=dict)

    @classmethod
    def opened(cls, root: Path, facts: Mapping[str, Any]) -> "State":
        """The state that a folder holds, or a new one.

        Raises:
            UserError: the folder holds a training with another recipe, text or model.
        """
        path = root / FOLDER / FILE
        if not path.is_file():
            return cls(root, dict(facts))
        stored = read_json(path)
        differing = sorted(name for name in {*facts, *stored["facts"]} if stored["facts"].get(name) != facts.get(name))
        if differing:
            name = differing[0]
            raise UserError(
                f"{root} holds a training that is not done, and it is another one: {', '.join(differing)} differ",
                expected=_short(stored["facts"].get(name)),
                found=_short(facts.get(name)),
                repair="finish it with the same options, choose another folder, or remove this one",
            )
        return cls(root, stored["facts"], stored["group"], stored["chunk"], stored["files"], stored["curves"])

    def layer(self, number: int, recipe: Recipe, device: torch.device) -> TrainedLayer | None:
        """A layer as it was saved; None: it has not begun."""
        name = self.files.get(str(number))
        if name is None:
            return None
        tensors = safetensors_tensors(self.root / FOLDER / name)
        steps = int(tensors.pop("steps"))
        moved: dict[str, Tensor] = {key: tensor.to(device) for key, tensor in tensors.items()}
        return TrainedLayer(number, recipe, moved, steps)

    def save(self, layers: Mapping[int, TrainedLayer], group: int, chunk: int) -> None:
        """Write these layers, and that `group` and `chunk` come next."""
        folder = self.root / FOLDER
        for number, layer in layers.items():
            name = f"layer_{number:02d}.{group:02d}.{chunk:05d}.safetensors"
            write_safetensors(folder / name, layer.tensors() | {"steps": torch.tensor(layer.steps)})
            self.files[str(number)] = name
        self.group, self.chunk = group, chunk
        write_json(folder / FILE, {
            "facts": self.facts, "group": group, "chunk": chunk, "files": self.files, "curves": self.curves,
        })  # fmt: skip
        for path in folder.glob("layer_*.safetensors"):
            if path.name not in self.files.values():
                path.unlink(missing_ok=True)

    def remove(self) -> None:
        """The set is written; the state is not needed any more."""
        folder = self.root / FOLDER
        (folder / FILE).unlink(missing_ok=True)
        for path in folder.glob("layer_*.safetensors"):
            path.unlink(missing_ok=True)
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) < 200 else text[:200] + "…"
