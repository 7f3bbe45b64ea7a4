"""A model and transcoders by name: loaded, placed, and tested on tiny passes before anything is measured on them."""

from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict, Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from hooks.checkpoints import TranscoderStore
from hooks.demo import WEIGHTS
from hooks.errors import CheckpointError, ModelError, UserError, first_line
from hooks.host import Batch, Host, tap
from hooks.names import dtype_of, transcoder_folder
from hooks.passes import Swap, make_edits, make_plan
from hooks.sites import Site, SiteSpec, module_at
from hooks.transcoder import Transcoder

Transcoders = str | Path | TranscoderStore | Sequence[Transcoder]


class StoreKeywords(TypedDict):
    """What `TranscoderStore.open` is told about a set beside its name."""

    read: str | SiteSpec | None
    write: str | SiteSpec | None
    k: int | None
    encoder: str | None
    decoder: int | None
    layers: Sequence[int] | None
    budget_bytes: int | None


def open_store(transcoders: Transcoders, **options: Unpack[StoreKeywords]) -> TranscoderStore:
    """The store of a folder, of a hub id, or of transcoders in memory; options as in `TranscoderStore.open`.

    Raises:
        CheckpointError: as `TranscoderStore.open`.
        UserError: an option is given for transcoders that are already in memory.
    """
    if isinstance(transcoders, str | Path):
        folder = transcoder_folder(str(transcoders), options["layers"]).root
        return TranscoderStore.open(folder, name=str(transcoders), **options)
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise UserError(
            f"{given[0]} was given for transcoders that are already in memory",
            expected="a folder or hub id, or transcoders that carry it themselves",
            repair=f"leave {given[0]} away, or make the transcoders with it",
        )
    return transcoders if isinstance(transcoders, TranscoderStore) else TranscoderStore.of(list(transcoders))


def load_host(
    name: str | Path,
    *,
    dtype: str | torch.dtype | None,
    device: str | None,
    device_map: str | None,
    context: int | None = None,
) -> Host:
    """A language model alone, where it is wanted; see `HookedModel.load`.

    Raises:
        UserError: the device or the precision does not exist, or the model cannot be loaded.
    """
    chosen = placement(device, device_map)
    path, wanted = WEIGHTS if str(name) == "demo" else name, dtype_of(dtype)
    host = Host.load(path, dtype=wanted, device_map=device_map, context=context)
    if chosen:
        host.model.to(chosen)
    return host


def placement(device: str | None, device_map: str | None) -> torch.device | None:
    """The one device to move a model to; None: it stays, or accelerate places it."""
    if device and device_map:
        raise UserError("device and device_map contradict each other", repair="give one of them")
    return _device(device) if device else None


def _device(device: str) -> torch.device:
    try:
        chosen = torch.device(device)
        float(torch.zeros(1, device=chosen))
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"the device {device!r} cannot be used", found=first_line(error), where="--device") from None
    return chosen


def self_test(host: Host, store: TranscoderStore) -> None:
    """Tiny passes: sites are where we think they are, and edits that do nothing change nothing, bit for bit.

    Raises:
        ModelError: this model's blocks are not wired as expected; nothing measured on it could be trusted.
    """
    batch = host.batch([[0, min(1, host.d_vocab - 1), 0]])
    names = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
    layers = sorted({0, min(1, host.n_layers - 1), host.n_layers - 1})
    final, seen = host.capture(batch, [Site(name, layer) for layer in layers for name in names])
    logits = host.unembed(final)
    _check_logits(host, batch, seen[Site("resid_post", host.n_layers - 1)], logits)
    for layer in layers:
        pre, attention, mid, out, post = (seen[Site(name, layer)] for name in names)
        wired = mid.shape == (1, 3, host.d_model) and torch.equal(mid + out, post) and torch.equal(pre + attention, mid)
        if not wired:
            raise ModelError(
                f"block {layer} of {type(host.model).__name__} is not pre + attention = mid, mid + mlp = post",
                expected="a pre-norm decoder as in Qwen2, Qwen3 or Llama",
            )
    before, after = Site("resid_post", 0), Site("resid_pre", 1)
    if host.n_layers > 1 and not torch.equal(seen[before], seen[after].to(seen[before].device)):
        raise ModelError("what block 0 puts out is not what block 1 takes in")
    empty = make_edits(store, make_plan(store, [()], batch.lengths), Swap(store.layers, "live"))
    touched: dict[Site, Tensor] = {}
    taps = [tap(site, touched) for layer in store.layers for site in store.sites(layer)]
    if not torch.equal(host.forward(batch, [*empty, *taps]), logits) or len(touched) != len({t.site for t in taps}):
        raise ModelError("an empty edit changes this model's logits, or a site is never reached")


def _check_logits(
    host: Host, batch: Batch, stream: Float[Tensor, "batch pos d_model"], logits: Float[Tensor, "batch pos vocab"]
) -> None:
    with torch.no_grad():
        theirs = host.own_logits(batch, host.decoder.norm(stream)).to(logits.device)
    miss = float((logits - theirs).abs().max())
    if not miss <= 4 * torch.finfo(theirs.dtype).eps * float(theirs.abs().max()) + 1e-30:
        raise ModelError(
            f"{type(host.model).__name__} makes its logits in a way that is not known here",
            expected="the unembedding of what is behind the final norm, scaled or capped as config.json says",
            found=f"logits up to {miss:.2g} from the model's own",
        )


def check_fit(host: Host, store: TranscoderStore) -> None:
    """Refuse transcoders that were made for another model.

    Raises:
        CheckpointError: the widths differ, or a layer would write before it reads.
        ModelError: the model has no such site.
    """
    for layer in store.layers:
        if store.d_model(layer) != host.d_model:
            raise CheckpointError(
                "the transcoders do not fit the model",
                expected=f"width {host.d_model}, the model's hidden size",
                found=f"width {store.d_model(layer)} at layer {layer}",
                where=store.name,
                repair="use the transcoders that were trained on this model",
            )
        read, write = store.sites(layer)
        for site in (read, write):
            module_at(host.model, site)
        if write.depth < read.depth:
            raise CheckpointError(
                f"layer {layer} would write {write} before it reads {read}",
                expected="a write site at or behind the read site",
                where=store.name,
                repair="check --read and --write",
            )
