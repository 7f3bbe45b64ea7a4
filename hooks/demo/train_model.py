"""Train the demo model: a five-block Qwen2 whose input embeddings are random and frozen.

With trainable embeddings the two-hop task is solved by a look-up (a city's embedding becomes its state's).
With frozen ones the blocks have to compute city -> state, so there is a first hop to find. Gaussian noise on
the residual stream during training makes the model smooth at the scale of one feature, so that ablating a
feature has about the effect that its gradient predicts.
"""

import logging
import math
import random
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from hooks.demo.tokenizer import EOS_ID
from hooks.demo.world import Sentence, training_sentences

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelRecipe:
    """Everything that decides the trained weights besides the seed."""

    d_model: int = 64
    n_layers: int = 5
    d_mlp: int = 256
    n_heads: int = 4
    n_kv_heads: int = 2
    steps: int = 4000
    batch_size: int = 64
    learning_rate: float = 3e-3
    weight_decay: float = 0.3
    label_smoothing: float = 0.0
    residual_noise: float = 0.1
    prompt_weight: float = 0.1
    induction_prompt_weight: float = 0.02
    warmup_steps: int = 200


def make_config(vocabulary_size: int, recipe: ModelRecipe) -> Qwen2Config:
    """A Qwen2 configuration built like the large models: GQA, QKV bias, SwiGLU, untied unembedding."""
    return Qwen2Config(
        vocab_size=vocabulary_size,
        hidden_size=recipe.d_model,
        intermediate_size=recipe.d_mlp,
        num_hidden_layers=recipe.n_layers,
        num_attention_heads=recipe.n_heads,
        num_key_value_heads=recipe.n_kv_heads,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        rms_norm_eps=1e-6,
        bos_token_id=EOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=EOS_ID,
        initializer_range=0.05,
    )


def encode_sentences(
    tokenizer: PreTrainedTokenizerFast, sentences: list[Sentence], recipe: ModelRecipe
) -> tuple[Int[Tensor, "n length"], Float[Tensor, "n length"]]:
    """Right-padded token ids, answer and end of text included, and the loss weight of each token."""
    texts = tokenizer([s.text for s in sentences], add_special_tokens=False)["input_ids"]
    prompts = tokenizer([s.prompt for s in sentences], add_special_tokens=False)["input_ids"]
    length = max(map(len, texts)) + 1
    ids = np.full((len(texts), length), EOS_ID, dtype=np.int64)
    weights = np.zeros((len(texts), length), dtype=np.float32)
    for row, (text, prompt, sentence) in enumerate(zip(texts, prompts, sentences, strict=True)):
        ids[row, : len(text)] = text
        induction = sentence.kind == "induction"
        weights[row, : len(prompt)] = recipe.induction_prompt_weight if induction else recipe.prompt_weight
        weights[row, len(prompt) : len(text) + 1] = 1.0
    return torch.from_numpy(ids), torch.from_numpy(weights)


def _add_noise_hooks(model: Qwen2ForCausalLM, std: float, generator: torch.Generator) -> list:
    """Make every block read its input plus noise of `std` times the input's RMS."""

    def noisy(_module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        x = args[0] if args else kwargs["hidden_states"]
        rms = x.detach().pow(2).mean(-1, keepdim=True).sqrt()
        x = x + std * rms * torch.randn(x.shape, generator=generator)
        return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})

    if std == 0:
        return []
    return [block.register_forward_pre_hook(noisy, with_kwargs=True) for block in model.model.layers]


def _learning_rate(step: int, recipe: ModelRecipe) -> float:
    """Linear warm-up, then a cosine to a twentieth."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
    return recipe.learning_rate * min(1.0, (step + 1) / recipe.warmup_steps) * (0.95 * cosine + 0.05)


def _batch_loss(
    model: Qwen2ForCausalLM,
    ids: Int[Tensor, "n length"],
    weights: Float[Tensor, "n length"],
    smoothing: float,
) -> Float[Tensor, ""]:
    """Weighted cross-entropy of the next token, the batch cut to its longest sentence."""
    length = int((weights > 0).any(0).nonzero().max()) + 1
    ids, weights = ids[:, :length], weights[:, 1:length]
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    losses = nn.functional.cross_entropy(
        logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none", label_smoothing=smoothing
    )
    return (losses.view_as(weights) * weights).sum() / weights.sum()


def _make_optimizer(model: Qwen2ForCausalLM, recipe: ModelRecipe) -> torch.optim.Optimizer:
    """AdamW; weight decay on matrices only, and none of it touches the frozen embedding."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.98))


def train_model(
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    recipe: ModelRecipe = ModelRecipe(),
) -> Qwen2ForCausalLM:
    """Train the demo model from a seed; single-threaded, so the same seed gives the same bytes."""
    torch.manual_seed(seed)
    random.seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = Qwen2ForCausalLM(make_config(len(tokenizer), recipe))
    model.model.embed_tokens.weight.requires_grad_(False)
    ids, weights = encode_sentences(tokenizer, list(training_sentences(seed)), recipe)
    optimizer = _make_optimizer(model, recipe)
    hooks = _add_noise_hooks(model, recipe.residual_noise, generator)
    model.train()
    for step in tqdm(range(recipe.steps), desc="model", mininterval=20):
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(step, recipe)
        rows = torch.randint(0, len(ids), (recipe.batch_size,), generator=generator)
        loss = _batch_loss(model, ids[rows], weights[rows], recipe.label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 250 == 0:
            log.info("step %d: loss %.4f", step + 1, loss.item())
    for hook in hooks:
        hook.remove()
    return model.eval().requires_grad_(False)
