"""Sweeps of random small models: every row equals one run with the same interventions, to 1e-5 in fp64.

Qwen2, Qwen3, Llama and Mistral, Qwen3-MoE and Qwen3.5 hybrids; windows shorter and longer than the prompt, in all
blocks or in some; tied, biased, scaled rotations, eager and SDPA; sets at any site.

    python stress/sweeps.py --json [--count 200] [--seed 0]
"""

import argparse
import json
import random
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from hooks import Ablate, Add, Clamp, HookedModel, Scale, Site, Transcoder, UserError

EXACT = 1e-5
COUNT = 200
FAMILIES = ("Qwen2", "Qwen3", "Llama", "Mistral") * 2 + ("Qwen3Moe", "Qwen3_5")
D_MODEL, VOCABULARY, FEATURES = 24, 40, 30
SITES = (
    ("resid_pre", "resid_pre"), ("resid_post", "resid_post"), ("resid_mid", "resid_mid"), ("mlp_in", "mlp_out"),
    ("resid_pre", "resid_post"), ("resid_pre", "attn_out"),
)  # fmt: skip
ROTATIONS: tuple[dict[str, Any], ...] = (
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8},
    {"rope_type": "linear", "factor": 2.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8, "low_freq_factor": 1.0,
     "high_freq_factor": 4.0},
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One model, a prompt, and groups to sweep; all of it follows from the number."""

    family: str
    options: dict[str, Any]
    sites: tuple[str, str]
    length: int
    seed: int

    @property
    def windowed(self) -> bool:
        """Whether some block leaves tokens of the prompt out."""
        window = self.options.get("sliding_window")
        return window is not None and window < self.length


def case(number: int, seed: int = 0) -> Case:
    """The model of one number: its family, its sizes, its windows."""
    draw = random.Random(f"{seed} {number}")
    family = FAMILIES[number % len(FAMILIES)]
    layers, length = draw.randint(2, 4), draw.randint(2, 14)
    kv = draw.choice((1, 2))
    options: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": D_MODEL, "intermediate_size": 32, "num_hidden_layers": layers,
        "num_attention_heads": kv * draw.choice((1, 2, 3)), "num_key_value_heads": kv, "head_dim": draw.choice((4, 8)),
        "max_position_embeddings": 64, "initializer_range": 0.3, "bos_token_id": 0, "eos_token_id": 0,
        "pad_token_id": 0, "tie_word_embeddings": draw.random() < 0.5,
        "attn_implementation": draw.choice(("eager", "sdpa")),
    }  # fmt: skip
    window = draw.choice((None, draw.randint(1, length), draw.randint(1, length), length + draw.randint(0, 3)))
    if family in ("Qwen2", "Qwen3") and window:
        options |= {"use_sliding_window": True, "sliding_window": window}
        if draw.random() < 0.5:
            options["max_window_layers"] = draw.randint(0, layers - 1)
        else:
            kinds = ("full_attention", "sliding_attention")
            options["layer_types"] = [*(draw.choice(kinds) for _ in range(layers - 1)), "sliding_attention"]
    elif family == "Qwen3Moe":
        options |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
        options["experts_implementation"] = "eager"  # torch groups products in fp32 at most
        options |= {"use_sliding_window": bool(window), "sliding_window": window}
    elif family == "Mistral":
        options["sliding_window"] = window
    elif family == "Qwen3_5":
        kinds = ("linear_attention", "full_attention")
        options["layer_types"] = [*(draw.choice(kinds) for _ in range(layers - 1)), "full_attention"]
        options |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
        options |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
    if family in ("Qwen3", "Llama"):
        options["attention_bias"] = draw.random() < 0.5
    if family not in ("Qwen3_5", "Qwen3Moe") and draw.random() < 0.3:
        options["rope_parameters"] = {"rope_theta": 10000.0} | draw.choice(ROTATIONS)
    return Case(family, options, draw.choice(SITES), length, number)


def build(made: Case) -> HookedModel:
    """The model in fp64, with a set for every layer."""
    torch.manual_seed(made.seed)
    config = getattr(transformers, f"{made.family}TextConfig" if made.family == "Qwen3_5" else f"{made.family}Config")
    network = getattr(transformers, f"{made.family}ForCausalLM")(config(**made.options)).double()
    for name, parameter in network.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    generator = torch.Generator().manual_seed(made.seed)

    def drawn(*shape: int) -> torch.Tensor:
        return 0.3 * torch.randn(*shape, generator=generator, dtype=torch.float64)

    read, write = made.sites
    sets = [
        Transcoder(
            layer, Site(read, layer), Site(write, layer), drawn(FEATURES, D_MODEL), drawn(FEATURES),
            drawn(FEATURES, D_MODEL), drawn(D_MODEL), None, None, 1e-6, 6,
        )
        for layer in range(made.options["num_hidden_layers"])
    ]  # fmt: skip
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w0")
    return HookedModel.from_model(network, tokenizer, sets)


def groups_of(model: HookedModel, ids: list[int], draw: random.Random) -> list[list[object]]:
    """Active features at the first, the last and one more token of every layer; then groups over several."""
    recording, length = model.record([ids]), len(ids)
    groups: list[list[object]] = []
    for layer in model.store.layers:
        acts = recording.layers[layer].acts
        for pos in sorted({0, draw.randrange(length), length - 1}):
            feature = int(acts.indices[0, pos, int(acts.values[0, pos].argmax())])
            groups.append([Ablate(f"L{layer}/{feature}@{pos}")])
    last = model.store.layers[-1]
    several: list[list[object]] = [
        [Clamp(f"L0/{draw.randrange(FEATURES)}", 2.0)],
        [Add("L0/3@0", 1.0), Scale(f"L{last}/{draw.randrange(6, FEATURES)}", 3.0), Add("L1/5@-1", -1.0)],
        [Clamp(f"L{last}/{draw.randrange(FEATURES)}@{length // 2}:", 1.5)],
    ]
    return groups + several


def check(made: Case) -> dict[str, Any]:
    """Compare sweep and run on one model: rows, the largest difference, and how the groups were run."""
    draw = random.Random(made.seed)
    model, ids = build(made), [draw.randrange(VOCABULARY) for _ in range(made.length)]
    groups, position = groups_of(model, ids, draw), draw.choice((-1, -1, made.length // 2))
    try:
        found = model.sweep(ids, groups, pos=position)
    except UserError as error:
        return {"rows": 0, "largest": 0.0, "way": "refused", "why": error.problem}
    alone = [model.run(ids, group).effect(pos=position).delta for group in groups]
    misses = [abs(one - row) for one, row in zip(alone, found.table["delta"], strict=True)]
    return {"rows": len(groups), "largest": max(misses), "way": found.way}


def measure(count: int = COUNT, seed: int = 0) -> dict[str, Any]:
    """Some models, one after the other."""
    out: dict[str, Any] = {
        "count": count, "failed": 0, "rows": 0, "largest": 0.0, "windowed": 0, "suffix": 0, "whole": 0, "refused": 0,
        "failures": [],
    }  # fmt: skip
    for number in range(count):
        made = case(number, seed)
        found = check(made)
        out["rows"] += found["rows"]
        out["largest"] = max(out["largest"], found["largest"])
        out["windowed"] += made.windowed
        out[found["way"]] += 1
        if not found["largest"] <= EXACT:
            out["failed"] += 1
            out["failures"].append({"number": number, "largest": found["largest"]})
    return out


def main() -> int:
    """Run and print one JSON object; exit status 1 if a row is not what `run` gives."""
    parser = argparse.ArgumentParser(description="sweep = run on random small models")
    parser.add_argument("--json", action="store_true", help="one line")
    parser.add_argument("--count", type=int, default=COUNT)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(asked.count, asked.seed)
    print(json.dumps(found, indent=None if asked.json else 2))
    return int(found["failed"] > 0)


if __name__ == "__main__":
    raise SystemExit(main())
