"""Sizes of a model and of its transcoders, from configs and headers alone: no weight is read."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from hooks.choices import ITEM
from hooks.errors import ModelError
from hooks.files import open_pt
from hooks.formats import Checkpoint, LayerSource
from hooks.sites import Site, SiteSpec

SCALE_8BIT = 4  # bytes per row of a matrix held in int8: one fp32 scale
BYTES_4BIT = 0.5 + 4 / 64  # per number of a matrix held in 4 bits: one fp32 scale per 64 of them

Edges = Literal["middle", "here", "walk"]


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder with grouped-query attention and SwiGLU.

    Attributes:
        tied: whether the unembedding is the embedding.
        biases: on queries, keys and values.
        head_norms: on queries and keys (Qwen3).
        dtype: of the stored weights.
        bits: of the blocks' matrices, where the checkpoint itself is quantised.
    """

    n_layers: int
    d_model: int
    d_ff: int
    n_heads: int
    n_kv: int
    d_head: int
    d_vocab: int
    tied: bool = False
    biases: bool = True
    head_norms: bool = False
    dtype: str = "bfloat16"
    bits: int | None = None

    @property
    def query(self) -> int:
        """All query heads side by side."""
        return self.n_heads * self.d_head

    @property
    def keyvalue(self) -> int:
        """All key/value heads side by side."""
        return self.n_kv * self.d_head

    @property
    def matrices(self) -> int:
        """Numbers in the seven matrices of a block."""
        return self.d_model * (2 * self.query + 2 * self.keyvalue + 3 * self.d_ff)

    @property
    def rows(self) -> int:
        """Output rows of those matrices: each has a scale in int8."""
        return self.query + 2 * self.keyvalue + 2 * self.d_model + 2 * self.d_ff

    @property
    def vectors(self) -> int:
        """Numbers in a block's norms and biases."""
        biases = self.query + 2 * self.keyvalue if self.biases else 0
        return 2 * self.d_model + biases + (2 * self.d_head if self.head_norms else 0)

    @property
    def outside(self) -> int:
        """Numbers outside the blocks: embedding, unembedding, final norm."""
        return (1 if self.tied else 2) * self.d_vocab * self.d_model + self.d_model

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.n_layers * (self.matrices + self.vectors) + self.outside

    def block_bytes(self, item: int, bits: int | None = None) -> int:
        """One block; with `bits` its matrices are quantised."""
        matrices = self.matrices * item
        if bits == 8:
            matrices = self.matrices + SCALE_8BIT * self.rows
        elif bits is not None:
            matrices = int(self.matrices * BYTES_4BIT)
        return matrices + self.vectors * item

    def nbytes(self, item: int, bits: int | None = None) -> int:
        """All weights; embedding, unembedding and norms are never quantised."""
        return self.n_layers * self.block_bytes(item, bits) + self.outside * item

    @classmethod
    def of_config(cls, config: Mapping[str, Any], where: str) -> "ModelShape":
        """The sizes that a `config.json` states.

        Raises:
            ModelError: one of them is missing or no positive number, or blocks are of a kind whose weights are not
                counted here.
        """
        _check_blocks(config, where)

        def size(key: str, default: int | None = None) -> int:
            value = config.get(key, default)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ModelError(
                    f"the config does not say {key}",
                    expected="a decoder with grouped-query attention and SwiGLU, such as Qwen2.5",
                    found=repr(value),
                    where=where,
                )
            return value

        heads, width = size("num_attention_heads"), size("hidden_size")
        family = config.get("model_type", "")
        dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32")
        return cls(
            n_layers=size("num_hidden_layers"),
            d_model=width,
            d_ff=size("intermediate_size"),
            n_heads=heads,
            n_kv=size("num_key_value_heads", heads),
            d_head=size("head_dim", width // heads) if config.get("head_dim") is not None else width // heads,
            d_vocab=size("vocab_size"),
            tied=bool(config.get("tie_word_embeddings", False)),
            biases=bool(config.get("attention_bias", family.startswith("qwen2"))),
            head_norms=family.startswith("qwen3"),
            dtype=dtype if dtype in ITEM else "float32",
            bits=_bits(config.get("quantization_config")),
        )


def _check_blocks(config: Mapping[str, Any], where: str) -> None:
    """Refuse mixtures of experts and linear attention, whose sizes would be counted wrongly."""
    experts = next((key for key in ("num_experts", "num_local_experts", "n_routed_experts") if config.get(key)), None)
    linear = "linear_attention" in (config.get("layer_types") or ())
    if experts or linear:
        raise ModelError(
            "memory is not planned for models of this kind",
            expected="blocks of full or windowed attention and one MLP",
            found=f"{experts}: {config[experts]}" if experts else "linear attention",
            where=where,
        )


def _bits(quantised: Any) -> int | None:
    if not isinstance(quantised, Mapping):
        return None
    if quantised.get("load_in_4bit"):
        return 4
    stated = quantised.get("bits", 8)
    return 4 if stated == 4 else 8


def _qwen25(layers: int, width: int, ff: int, heads: int, kv: int, vocab: int, tied: bool) -> ModelShape:
    return ModelShape(layers, width, ff, heads, kv, width // heads, vocab, tied)


QWEN25 = {  # https://huggingface.co/Qwen: config.json of each size; base and instruct are alike
    "0.5B": _qwen25(24, 896, 4864, 14, 2, 151936, True),
    "1.5B": _qwen25(28, 1536, 8960, 12, 2, 151936, True),
    "3B": _qwen25(36, 2048, 11008, 16, 2, 151936, True),
    "7B": _qwen25(28, 3584, 18944, 28, 4, 152064, False),
    "14B": _qwen25(48, 5120, 13824, 40, 8, 152064, False),
    "32B": _qwen25(64, 5120, 27648, 40, 8, 152064, False),
    "72B": _qwen25(80, 8192, 29568, 64, 8, 152064, False),
}


def known_model(name: str) -> ModelShape | None:
    """The built-in sizes of `Qwen/Qwen2.5-32B`, `Qwen2.5-32B-Instruct`, `32B` and the other Qwen2.5 models."""
    bare = name.rpartition("/")[2].removeprefix("Qwen2.5-").removesuffix("-Instruct")
    return QWEN25.get(bare)


def model_shape(config_file: Path) -> ModelShape:
    """The sizes in a `config.json`.

    Raises:
        ModelError: it cannot be read, or lacks a size.
    """
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = None
    if not isinstance(config, dict):
        raise ModelError(f"{config_file} is not a config", expected="a JSON object", where=str(config_file))
    return ModelShape.of_config(config, str(config_file))


@dataclass(frozen=True)
class SetShape:
    """Sizes of a set of transcoders.

    Attributes:
        layers: how many there are.
        k: features kept per token; with plain ReLU or a threshold it is unknown, and this number is a guess.
        vectors: numbers per layer beside the two matrices (biases, norm, threshold, skip connection).
        same_site: whether it reconstructs what it reads.
        edges: how edges of a graph are computed. `middle`: there is one block between neighbouring layers. `here`:
            there is none. `walk`: gradients are carried down the model at every position (a set that writes the output
            of a module).
    """

    layers: int
    d_model: int
    d_features: int
    k: int
    vectors: int
    dtype: str = "bfloat16"
    same_site: bool = True
    edges: Edges = "middle"

    @property
    def item(self) -> int:
        """Bytes per number."""
        return ITEM[self.dtype]

    @property
    def sites(self) -> int:
        """Different streams that all layers together read and write."""
        if self.same_site:
            return self.layers
        return self.layers + 1 if self.edges == "here" else 2 * self.layers

    @property
    def layer_bytes(self) -> int:
        """One transcoder."""
        return self.item * (2 * self.d_features * self.d_model + self.vectors)

    @property
    def nbytes(self) -> int:
        """All of them."""
        return self.layers * self.layer_bytes

    @classmethod
    def of_numbers(cls, layers: int, d_model: int, d_features: int, k: int, dtype: str = "bfloat16") -> "SetShape":
        """A set with two biases and a LayerNorm, as the published one."""
        return cls(layers, d_model, d_features, k, d_features + 3 * d_model, dtype)

    @classmethod
    def of_checkpoint(cls, checkpoint: Checkpoint, dtype: str | None = None) -> "SetShape":
        """The sizes of an opened folder, where all layers count as large as the largest. `dtype`: of the weights in
        memory; the stored one by default."""
        largest = max(checkpoint.layers, key=lambda source: source.d_features)
        width, features = largest.d_model, largest.d_features
        sizes = {"norm_weight": width, "norm_bias": width, "b_dec": width, "b_enc": features, "threshold": features}
        sizes |= {"shift": width, "W_skip": width * width}
        found = cls(
            len(checkpoint.layers),
            width,
            features,
            largest.k or max(1, features // 8),
            sum(sizes.get(name, 0) for name in largest.tensors),
            dtype or _stored_dtype(largest),
        )
        if checkpoint.read is None or checkpoint.write is None:
            return found
        return found.between(checkpoint.read, checkpoint.write)

    def between(self, read: SiteSpec, write: SiteSpec) -> "SetShape":
        """The same set with other read and write sites."""
        return replace(self, same_site=read == write, edges=_edges(write.at(0), read.at(1)))


def _edges(write: Site, read: Site) -> Edges:
    """How edges between neighbouring layers are computed, from the write site of one and the read site of the next. The
    same cases as in `circuits.edges.factored`."""
    if not write.whole_stream or write.depth > read.depth:
        return "walk"
    if write.depth == read.depth:
        return "here"
    layer, within = write.depth
    ahead = (read.depth[0], 2 if read.depth[1] else 0)
    return "middle" if within == 0 and ahead in ((layer + 1, 0), (layer, 2)) else "walk"


def _stored_dtype(source: LayerSource) -> str:
    """The encoder's dtype: as a `.pt` file states it; else from the size of the file divided by its count of
    numbers."""
    where = source.tensors["W_enc"]
    if where.file.suffix == ".pt":
        content: Any = open_pt(where.file)
        for key in where.key:
            content = content[key]
        name = str(content.dtype).removeprefix("torch.")
        return name if name in ITEM else "float32"
    numbers = 2 * source.d_features * source.d_model
    items = where.file.stat().st_size // numbers if len(source.files) == 1 else 4
    return "bfloat16" if items == 2 else "float32"
