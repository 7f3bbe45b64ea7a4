"""Options of `circuits train`."""

from pathlib import Path
from typing import Any

from circuits.options._shared import add_dtype, add_layers, add_out, add_plot, add_seed, command, count, whole
from hooks.choices import TRAIN_TOKENS

EXAMPLES = (
    "train --model demo --out my-set",
    "train --model Qwen/Qwen2.5-1.5B --text corpus.jsonl --tokens 5000000 --out qwen-set",
)


def add(commands: Any) -> None:
    """Its options."""
    about = "train transcoders for a model on text"
    parser = command(commands, "train", about, model=False, examples=EXAMPLES)
    group = parser.add_argument_group("model")
    group.add_argument("--model", default="demo", help="demo (embedded, default), a folder, a GGUF file, or a hub id")
    add_dtype(group, "the model's (default: the checkpoint's)")
    group.add_argument("--device", help="cpu, cuda, cuda:1, …")
    group.add_argument("--device-map", metavar="MAP", help="let accelerate place the model, for example auto")
    group = parser.add_argument_group("text")
    group.add_argument(
        "--text",
        type=Path,
        metavar="FILE",
        help="a text file, .jsonl or .parquet (default: built in)",
    )
    group.add_argument("--written", type=count, metavar="N", help="also N tokens that the model writes itself")
    group.add_argument(
        "--tokens", type=count, default=TRAIN_TOKENS, metavar="N", help=f"how much of it (default {TRAIN_TOKENS})"
    )
    group.add_argument("--window", type=count, default=128, metavar="N", help="tokens of a window (default 128)")
    group = parser.add_argument_group("set")
    group.add_argument(
        "--read", default="resid_pre", metavar="SITE", help="the site the transcoders read (default resid_pre)"
    )
    group.add_argument("--write", metavar="SITE", help="the site they reconstruct (default: the same)")
    group.add_argument("--features", type=count, metavar="F", help="features of each")
    group.add_argument("--expansion", type=float, metavar="X", help="or features per dimension (default 2.4)")
    group.add_argument("--k", type=whole, metavar="N", help="features TopK keeps (default: 12 %% of them)")
    add_layers(group)
    group = parser.add_argument_group("training")
    group.add_argument("--batch-tokens", type=count, default=1024, metavar="N", help="tokens of a step (default 1024)")
    group.add_argument("--chunk", type=count, default=65_536, metavar="N", help="tokens held at a time (default 65536)")
    group.add_argument(
        "--learning-rate", type=float, metavar="X", help="of AdamW (default 1.5e-3; less above 4,096 features)"
    )
    group.add_argument("--memory-gb", type=float, metavar="GB", help="for layers and activations (default: 60 %% free)")
    add_seed(group, "starting features, order of the text")
    add_out(parser, "the set, a new folder, or one that holds a training that was stopped", required=True)
    add_plot(parser, "how the set got better")
