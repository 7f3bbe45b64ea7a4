"""One pass as a mapping from TransformerLens hook names to tensors and features.

prompts → recording → cache["blocks.3.hook_transcoder_acts"], cache["resid_pre", 3]
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from hooks.errors import UserError
from hooks.host import Batch
from hooks.passes import Recording
from hooks.sites import SITE_NAMES, Site
from hooks.types import SparseActs

PARTS = ("transcoder_acts", "transcoder_out", "transcoder_error")
Key = str | tuple[str, int]


@dataclass(frozen=True)
class FeatureCache(Mapping[str, SparseActs | Tensor]):
    """One plain pass over a batch of prompts. Made by `HookedModel.feature_cache`.

    | name | what | shape |
    |---|---|---|
    | `blocks.L.hook_transcoder_acts` | features of layer L | `SparseActs`, [batch pos k] |
    | `blocks.L.hook_transcoder_out` | reconstruction of the write site | [batch pos d_model] |
    | `blocks.L.hook_transcoder_error` | write site − reconstruction | [batch pos d_model] |
    | the TransformerLens name of a site | the tensor at this site | [batch pos d_model] |

    Sites are the requested ones, and those that the transcoders read and write. `cache["transcoder_acts", 3]`
    and `cache["resid_pre", 3]` are short forms. Prompts are padded on the right; `cache.batch.mask` is True at real
    tokens.
    """

    recording: Recording

    @property
    def batch(self) -> Batch:
        """The prompts' tokens."""
        return self.recording.batch

    @property
    def logits(self) -> Float[Tensor, "batch pos vocab"]:
        """The model's predictions."""
        return self.recording.logits

    def __getitem__(self, key: Key) -> SparseActs | Tensor:
        name = self._name(key)
        for layer, record in self.recording.layers.items():
            if name == _part("transcoder_acts", layer):
                return record.acts
            if name == _part("transcoder_out", layer):
                return record.reconstruction
            if name == _part("transcoder_error", layer):  # computed at each use
                return record.error
        streams = {site.lens_name: x for site, x in self.recording.streams.items()}
        if name in streams:
            return streams[name]
        raise KeyError(f"{name} is not in this cache; it has {', '.join(self)}")

    def __iter__(self) -> Iterator[str]:
        yield from (_part(part, layer) for layer in self.recording.layers for part in PARTS)
        yield from (site.lens_name for site in self.recording.streams)

    def __len__(self) -> int:
        return len(PARTS) * len(self.recording.layers) + len(self.recording.streams)

    @staticmethod
    def _name(key: Key) -> str:
        if isinstance(key, str):
            return key
        name, layer = key
        return Site(name, layer).lens_name if name in SITE_NAMES else _part(name, layer)

    def layers(self, part: str) -> tuple[int, ...]:
        """Layers that have this part or site, ascending."""
        if part in PARTS:
            return tuple(self.recording.layers)
        return tuple(sorted(site.layer for site in self.recording.streams if site.name == part))

    def stack(self, part: str) -> SparseActs | Tensor:
        """One part or site of all layers in `layers(part)`, stacked along a new first axis: [layer batch pos …]. A
        copy.

        Raises:
            UserError: no layer has it, or the layers keep different numbers of features.
        """
        found = [self[part, layer] for layer in self.layers(part)]
        if not found:
            sites = dict.fromkeys(site.name for site in self.recording.streams)
            raise UserError(f"this cache has no {part!r}", expected=", ".join((*PARTS, *sites)))
        acts = [each for each in found if isinstance(each, SparseActs)]
        if not acts:
            return torch.stack([each for each in found if isinstance(each, Tensor)])
        if len({each.values.shape for each in acts}) > 1:
            raise UserError(
                "layers that keep different numbers of features cannot be stacked",
                found=", ".join(str(each.values.shape[-1]) for each in acts),
                repair="take them one by one, or to_frame()",
            )
        values, indices = torch.stack([each.values for each in acts]), torch.stack([each.indices for each in acts])
        return SparseActs(values, indices, self.batch.mask.expand(len(acts), -1, -1))

    def to_frame(self) -> pd.DataFrame:
        """Every active feature at every real token, one per line: row, pos, token, layer, feature, activation."""
        frames = [self._frame(layer) for layer in self.recording.layers]
        return pd.concat(frames, ignore_index=True)

    def _frame(self, layer: int) -> pd.DataFrame:
        acts, strings = self.recording.layers[layer].acts, self.batch.strings
        active = (acts.values > 0) & self.batch.mask.to(acts.values.device)[..., None]
        row, pos, _ = (axis.tolist() for axis in active.nonzero(as_tuple=True))
        return pd.DataFrame(
            {
                "row": row,
                "pos": pos,
                "token": [strings[r][p] for r, p in zip(row, pos, strict=True)],
                "layer": layer,
                "feature": acts.indices[active].tolist(),
                "activation": acts.values[active].tolist(),
            }
        )


def _part(part: str, layer: int) -> str:
    return f"blocks.{layer}.hook_{part}"
