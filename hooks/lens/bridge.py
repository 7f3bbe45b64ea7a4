"""Our edits as hooks of a TransformerBridge.

interventions → fwd_hooks → (name, function) pairs → bridge.run_with_hooks, bridge.generate

The bridge wraps a twin of the model that shares every tensor; the model itself stays unchanged. A TransformerLens hook
gets a tensor, but no information about its pass. So the inputs of every pass are recorded at the twin's decoder, and
our hooks read from them how many tokens are cached and where the padding is. TransformerLens 4.3 uses the name that the
cache had before transformers 5.24; as long as it does, the twin gets the cache under both names.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from hooks.checkpoints import TranscoderStore
from hooks.errors import ModelError, UserError
from hooks.host import CACHE, Host
from hooks.passes import Interventions, Places, Plan, RunOptions, Swap, Where, listed, make_edits, make_plan
from hooks.sites import Site, branches_off
from hooks.types import Edit, Pass


@dataclass(frozen=True)
class Incoming:
    """The inputs of one pass of the bridge's model.

    Attributes:
        ids: None if embeddings are given instead.
        first: columns in the cache.
        count: columns of this pass.
        mask: over cached and new columns; None if no column is masked.
    """

    ids: Int[Tensor, "batch column"] | None
    rows: int
    first: int
    count: int
    mask: Tensor | None

    def padding(self, pad_token: int | None) -> tuple[tuple[int, ...], list[int]]:
        """Columns of padding before each row, and real tokens per row.

        Raises:
            UserError: mask and tokens do not say it.
        """
        columns = self.first + self.count
        if self.mask is None:
            self._check_unmasked(pad_token)
            return (0,) * self.rows, [columns] * self.rows
        if self.mask.shape != (self.rows, columns):
            raise UserError(
                "this attention mask does not say where the padding is",
                expected=f"shape {self.rows} × {columns}, 1 at real tokens",
                found=" × ".join(map(str, self.mask.shape)),
            )
        real = self.mask.bool().cpu()
        pads, lengths = real.int().argmax(-1), real.sum(-1)
        here = torch.arange(columns)
        block = (here >= pads[:, None]) & (here < (pads + lengths)[:, None])
        if not bool((real == block).all() and (lengths > 0).all()):
            raise UserError("the attention mask has gaps", expected="padding only in front of and behind each prompt")
        return tuple(pads.tolist()), lengths.tolist()

    def _check_unmasked(self, pad_token: int | None) -> None:
        if self.ids is None or pad_token is None or self.rows == 1:
            return
        padded = self.ids == pad_token
        if any(bool(padded[:, end].any() and not padded[:, end].all()) for end in (0, -1)):
            raise UserError(
                "some rows begin or end with the padding token, and no attention mask says whether it is padding",
                repair="pass attention_mask=, or a list of texts with padding_side='left'",
            )


class Passes:
    """Records the inputs of each pass of the bridge's model."""

    def __init__(self) -> None:
        self.current: Incoming | None = None
        self._shared: list[nn.Parameter] = []

    def watch(self, decoder: Any) -> None:
        """Record every call of a transformers decoder from now on."""
        self._shared = list(decoder.norm.parameters())
        decoder.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, decoder: Any, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        self.current = None
        # compatibility mode folds norms into copies of the weights, so mlp_in and the logits differ
        if any(now is not then for now, then in zip(decoder.norm.parameters(), self._shared, strict=True)):
            return
        ids = args[0] if args else given.get("input_ids")
        entry = given["inputs_embeds"] if ids is None else ids
        cache = given.get(CACHE)
        first = 0 if cache is None else int(cache.get_seq_length())
        self.current = Incoming(ids, entry.shape[0], first, entry.shape[1], given.get("attention_mask"))


def boot(host: Host, passes: Passes, name: str) -> Any:
    """A TransformerBridge on a twin of the model that shares every parameter and buffer.

    Raises:
        ModelError: transformer-lens is not installed, or the model has no tokenizer, without which it does not start.
    """
    if host.tokenizer is None:
        raise ModelError(
            "TransformerLens needs a tokenizer, and this model has none", repair="model.run takes ids alone"
        )
    try:
        from transformer_lens.model_bridge import TransformerBridge
    except ImportError:
        raise ModelError("transformer-lens is not installed", repair="pip install 'qwen-circuits[lens]'") from None
    model = host.model
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    twin: Any = copy.deepcopy(model, memo=shared)
    passes.watch(twin.model)
    name = str(getattr(model.config, "_name_or_path", "") or name)
    dtype = next(model.parameters()).dtype
    bridge = TransformerBridge.boot_transformers(name, hf_model=twin, tokenizer=_own_tokenizer(host), dtype=dtype)
    _read_text_as_it_is(bridge)
    if CACHE != LENS_CACHE:
        _name_the_cache(twin)
    return bridge


LENS_CACHE = "past_key_values"  # the cache's name in TransformerLens 4.3, whatever the version of transformers


def _name_the_cache(twin: nn.Module) -> None:
    """Give the cache to the model under its present name, and to the attention of TransformerLens under the old one.

    Without the first, transformers warns at every cached token. Without the second, nothing is written to the cache, so
    every new token attends only to itself.
    """
    from transformer_lens.model_bridge.generalized_components import AttentionBridge

    def present(_: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> Any:
        return args, {CACHE if name == LENS_CACHE else name: value for name, value in given.items()}

    def both(_: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> Any:
        return args, given | {LENS_CACHE: given.get(CACHE)}

    twin.register_forward_pre_hook(present, with_kwargs=True)
    for part in twin.modules():
        if isinstance(part, AttentionBridge) and type(part).forward is not AttentionBridge.forward:  # which calls HF's
            part.register_forward_pre_hook(both, with_kwargs=True)


def _own_tokenizer(host: Host) -> Any:
    """A copy of the tokenizer that TransformerLens may change. With another one it would load a tokenizer that adds a
    BOS, from the same source."""
    tokenizer = copy.deepcopy(host.tokenizer)
    tokenizer.init_kwargs |= {"name_or_path": tokenizer.name_or_path, "add_bos_token": True}  # so it is left as it is
    return tokenizer


def _read_text_as_it_is(bridge: Any) -> None:
    """Make the bridge tokenize text like `Host.tokenize`: TransformerLens would add a BOS where the tokenizer adds
    none, and remove the EOS that some tokenizers add."""
    bridge.cfg.default_prepend_bos = bridge.cfg.tokenizer_prepends_bos
    bridge.cfg.tokenizer_appends_eos = False


def fwd_hooks(
    host: Host,
    store: TranscoderStore,
    passes: Passes,
    interventions: Interventions,
    *,
    options: RunOptions = RunOptions(),  # noqa: B008 (frozen)
    max_new_tokens: int = 0,
) -> list[tuple[str, Callable[..., Tensor]]]:
    """See `hooks.model.HookedModel.fwd_hooks`."""
    if options.error == "frozen":
        raise UserError("bridge hooks know no clean run, so they have no frozen error", repair="use live or zero")
    swap = None if options.swap is None else Swap(options.layers(store), options.error)

    def make(came: Incoming) -> tuple[list[Edit], Pass]:
        pads, lengths = came.padding(getattr(host.tokenizer, "pad_token_id", None))
        rows = [interventions] * came.rows
        plan = make_plan(store, rows, lengths, new_tokens=max_new_tokens, mask=options.mask, pads=pads)
        placed = swap and replace(swap, places=_places(host, options.where, came, pads, lengths, max_new_tokens))
        return make_edits(store, plan, placed), Pass(0, lengths, pads=pads)

    # layers and features are checked now; positions can only be checked when there is a prompt
    room = [host.max_positions]
    plans = [
        make_plan(store, [[item]], room, new_tokens=max_new_tokens, mask=options.mask) for item in listed(interventions)
    ]
    tables = {layer: table for plan in plans for layer, table in plan.tables.items()}
    running = _Running(passes, make, max_new_tokens)
    pairs: list[tuple[str, Callable[..., Tensor]]] = []
    for number, edit in enumerate(make_edits(store, Plan(tables, options.mask), swap)):
        pairs += _pairs(running, number, edit.site)
    return pairs


def _places(
    host: Host, where: Where, came: Incoming, pads: Sequence[int], lengths: Sequence[int], new_tokens: int
) -> Places:
    """The tokens at which sites are replaced, in the bridge's input."""
    if where.everywhere:
        return Places()
    if came.ids is None:
        raise UserError("positions= and skip= need tokens, and the bridge was given embeddings")
    rows = [row[pad : pad + length] for row, pad, length in zip(came.ids.tolist(), pads, lengths, strict=True)]
    return where.on(host, host.batch(rows), new_tokens)


def _pairs(running: "_Running", number: int, site: Site) -> list[tuple[str, Callable[..., Tensor]]]:
    """One hook per edit; two where the bridge's hook edits only a copy of the stream.

    There the block adds the MLP's output to its own, unedited stream. So a second hook adds the change to the block's
    output.
    """
    branch = branches_off(site)

    def here(act: Tensor, hook: Any) -> Tensor:
        out = running.edit(number, act)
        if branch:
            running.left[number] = None if out is act else out.to(_wide(act)) - act.to(_wide(act))
        return out

    def behind(act: Tensor, hook: Any) -> Tensor:
        change = running.left.pop(number, None)
        return act if change is None else (act.to(_wide(act)) + change.to(act.device)).to(act.dtype)

    pairs: list[tuple[str, Callable[..., Tensor]]] = [(site.lens_name, here)]
    if branch:
        pairs.append((Site("resid_post", site.layer).lens_name, behind))
    return pairs


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


class _Running:
    """The edits of one list of hooks: planned when a prompt is read, and kept while its new tokens follow."""

    def __init__(self, passes: Passes, make: Callable[[Incoming], tuple[list[Edit], Pass]], max_new_tokens: int):
        self._passes, self._make, self._room = passes, make, max_new_tokens
        self._came: Incoming | None = None
        self._prompt: Incoming | None = None
        self._edits: list[Edit] = []
        self._at = Pass(0, [])
        self._done: set[int] = set()
        self.left: dict[int, Tensor | None] = {}

    def edit(self, number: int, act: Tensor) -> Tensor:
        """Apply one edit at the bridge's present position.

        Raises:
            UserError: the position is not known, or these hooks were not made for it.
        """
        if act.ndim == 2:  # remove_batch_dim=True
            return self.edit(number, act[None])[0]
        came = self._passes.current
        if came and came is not self._came:
            self._begin(came)
        if came is None or act.shape[:2] != (came.rows, came.count) or number in self._done:
            raise UserError(
                "these hooks do not fit the pass they are called in",
                expected="a pass of this model's bridge, its weights unprocessed, each hook attached once",
                repair="run them on model.bridge; compatibility mode with no_processing=True only",
            )
        self._done.add(number)
        return self._edits[number].apply(act, self._at)

    def _begin(self, came: Incoming) -> None:
        if came.first == 0 and not self._goes_on(came):
            self._edits, self._at = self._make(came)
            self._prompt = came
        beyond = came.first + came.count - self._room - (self._prompt.count if self._prompt else 0)
        if self._prompt is None or self._prompt.rows != came.rows or beyond > 0:
            raise UserError(
                "a pass follows cached tokens that these hooks do not know",
                expected=f"a prompt, and at most {self._room} new tokens behind it",
                found=f"tokens behind {came.first} cached ones",
                repair="fwd_hooks(..., max_new_tokens=N), attached before the prompt is read",
            )
        self._came, self._done = came, set()
        self._at = Pass(came.first, self._at.prompt_lengths, pads=self._at.pads)
        self.left.clear()

    def _goes_on(self, came: Incoming) -> bool:
        """Whether a pass without a cache is the last prompt followed by new tokens."""
        prompt = self._prompt
        if prompt is None or prompt.rows != came.rows or not prompt.count < came.count <= prompt.count + self._room:
            return False
        if came.ids is None or prompt.ids is None:
            return came.ids is None and prompt.ids is None
        return torch.equal(came.ids[:, : prompt.count], prompt.ids)
