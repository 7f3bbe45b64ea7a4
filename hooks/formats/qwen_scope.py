"""Qwen-Scope: TopK autoencoders of the residual stream of Qwen3 and Qwen3.5, one `layer{n}.sae.pt` each.

Each file is a dict of W_enc[F,D], W_dec[D,F], b_enc and b_dec; pre = x @ W_enc.T + b_enc, with nothing subtracted
from x. By the card and SAELens they belong to the output of block n. The files state neither this nor how many features
TopK keeps: k is only in the repository's name (`SAE-Res-Qwen3-8B-Base-W64K-L0_50`: k = 50), so it has to be given.
Sources: the cards of the Qwen team, SAELens's `qwen_scope` loader (pull request 677).
"""

import re
from pathlib import Path

from hooks.formats import Checkpoint, LayerSource, TensorSource
from hooks.formats._stored import check_shapes, float_shapes, matrix, one_per_layer
from hooks.sites import SiteSpec

_FILE = re.compile(r"layer(\d{1,6})\.sae\.pt")
_IN_THE_NAME = re.compile(r"SAE-Res-.+?-L0_(\d+)")
_RESID_POST = SiteSpec("resid_post")


def matches(root: Path) -> bool:
    """Whether the folder has at least one `layer{n}.sae.pt`."""
    return any(_FILE.fullmatch(path.name) for path in root.iterdir())


def locate(root: Path) -> Checkpoint:
    """Describe every layer's file. k stays unknown.

    Raises:
        CheckpointError: a file is damaged, lacks a tensor or has shapes that contradict each other.
    """
    files = sorted((int(m[1]), path) for path in root.iterdir() if (m := _FILE.fullmatch(path.name)))
    one_per_layer(files, root)
    return Checkpoint(
        root,
        "qwen_scope",
        tuple(_layer(number, path) for number, path in files),
        read=_RESID_POST,
        write=_RESID_POST,
        norm="none",
        notes=(
            "the files do not say where they sit: the output of each block (resid_post) is assumed, as on the card",
        ),
        sites_source="assumed",
        encoder_source="assumed",
        selection_notes=(_where_k_stands(root),),
    )


def _where_k_stands(root: Path) -> str:
    """A text about where to find k. In a hub cache the repository's name is two folders up,
    `models--Qwen--SAE-Res-...`."""
    told = "k is in the repository's name, as in SAE-Res-Qwen3-8B-Base-W64K-L0_50: --k 50"
    named = next((m for part in reversed(root.absolute().parts) if (m := _IN_THE_NAME.search(part))), None)
    return f"{told}; here {named[0]}: --k {named[1]}" if named else told


def _layer(number: int, path: Path) -> LayerSource:
    shapes = float_shapes(path)
    f, d = matrix(shapes, "W_enc", path)
    check_shapes(shapes, {"W_enc": (f, d), "W_dec": (d, f), "b_enc": (f,), "b_dec": (d,)}, path)
    tensors = {
        key: TensorSource(path, (key,), transposed=key == "W_dec") for key in ("W_enc", "W_dec", "b_enc", "b_dec")
    }
    return LayerSource(number, d, f, tensors, None, "unknown", activation="topk")
