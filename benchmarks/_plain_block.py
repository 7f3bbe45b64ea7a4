"""One transformers decoder layer under plain autograd: the cost of a block's edges without our algebra.

There are two forms: batched vector-Jacobian products on the graph of one forward pass; or one forward and one backward
pass over copies of the prompt, one copy per target. For `affine` the attention pattern, the norms' scales and
silu(z_g) are detached, so that the backward pass skips the parts that the rule freezes.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from einops import einsum, rearrange
from torch import Tensor, nn
from transformers import AttentionInterface

from circuits.edges import Cut, LocalRun

Pass = tuple[Tensor, Tensor]  # the input, which requires gradients, and the output


@dataclass(frozen=True)
class Form:
    """How gradients are taken, and how many targets at a time."""

    way: str  # "batched products" or "copies"
    chunk: int

    def __str__(self) -> str:
        return f"{self.way} of {self.chunk}"


@dataclass(frozen=True)
class PlainBlock:
    """A decoder layer, its input stream, and the directions of its output that are differentiated.

    Attributes:
        x: [pos d_model].
        cotangents, pos: one direction per target, [target d_model], and its position, ascending.
        cut: the sources.
    """

    layer: Any
    rotary: tuple[Tensor, Tensor]
    x: Tensor
    cotangents: Tensor
    pos: Tensor
    cut: Cut

    @classmethod
    def of(cls, run: LocalRun, cotangents: Tensor, pos: Tensor) -> "PlainBlock":
        """The first block of a prepared run."""
        decoder, x = run.model.host.decoder, run.recording.layers[0].read[0]
        rotary = decoder.rotary_emb(x[None], torch.arange(len(x))[None])
        return cls(decoder.layers[0], rotary, x, cotangents, pos, run.cuts[0])

    def forward(self, copies: int = 1) -> Pass:
        """One pass over copies of the prompt, with its graph."""
        leaf = self.x.repeat(copies, 1, 1).requires_grad_()
        later = torch.full((len(self.x), len(self.x)), -torch.inf).triu(1)
        return leaf, self.layer(leaf, attention_mask=later, position_embeddings=self.rotary)

    def edges(self, form: Form, forward: Pass) -> Tensor:
        """Every edge, [target source]: one product per position with the targets at or after it."""
        gradients, cut = self.gradients(form, forward), self.cut
        out = gradients.new_zeros(len(gradients), len(cut.pos))
        for t, nodes in enumerate(torch.arange(out.shape[1]).split(torch.bincount(cut.pos).tolist())):
            first, columns = int(torch.searchsorted(self.pos, t)), slice(int(nodes[0]), int(nodes[-1]) + 1)
            written = cut.transcoder.W_dec.index_select(0, cut.feature[columns])
            out[first:, columns] = gradients[first:, t] @ written.T * cut.activation[columns]
        return out

    def gradients(self, form: Form, forward: Pass, some: slice = slice(None)) -> Tensor:
        """Gradients of some targets with respect to the block's input, [target pos d_model]."""
        found = []
        for rows, pos in zip(self.cotangents[some].split(form.chunk), self.pos[some].split(form.chunk), strict=True):
            places = torch.arange(len(pos))
            if form.way == "copies":
                leaf, y = self.forward(len(pos))
                found += torch.autograd.grad((y[places, pos] * rows).sum(), leaf)
                continue
            leaf, y = forward
            wanted = torch.zeros(len(pos), *y.shape)
            wanted[places, 0, pos] = rows
            found += [g[:, 0] for g in torch.autograd.grad(y, leaf, wanted, is_grads_batched=True, retain_graph=True)]
        return torch.cat(found)


def fastest(block: PlainBlock, chunks: tuple[int, ...], clock: Callable[[Callable[[], Any]], float]) -> Form:
    """The form with the least time per target, each tried on one chunk."""
    forms = [Form(way, chunk) for way in ("batched products", "copies") for chunk in chunks]
    forward = block.forward()
    cost = {}
    for form in forms:
        work = partial(block.gradients, form, forward, slice(0, form.chunk))
        cost[form] = clock(work) / form.chunk
    return min(forms, key=lambda form: cost[form])


# -- the parts that a rule freezes ---------------------------------------------------------------------------------


def _attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **rest: Any) -> Any:
    """Eager attention that copies no keys or values for the heads that share them."""
    query, key = (query.detach(), key.detach()) if vars(module)["held"] else (query, key)
    grouped = rearrange(query, "b (kv group) t h -> b kv group t h", kv=key.shape[1])
    scores = einsum(grouped, key, "b kv group t h, b kv s h -> b kv group t s") * rest["scaling"]
    z = einsum((scores + mask).softmax(-1), value, "b kv group t s, b kv s h -> b t kv group h")
    return rearrange(z, "b t kv group h -> b t (kv group) h"), None


AttentionInterface.register("plain_block", _attend)


@contextlib.contextmanager
def differentiated(layer: Any, rule: str) -> Iterator[None]:
    """The layer with the parts detached that the rule freezes; `exact` freezes nothing.

    Raises:
        ValueError: another rule than these two.
    """
    if rule not in ("exact", "affine"):
        raise ValueError(f"no plain form of rule {rule!r}")
    attention, config = layer.self_attn, layer.self_attn.config
    plain, attention.held = config._attn_implementation, rule == "affine"
    config._attn_implementation = "plain_block"
    frozen = {}
    if rule == "affine":
        norms = (layer.input_layernorm, layer.post_attention_layernorm)
        frozen = {norm: _held_norm(norm) for norm in norms} | {layer.mlp.act_fn: _held_gate(layer.mlp.act_fn)}
    for module, forward in frozen.items():
        module.forward = forward
    try:
        yield
    finally:
        config._attn_implementation = plain
        del attention.held
        for module in frozen:
            del module.forward


def _held_norm(norm: Any) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.detach().square().mean(-1, keepdim=True) + norm.variance_epsilon)
        return norm.weight * (x * scale)

    return forward


def _held_gate(act: nn.Module) -> Callable[[Tensor], Tensor]:
    plain = act.forward
    return lambda z: plain(z).detach()
