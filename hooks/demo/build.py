"""Build the demo folder from a seed: `python -m hooks.demo.build --seed 0 --out DIR`.

Trains the model and both transcoder sets on one thread, so the same seed on the same machine and versions gives
byte-identical files. `--check` builds the shipped seed into a temporary folder and compares every file.
"""

import argparse
import dataclasses
import json
import logging
import sys
import tempfile
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

from hooks.demo import WEIGHTS
from hooks.demo.tokenizer import EOS_ID, build_tokenizer
from hooks.demo.train_model import ModelRecipe, encode_sentences, train_model
from hooks.demo.train_transcoders import (
    TranscoderRecipe,
    as_transcoders,
    dense_recipe,
    residuals_before_blocks,
    train_transcoders,
)
from hooks.demo.world import (
    CITIES,
    HEADLINE_PROMPT,
    N_TRAINING_SENTENCES,
    STATES,
    TEST_TEMPLATE,
    TWO_HOP_TEMPLATES,
    copying_sentences,
    held_out_cities,
    training_sentences,
)
from hooks.files import sha256, write_json
from hooks.formats import native
from hooks.host import Host
from hooks.sites import SiteSpec

SPARSE_RECIPE = TranscoderRecipe(d_features=640, k=9)
RESIDUAL = SiteSpec("resid_pre")


def write_model(folder: Path, model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write config, weights and tokenizer in the Hugging Face layout."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    (folder / "model.safetensors").chmod(0o644)


def write_world(folder: Path, seed: int, recipes: dict[str, ModelRecipe | TranscoderRecipe]) -> None:
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
    write_json(folder / "world.json", world)


def build(
    seed: int,
    folder: Path,
    model_recipe: ModelRecipe | None = None,
    sparse_recipe: TranscoderRecipe = SPARSE_RECIPE,
    dense: TranscoderRecipe | None = None,
) -> None:
    """Train everything from the seed and write the folder."""
    torch.set_num_threads(1)  # more threads change the order of sums, hence the bytes
    model_recipe = model_recipe or ModelRecipe()
    dense = dense or dense_recipe(model_recipe.d_model)
    tokenizer = build_tokenizer()
    model = train_model(tokenizer, seed, model_recipe)
    write_model(folder, model, tokenizer)
    sentences = [
        *training_sentences(seed, sparse_recipe.n_sentences),
        *copying_sentences(seed, sparse_recipe.n_copying),
    ]
    ids, _ = encode_sentences(tokenizer, sentences, model_recipe)
    residuals = residuals_before_blocks(Host(model, tokenizer), ids, ids != EOS_ID)
    for name, recipe in (("demo", sparse_recipe), ("demo-dense", dense)):
        transcoders = as_transcoders(train_transcoders(residuals, recipe, seed))
        native.save(
            folder / "transcoders" / name,
            transcoders,
            read=RESIDUAL,
            write=RESIDUAL,
            base_model="demo",
            trained_by="hooks.demo.build",
            seed=seed,
        )
    write_world(folder, seed, {"model": model_recipe, "demo": sparse_recipe, "demo-dense": dense})


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file, by its path in the folder."""
    return {str(path.relative_to(folder)): sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def check() -> int:
    """Build the shipped seed again and say which files differ; the exit status is 1 if any does."""
    seed = int(json.loads((WEIGHTS / "world.json").read_text(encoding="utf-8"))["seed"])
    with tempfile.TemporaryDirectory() as temporary:
        build(seed, Path(temporary))
        built, shipped = digests(Path(temporary)), digests(WEIGHTS)
    different = sorted(name for name in built.keys() | shipped.keys() if built.get(name) != shipped.get(name))
    for name in different:
        print(f"differs: {name}: built {built.get(name, 'nothing')}, shipped {shipped.get(name, 'nothing')}")
    print(f"{len(shipped) - len(different)} of {len(shipped)} files rebuilt from seed {seed} with the same hash")
    return 1 if different else 0


def main() -> int:
    """Command line: build a seed and print the hash of every file, or check the shipped ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--out", type=Path, help="write the folder here")
    target.add_argument("--check", action="store_true", help="rebuild the shipped weights and compare hashes")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if arguments.check:
        return check()
    build(arguments.seed, arguments.out)
    for name, digest in digests(arguments.out).items():
        print(digest, name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
