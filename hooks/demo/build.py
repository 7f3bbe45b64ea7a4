"""Build the demo folder from a seed: `python -m hooks.demo.build --seed 0 --out DIR`.

Trains the model and both transcoder sets on one thread, so the same seed on the same machine and versions gives
byte-identical files; the sha256 of each is printed.
"""

import argparse
import dataclasses
import hashlib
import json
import logging
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

from hooks.demo.tokenizer import EOS_ID, build_tokenizer
from hooks.demo.train_model import ModelRecipe, encode_sentences, train_model
from hooks.demo.train_transcoders import (
    LAYER_NORM_EPS,
    TranscoderRecipe,
    TranscoderStack,
    dense_recipe,
    residuals_before_blocks,
    site_tensors,
    train_transcoders,
)
from hooks.demo.world import (
    CITIES,
    HEADLINE_PROMPT,
    N_TRAINING_SENTENCES,
    STATES,
    TEST_TEMPLATE,
    TWO_HOP_TEMPLATES,
    held_out_cities,
    training_sentences,
)

SPARSE_RECIPE = TranscoderRecipe(d_features=512, k=8)


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_model(folder: Path, model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write config, weights and tokenizer in the Hugging Face layout."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)


def write_transcoders(folder: Path, stack: TranscoderStack, recipe: TranscoderRecipe, seed: int) -> None:
    """Write one set in the native format: a manifest and one safetensors file per block."""
    folder.mkdir(parents=True, exist_ok=True)
    layers = {}
    for site in range(len(stack.W_dec)):
        path = folder / f"layer_{site:02d}.safetensors"
        save_file(site_tensors(stack, site), path)
        layers[str(site)] = {"file": path.name, "sha256": sha256(path)}
    manifest = {
        "format": "qwen-circuits",
        "version": 1,
        "base_model": "demo",
        "d_model": stack.W_dec.shape[-1],
        "d_features": recipe.d_features,
        "read": "resid_pre",
        "write": "resid_pre",
        "sites_source": "stored",
        "input_norm": {"kind": "layernorm", "eps": LAYER_NORM_EPS},
        "activation": {"kind": "topk", "k": recipe.k, "order": "topk-relu"},
        "layers": layers,
        "source": {"trained_by": "hooks.demo.build", "seed": seed},
    }
    _write_json(folder / "manifest.json", manifest)


def write_world(folder: Path, seed: int, recipes: dict[str, object]) -> None:
    """Write what a reader needs to know about the training world."""
    world = {
        "seed": seed,
        "headline_prompt": HEADLINE_PROMPT,
        "test_template": TEST_TEMPLATE,
        "capital_templates": list(TWO_HOP_TEMPLATES["capital"]),
        "held_out_cities": held_out_cities(seed),
        "n_states": len(STATES),
        "n_cities": len(CITIES),
        "n_training_sentences": N_TRAINING_SENTENCES,
        "recipes": {name: dataclasses.asdict(recipe) for name, recipe in recipes.items()},
    }
    _write_json(folder / "world.json", world)


def build(
    seed: int,
    folder: Path,
    model_recipe: ModelRecipe | None = None,
    sparse_recipe: TranscoderRecipe = SPARSE_RECIPE,
    dense: TranscoderRecipe | None = None,
) -> None:
    """Train everything from the seed and write the folder."""
    torch.set_num_threads(1)
    model_recipe = model_recipe or ModelRecipe()
    dense = dense or dense_recipe(model_recipe.d_model)
    tokenizer = build_tokenizer()
    model = train_model(tokenizer, seed, model_recipe)
    write_model(folder, model, tokenizer)
    sentences = list(training_sentences(seed, sparse_recipe.n_sentences))
    ids, _ = encode_sentences(tokenizer, sentences, model_recipe)
    residuals = residuals_before_blocks(model, ids, ids != EOS_ID)
    for name, recipe in (("demo", sparse_recipe), ("demo-dense", dense)):
        stack = train_transcoders(residuals, recipe, seed)
        write_transcoders(folder / "transcoders" / name, stack, recipe, seed)
    write_world(folder, seed, {"model": model_recipe, "demo": sparse_recipe, "demo-dense": dense})


def main() -> None:
    """Command line: build a seed and print the hash of every file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    build(arguments.seed, arguments.out)
    for path in sorted(p for p in arguments.out.rglob("*") if p.is_file()):
        print(sha256(path), path.stat().st_size, path.relative_to(arguments.out))


if __name__ == "__main__":
    main()
