"""The cost of loading transcoders of the published shape: memory, bytes of files, seconds.

Every case is measured in a new process, on files in a temporary folder (1.5 GB at full size): one layer in the
published form, five in the native form, and a set of another model's shape, 27 layers, whose files are sparse. "Extra
memory" is the kernel's high-water mark of resident bytes minus the bytes before the folder was opened.
"""

import argparse
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from _measure import clock, emit, machine, peak_since, say, start_peak

from hooks import Site, Transcoder
from hooks.checkpoints import TranscoderStore
from hooks.formats import native
from hooks.sites import SiteSpec

SITE = "resid_pre"


@dataclass(frozen=True)
class Sizes:
    """A set's shape; `sibling` is (layers, width, features) of another one."""

    d_model: int
    features: int
    layers: int
    tokens: int
    rows: int
    budget_bytes: int
    sibling: tuple[int, int, int]


FULL = Sizes(5120, 12288, 5, 32, 100, 600_000_000, (27, 3584, 8192))
TINY = Sizes(64, 256, 5, 4, 10, 200_000, (27, 48, 64))
PUBLISHED = 30  # the layer of the published-form file


def random_transcoder(layer: int, sizes: Sizes) -> Transcoder:
    """Random weights in bf16."""
    draw = torch.Generator().manual_seed(layer)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw).mul_(0.02).bfloat16()

    site = Site(SITE, layer)
    return Transcoder(
        layer=layer,
        read=site,
        write=site,
        W_enc=normal(sizes.features, sizes.d_model),
        b_enc=normal(sizes.features),
        W_dec=normal(sizes.features, sizes.d_model),
        b_dec=normal(sizes.d_model),
        norm_weight=1 + normal(sizes.d_model),
        norm_bias=normal(sizes.d_model),
        norm_eps=1e-5,
        k=max(1, int(0.12 * sizes.features)),
    )


def publish(root: Path, t: Transcoder) -> None:
    """One file in the published layout."""
    parts = {"enc.0.weight": t.norm_weight, "enc.0.bias": t.norm_bias, "enc.1.weight": t.W_enc, "enc.1.bias": t.b_enc}
    parts |= {"dec.weight": t.W_dec.T.contiguous(), "dec.bias": t.b_dec}
    root.mkdir(exist_ok=True)
    content = {
        "layer": t.layer,
        "hidden_dim": t.d_model,
        "feature_dim": t.d_features,
        "state_dict": {f"_orig_mod.{key}": part for key, part in parts.items()},
        "training_metadata": {"steps": 5000, "final_l0_pct": 12.0},
    }
    torch.save(content, root / f"transcoder_L{t.layer}.pt")


def write_files(root: Path, sizes: Sizes) -> None:
    """Write all files that the cases read."""
    torch.set_num_threads(2)
    made = (random_transcoder(layer, sizes) for layer in range(sizes.layers))
    native.save(root / "native", made, read=SiteSpec(SITE), write=SiteSpec(SITE))
    publish(root / "published", random_transcoder(PUBLISHED, sizes))
    layers, d_model, features = sizes.sibling
    hollow = Sizes(d_model, features, layers, 0, 0, 0, sizes.sibling)
    with torch.serialization.skip_data():  # files of full length whose tensors were never written: zeros
        for layer in range(layers):
            publish(root / "sibling", random_transcoder(layer, hollow))


def opened(root: Path, **options: Any) -> TranscoderStore:
    """A set whose sites are known, so that no warning is printed."""
    return TranscoderStore.open(root, read=SITE, write=SITE, **options)


def bytes_read() -> int:
    """Bytes this process has asked the kernel for by reading; mapped pages are not among them."""
    file = Path("/proc/self/io")
    lines = file.read_text().splitlines() if file.is_file() else []
    return next((int(line.split()[1]) for line in lines if line.startswith("rchar")), 0)


def load_and_encode(root: Path, sizes: Sizes, layer: int) -> dict[str, Any]:
    """One layer: extra memory of loading it and encoding; seconds of the first load and of a second one."""
    x = torch.randn(sizes.tokens, sizes.d_model)
    start, seen = start_peak(), []
    store = opened(root)

    def load() -> None:
        store.drop(layer)
        seen.append(store[layer].nbytes)

    first = clock(load)
    encode_s = clock(lambda: store[layer].encode(x))
    extra = peak_since(start)
    return {
        "layer_bytes": seen[0],
        "extra_bytes": extra,
        "load_s": first,
        "load_again_s": clock(load),
        "encode_s": encode_s,
    }


def open_folder(root: Path, sizes: Sizes) -> dict[str, Any]:
    """Only opening the folder, without a layer."""
    start, stores = start_peak(), []
    seconds = clock(lambda: stores.append(opened(root)))
    return {"layers": len(stores[0]), "seconds": seconds, "extra_bytes": peak_since(start)}


def in_turn(root: Path, sizes: Sizes, prefetch: bool) -> dict[str, Any]:
    """All layers under the budget, twice round."""
    x = torch.randn(sizes.tokens, sizes.d_model)
    start, resident = start_peak(), [0]
    store = opened(root, budget_bytes=sizes.budget_bytes, prefetch=prefetch)

    def around() -> None:
        for transcoder in store:
            transcoder.encode(x)
            resident.append(store.nbytes)

    seconds = [clock(around), clock(around)]
    return {
        "budget_bytes": sizes.budget_bytes,
        "resident_bytes": max(resident),
        "extra_bytes": peak_since(start),
        "first_round_s": seconds[0],
        "second_round_s": seconds[1],
    }


def rows(root: Path, sizes: Sizes, layer: int) -> dict[str, Any]:
    """Some decoder rows, spread over the dictionary, of a layer that is not resident."""
    store = opened(root)
    chosen = torch.linspace(0, sizes.features - 1, sizes.rows).long().tolist()
    start, before = start_peak(), bytes_read()
    seconds = clock(lambda: store.decoder_rows(layer, chosen))
    return {
        "rows": sizes.rows,
        "bytes_read": bytes_read() - before,
        "extra_bytes": peak_since(start),
        "seconds": seconds,
    }


def cases(root: Path, sizes: Sizes) -> dict[str, tuple[Callable[..., dict[str, Any]], tuple[Any, ...]]]:
    """Name → what to call in a fresh process."""
    own, other = root / "native", root / "published"
    return {
        "load_encode": (load_and_encode, (other, sizes, PUBLISHED)),
        "load_encode_native": (load_and_encode, (own, sizes, 0)),
        "open_native": (open_folder, (own, sizes)),
        "five_in_turn": (in_turn, (own, sizes, True)),
        "five_in_turn_without_prefetch": (in_turn, (own, sizes, False)),
        "rows_native": (rows, (own, sizes, 1)),
        "rows_published": (rows, (other, sizes, PUBLISHED)),
        "open_sibling": (open_folder, (root / "sibling", sizes)),
        "load_sibling": (load_sibling, (root / "sibling", sizes)),
    }


def load_sibling(root: Path, sizes: Sizes) -> dict[str, Any]:
    """The last layer of the other model's set."""
    layers, d_model, features = sizes.sibling
    start, store = start_peak(), opened(root)
    transcoder = store[layers - 1]
    assert transcoder.W_enc.shape == transcoder.W_dec.shape == (features, d_model)
    return {"layers": len(store), "layer_bytes": transcoder.nbytes, "extra_bytes": peak_since(start)}


def measure(work: Callable[..., dict[str, Any]], given: tuple[Any, ...], threads: int) -> dict[str, Any]:
    """One case, in the process it is called in."""
    torch.set_num_threads(threads)
    small = torch.randn(64, 64)
    (small @ small).topk(3)  # allocates the library's workspaces, which are no cost of the store
    return work(*given)


def main(arguments: list[str] | None = None) -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description="Memory, bytes and seconds of loading transcoders.")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout and nothing else")
    parser.add_argument("--tiny", action="store_true", help="a small shape, to see that it works")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--keep", metavar="FOLDER", help="where to write the files, and leave them")
    args = parser.parse_args(arguments)
    sizes = TINY if args.tiny else FULL
    say("a moment" if args.tiny else "about 3 minutes on 2 free cores; 1.5 GB of disk, 1 GB of memory")
    result: dict[str, Any] = {}
    with (
        tempfile.TemporaryDirectory() as scratch,
        ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool,
    ):
        root = Path(args.keep or scratch)
        if not (root / "sibling").is_dir():
            pool.submit(write_files, root, sizes).result()
        for name, (work, given) in cases(root, sizes).items():
            result[name] = pool.submit(measure, work, given, args.threads).result()
            say(f"{name}: {result[name]}")
    emit({**result, "machine": {**machine(), "threads": args.threads, "cores": os.cpu_count()}}, as_json=args.json)


if __name__ == "__main__":
    main()
