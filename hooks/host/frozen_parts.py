"""Hold parts of the plain model at their values in a clean run, inside one `with`.

| part | what is held | what stays live |
|---|---|---|
| attention | the pattern softmax(q · k / sqrt(d_head)) | the values, so the attention output too |
| norms | 1 / rms of every RMSNorm: two per block, the final one, Qwen3's head norms | the vector that is scaled |
| gates | silu(z_g) in every MLP | z_u |

With all three held, every later residual stream and the logits are affine in the stream at any depth. So a prediction
from frozen gradients is exact there, and a conserving attribution rule can be compared with it: where the rule's
prediction differs from a measurement in the *live* model, the difference is the effect of the parts.

The model is changed only inside the `with`. Norms and activations get their own `forward`. transformers looks up the
attention function by a name in the config: `held_sdpa` and `held_eager` are registered once, beside its own names, and
the name in the config is replaced. So masks are made as usual, and a recording pass equals the plain one, bit for bit.
"""

import contextlib
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hooks.errors import UserError
from hooks.host.exclusive_use import Exclusive
from hooks.host.host import Host, forward_of
from hooks.host.tokens import Batch

Part = Literal["attention", "norms", "gates"]
PARTS: tuple[Part, ...] = get_args(Part)
PLAIN = ("sdpa", "eager")  # the attention implementations that this file supports

Function = Callable[..., Any]
_SLOT, _KIND = "held_attention", "_attn_implementation"
_HELD = re.compile(r"(Qwen2|Qwen3|Llama)(Attention|RMSNorm|MLP)")
_CALLED = re.compile(r"(Qwen2|Qwen3|Llama|Mistral|Qwen2Moe|Qwen3Moe|Mixtral)Attention")  # they look up a function


@dataclass(frozen=True)
class Held:
    """Values of parts of a model in one clean run, by module name. A module that a table lacks is not held.

    Attributes:
        batch: the clean run's prompts. A run under `held` has as many rows; or any number of rows if there is one
            prompt.
        patterns: attention weights, in the model's dtype.
        inverse_rms: 1 / rms, in fp32 (fp64 where the model runs in fp64); head norms have a head axis.
        gates: the activation of the gate, in the model's dtype.
    """

    batch: Batch
    patterns: Mapping[str, Float[Tensor, "batch head query_pos pos"]]
    inverse_rms: Mapping[str, Float[Tensor, "batch pos *head 1"]]
    gates: Mapping[str, Float[Tensor, "batch pos d_ff"]]


def record_held(host: Host, batch: Batch, parts: Collection[str] = PARTS) -> Held:
    """Run once without edits and keep the values that `held` needs. The pass equals the plain one, bit for bit.

    SDPA does not return its pattern, so the pattern is computed separately, with scores and softmax in fp32 (fp64 for
    fp64).

    Memory: batch × layers × (heads · pos² + d_ff · pos) numbers in the model's dtype; the norms take little more.

    Raises:
        UserError: a part is not known, or the model is not one whose parts can be held.
    """
    for part in parts:
        if part not in PARTS:
            raise UserError(f"unknown part {part!r} to hold", expected=" or ".join(PARTS))
    patterns: dict[str, Tensor] = {}
    inverse_rms: dict[str, Tensor] = {}
    gates: dict[str, Tensor] = {}
    watchers: dict[str, Function] = {}
    for part, watch, seen in (
        ("attention", _watch_attention, patterns),
        ("norms", _watch_norm, inverse_rms),
        ("gates", _watch_gate, gates),
    ):
        for name in _names(host, part) if part in parts else ():
            watchers[name] = watch(host.decoder.get_submodule(name), name, seen)
    with _replaced(host, watchers), host.attached(()) as session, torch.no_grad():
        session.hidden(batch)
    return Held(batch, patterns, inverse_rms, gates)


@contextlib.contextmanager
def held(host: Host, clean: Held) -> Iterator[None]:
    """Every pass inside the `with` uses the clean values instead of its own. Edits act as usual.

    Works with and without autograd; no gradient flows into what is held.

    Raises:
        UserError: the model's attention is of another kind, or held already; or, inside, a pass has another length.
    """
    functions: dict[str, Function] = {}
    for name, pattern in clean.patterns.items():
        functions[name] = _held_attention(clean.batch, pattern)
    for name, scale in clean.inverse_rms.items():
        functions[name] = _held_norm(clean.batch, host.decoder.get_submodule(name), scale)
    for name, gate in clean.gates.items():
        functions[name] = _held_gate(clean.batch, gate)
    with _replaced(host, functions):
        yield


@contextlib.contextmanager
def own_attention(host: Host, attend: Callable[[int], Function]) -> Iterator[None]:
    """Replace every block's attention by the caller's function for that layer, inside the `with`.

    Each is called as transformers calls its own: (module, query, key, value, mask, scaling=…), queries and keys
    rotated, keys and values not repeated over the group; it returns (output [batch pos head d_head], None).
    `plain_attention` is the function it replaces.

    Raises:
        UserError: the model's attention is of another kind, or held already.
    """
    names = _names(host, "attention", _CALLED)
    with _replaced(host, {name: attend(layer) for layer, name in enumerate(names)}):
        yield


def unknown_attention(host: Host) -> str:
    """The reason why `own_attention` does not support a model, in a few words. Empty if it does, or if attention is
    held already."""
    kind = str(host.decoder.config._attn_implementation)
    if kind.removeprefix("held_") not in PLAIN:
        return f"attention is of the kind {kind!r}"
    try:
        _names(host, "attention", _CALLED)
    except UserError as error:
        return f"attention is not of a known kind ({error.found})"
    return ""


def plain_attention(host: Host, layer: int) -> Function:
    """transformers' own attention function of one block, as it was before any `with`."""
    module: Any = host.layers[layer].self_attn
    name = str(module.config._attn_implementation)
    return _plain_attention(module, name.removeprefix("held_"))


# -- the modules of each part --------------------------------------------------------------------------------------


def _names(host: Host, part: str, known: re.Pattern[str] = _HELD) -> list[str]:
    """The modules of one part, by their names inside the decoder.

    Args:
        known: the classes that are supported.

    Raises:
        UserError: a module is missing, or its class is not transformers' own.
    """
    names = []
    for number, layer in enumerate(host.layers):
        attention: Any = getattr(layer, "self_attn", None)
        heads = [f"self_attn.{norm}" for norm in ("q_norm", "k_norm") if hasattr(attention, norm)]
        inside = {
            "attention": ["self_attn"],
            "norms": ["input_layernorm", "post_attention_layernorm", *heads],
            "gates": ["mlp.act_fn"],
        }
        names += [f"layers.{number}.{place}" for place in inside[part]]
    names += ["norm"] if part == "norms" else []
    modules = dict(host.decoder.named_modules())  # a module that is used at two places has one name here
    for name in names:
        owner = name.removesuffix(".act_fn")
        kind = type(modules.get(owner)).__name__
        if name not in modules or not known.fullmatch(kind):
            raise UserError(
                f"the {part} of {type(host.model).__name__} cannot be held",
                expected="a Qwen2, Qwen3 or Llama model of transformers, with its own modules",
                found=f"{name} is missing, or shared" if name not in modules else f"{owner} is a {kind}",
            )
    return names


# -- recording -----------------------------------------------------------------------------------------------------


def _watch_norm(module: Any, name: str, seen: dict[str, Tensor]) -> Function:
    plain, eps = getattr(module, forward_of(module)), float(module.variance_epsilon)

    def forward(x: Tensor) -> Tensor:
        mean_square = x.to(_wide(x.dtype)).pow(2).mean(-1, keepdim=True)
        seen[name] = torch.rsqrt(mean_square + eps)
        return plain(x)

    return forward


def _watch_gate(module: nn.Module, name: str, seen: dict[str, Tensor]) -> Function:
    plain = getattr(module, forward_of(module))

    def forward(z: Tensor) -> Tensor:
        seen[name] = plain(z)
        return seen[name]

    return forward


def _watch_attention(module: Any, name: str, seen: dict[str, Tensor]) -> Function:
    plain = _plain_attention(module, module.config._attn_implementation)

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **rest: Any) -> Any:
        out, weights = plain(module, query, key, value, mask, **rest)
        seen[name] = _pattern(query, key, mask, rest["scaling"]) if weights is None else weights
        return out, weights

    return attend


def _pattern(
    query: Float[Tensor, "batch head query_pos d_head"],
    key: Float[Tensor, "batch n_kv pos d_head"],
    mask: Tensor | None,
    scaling: float,
) -> Float[Tensor, "batch head query_pos pos"]:
    """softmax(q · k · scaling) as in SDPA: True in a mask means attend, and no mask means causal."""
    wide = _wide(query.dtype)
    grouped = rearrange(query, "b (kv group) t h -> b kv group t h", kv=key.shape[1])
    scores = einsum(grouped.to(wide), key.to(wide), "b kv group t h, b kv s h -> b kv group t s") * scaling
    scores = rearrange(scores, "b kv group t s -> b (kv group) t s")
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    # SDPA gives zeros for a query (of padding) that may attend to no position; softmax alone would give NaN
    return scores.masked_fill(~mask, -torch.inf).softmax(-1).masked_fill(~mask, 0.0).to(query.dtype)


# -- holding -------------------------------------------------------------------------------------------------------


def _held_norm(clean: Batch, module: Any, scale: Float[Tensor, "batch pos *head 1"]) -> Function:
    def forward(x: Tensor) -> Tensor:
        _check_fit(clean, len(x), x.shape[1])
        # rounded where transformers rounds, but an fp64 stream stays fp64, so that the model is affine to fp64 accuracy
        return module.weight * (x.to(_wide(x.dtype)) * scale).to(x.dtype)

    return forward


def _held_gate(clean: Batch, gate: Float[Tensor, "batch pos d_ff"]) -> Function:
    def forward(z: Tensor) -> Tensor:
        _check_fit(clean, len(z), z.shape[1])
        return gate.expand_as(z)

    return forward


def _held_attention(clean: Batch, pattern: Float[Tensor, "batch head query_pos pos"]) -> Function:
    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        _check_fit(clean, len(query), query.shape[2])
        grouped = rearrange(pattern, "b (kv group) t s -> b kv group t s", kv=value.shape[1])
        # with one clean row, torch merges the rows of `value` into the columns of one product and copies nothing per
        # row
        z = einsum(grouped, value, "b kv group t s, b kv s h -> b t kv group h")
        return rearrange(z, "b t kv group h -> b t (kv group) h"), None

    return attend


def _check_fit(clean: Batch, rows: int, length: int) -> None:
    held_rows, held_length = clean.ids.shape
    if held_rows not in (1, rows) or length != held_length:
        raise UserError(
            f"{held_rows} × {held_length} tokens are held, and the pass has {rows} × {length}",
            expected="the tokens of the clean run; of one prompt as many rows as you like",
            repair="record the parts on this prompt, and do not generate while they are held",
        )


# -- replacing functions -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _replaced(host: Host, functions: Mapping[str, Function]) -> Iterator[None]:
    """Replace functions of modules inside the `with`, and restore them however it ends."""
    with Exclusive(host.layers) as block:
        block.set_attribute(host, "held", True)
        configs: dict[int, Any] = {}
        for name, function in functions.items():
            module = host.decoder.get_submodule(name)
            if name.endswith("self_attn"):
                configs |= {id(config): config for config in (host.decoder.config, module.config)}
                block.set_attribute(module, _SLOT, function)
            else:
                block.set_attribute(module, forward_of(module), function)
        for config in configs.values():
            _route_attention(block, config)
        yield


def _route_attention(block: Exclusive, config: Any) -> None:
    """Make attention modules use the function in their `_SLOT`, if they have one."""
    plain = config._attn_implementation
    if plain not in PLAIN:
        raise UserError(
            f"attention of the kind {plain!r} cannot be held",
            expected=f"{' or '.join(PLAIN)}, and not held already",
            repair='load the model with attn_implementation="sdpa"',
        )
    block.change(partial(setattr, config, _KIND, f"held_{plain}"), partial(setattr, config, _KIND, plain))


def _route(plain: str) -> Function:
    def attend(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        own = vars(module).get(_SLOT)  # None in another model that shares the config
        return (own or _plain_attention(module, plain))(module, *args, **kwargs)

    return attend


def _plain_attention(module: nn.Module, name: str) -> Function:
    """transformers' own function; the eager one is in the architecture's file, not in the registry."""
    default = sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS.get_interface(name, default)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


for _plain in PLAIN:
    AttentionInterface.register(f"held_{_plain}", _route(_plain))
    AttentionMaskInterface.register(f"held_{_plain}", ALL_MASK_ATTENTION_FUNCTIONS[_plain])
