"""One transcoder at the published shape: encode, TopK and decode, ours against the dense code of the model card.

    python benchmarks/kernel_speed.py [--json] [--tiny] [--repeats N] [--device cpu|cuda]

12,288 × 5,120, k = 1,474, 1 token and 32, weights in bf16 and in fp32. The dense code, in the weights' precision, is
one product, `torch.topk`, a scatter into a dense tensor, one product with the whole decoder (with the encoder's true
norm: the card's own gives other features). Ours keeps pre-activations in fp32 also for bf16 weights, so that no
features tie at the threshold; that costs time on the CPU, which has no such product.

A floor is the bytes of the encoder and of the kept decoder rows, each read once, over the bandwidth that is measured
at the start. With `--device cuda` 63 transcoders run one after the other in one CUDA graph, for ours and for the dense
code; figures are then per transcoder. There TopK is the form without data-dependent shapes; on the CPU it is
quickselect.
"""

import argparse
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from _measure import clock, emit, interleaved, machine, say
from _worlds import Shape, random_model
from torch import Tensor

from hooks import Transcoder
from hooks.kernels import select_static
from hooks.types import SparseActs

FULL = Shape(63, 5120, 8, 1, 1, features=12288, k=1474, head_dim=16, vocab=16, transcoders=1)
TINY = Shape(2, 40, 8, 1, 1, features=96, k=11, head_dim=16, vocab=16, transcoders=1)
ON_CUDA = 63
Stages = dict[str, Callable[[], Any]]


def transcoders(shape: Shape, dtype: torch.dtype, device: str) -> list[Transcoder]:
    """One on the CPU; as many as the published set has on CUDA, so that no cache holds them."""
    count = shape.layers if device == "cuda" else 1
    whole = Shape(**{**vars(shape), "layers": count, "transcoders": count})
    return list(random_model(whole, dtype=dtype, device=device).store)


def ours(coder: Transcoder, x: Tensor, *, static: bool) -> Stages:
    """Our stages; each works on the result of the one before."""
    select = partial(select_static, k=coder.k) if static else coder.select
    pre = coder.preactivations(x)
    acts = select(pre)
    return {
        "encode": lambda: coder.preactivations(x),
        "select": lambda: select(pre),
        "decode": lambda: coder.decode(acts),
        "whole": lambda: coder.decode(select(coder.preactivations(x))),
    }


def dense(coder: Transcoder, x: Tensor) -> Stages:
    """The card's: everything in the weights' precision, activations dense. The decoder is [d_model feature] there."""
    decoder = coder.W_dec.T.contiguous()
    x = x.to(coder.W_enc.dtype)
    assert coder.k is not None
    k = coder.k

    def encode() -> Tensor:
        normed = F.layer_norm(x, (coder.d_model,), coder.norm_weight, coder.norm_bias, coder.norm_eps)
        return F.linear(normed, coder.W_enc, coder.b_enc)

    def select(pre: Tensor) -> Tensor:
        values, indices = torch.topk(pre.relu(), k, dim=-1)
        return torch.zeros_like(pre).scatter_(-1, indices, values)

    def decode(acts: Tensor) -> Tensor:
        return F.linear(acts, decoder, coder.b_dec)

    pre = encode()
    acts = select(pre)
    return {
        "encode": encode,
        "select": lambda: select(pre),
        "decode": lambda: decode(acts),
        "whole": lambda: decode(select(encode())),
    }


def all_of(stages: list[Stages], device: str) -> Stages:
    """Each stage of all transcoders in turn; on CUDA as one graph."""
    out: Stages = {}
    for name in stages[0]:
        work = partial(_each, [own[name] for own in stages])
        out[name] = captured(work) if device == "cuda" else work
    return out


def _each(works: list[Callable[[], Any]]) -> None:
    for work in works:
        work()


def captured(work: Callable[[], Any]) -> Callable[[], Any]:
    """Some work as one CUDA graph, after a warm-up on a stream of its own; calling it replays the graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def measured_bandwidth(device: str, entries: int) -> float:
    """Bytes read per second by a sum over a tensor that no cache holds; the best of five."""
    x = torch.ones(entries, device=device)
    return x.nbytes / min(clock(x.sum, device) for _ in range(5))


def least_bytes(coder: Transcoder, acts: SparseActs) -> dict[str, int]:
    """Bytes of weights that each stage must read: the encoder; the rows of all features that some token kept."""
    rows = len(acts.indices.unique())
    size = coder.W_enc.element_size() * coder.d_model
    return {"encode": size * coder.d_features, "decode": size * rows, "whole": size * (coder.d_features + rows)}


@torch.no_grad()
def measure(coders: list[Transcoder], tokens: int, device: str, repeats: int, bandwidth: float) -> dict[str, Any]:
    """Seconds per transcoder of every stage, of both codes in turn."""
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, coders[0].d_model, generator=generator).to(device)
    cuda = device == "cuda"
    works = {
        **{f"ours_{n}": w for n, w in all_of([ours(c, x, static=cuda) for c in coders], device).items()},
        **{f"dense_{n}": w for n, w in all_of([dense(c, x) for c in coders], device).items()},
    }
    for work in works.values():
        clock(work, device)
    seconds = {name: spent / len(coders) for name, spent in interleaved(works, repeats, device).items()}
    acts = coders[0].encode(x)
    least = least_bytes(coders[0], acts)
    return {
        "ratio": seconds["dense_whole"] / seconds["ours_whole"],
        "stage_ratio": {n: seconds[f"dense_{n}"] / seconds[f"ours_{n}"] for n in ("encode", "select", "decode")},
        "seconds": seconds,
        "gb_per_s": {n: count / seconds[f"ours_{n}"] / 1e9 for n, count in least.items()},
        "share_of_floor": {n: count / bandwidth / seconds[f"ours_{n}"] for n, count in least.items()},
        "rel_diff": _difference(coders[0], x, acts),
    }


def _difference(coder: Transcoder, x: Tensor, acts: SparseActs) -> float:
    """Of the two reconstructions, relative to the larger one's norm: bf16's rounding, or the order of fp32 sums."""
    mine, theirs = coder.decode(acts), dense(coder, x)["whole"]().float()
    return float((mine - theirs).norm() / mine.norm())


def run(shape: Shape, device: str, repeats: int) -> Mapping[str, Any]:
    """Both precisions, 1 token and 32."""
    bandwidth = measured_bandwidth(device, 1 << 22 if shape is TINY else 1 << 28)
    found: dict[str, Any] = {"bandwidth_gb_per_s": bandwidth / 1e9}
    for dtype in (torch.bfloat16, torch.float32):
        coders = transcoders(shape, dtype, device)
        name = str(dtype).removeprefix("torch.")
        found[name] = {}
        for tokens in (1, 32):
            case = measure(coders, tokens, device, repeats, bandwidth)
            found[name][str(tokens)] = case
            whole = {who: 1e3 * case["seconds"][f"{who}_whole"] for who in ("ours", "dense")}
            say(f"{name}, {tokens} tokens: ours {whole['ours']:.2f} ms, dense {whole['dense']:.2f} ms")
        del coders
    return found


def main(arguments: list[str] | None = None) -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description="Encode, TopK and decode at the published shape.")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout and nothing else")
    parser.add_argument("--tiny", action="store_true", help="a small shape, to see that it works")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--repeats", type=int, default=9, help="medians are reported")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    if args.device == "cuda" and not torch.cuda.is_available():
        say("no CUDA device here")
        emit({"skipped": "no CUDA device", "machine": machine()}, as_json=args.json)
        return
    shape = TINY if args.tiny else FULL
    say("a moment" if args.tiny else "about 2 minutes on 2 free cores; 2 GB of memory")
    found = run(shape, args.device, args.repeats)
    emit({"shape": str(shape), **found, "machine": machine(args.device)}, as_json=args.json)


if __name__ == "__main__":
    main()
