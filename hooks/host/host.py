"""The language model. Hooks are attached only here, and only inside one `with`.

The host is one of the objects of this project that change over time: it records what is attached. The model is a plain
transformers model: it keeps SDPA and its own cache, and without edits no hook is registered.
"""

import hashlib
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.models.qwen2.modeling_qwen2 import Qwen2Model

from hooks.errors import ModelError, first_line, memory_ran_out
from hooks.host.context import context_of
from hooks.host.exclusive_use import Exclusive, uninterrupted
from hooks.host.gguf import is_gguf, load_gguf
from hooks.host.tokens import Batch, Tokens, load_tokenizer
from hooks.kernels import linear_fp32
from hooks.readout import RankedToken
from hooks.sites import Site, branches_off, decoder_layers, module_at
from hooks.types import Edit, Pass
from hooks.whole import whole

log = logging.getLogger("hooks")

# the keyword of a decoder's cache: transformers renamed it in 5.24
CACHE = "cache" if "cache" in signature(Qwen2Model.forward).parameters else "past_key_values"

HookKind = Literal["before", "after"]


class Host(Tokens):
    """A causal language model of transformers with its tokenizer.

    Args:
        context: how many tokens it may be given; by default what its config says, see `hooks.host.context`.

    Raises:
        ModelError: it has no unembedding, or adapters around it.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, context: int | None = None):
        _check_kind(model)
        self.layers = decoder_layers(model)
        self.model = model.eval().requires_grad_(False)
        config: Any = model.config
        super().__init__(tokenizer, config.vocab_size, context_of(config, context))
        self.n_layers, self.d_model = len(self.layers), config.hidden_size
        self.held = False  # whether parts are held at their clean values now (`hooks.host.frozen_parts`)
        self.exact = False  # whether a half-precision model computes in fp32 now (`hooks.host.arithmetic`)
        self._logit_scale = float(getattr(config, "logit_scale", 1.0)) / float(getattr(config, "logits_scaling", 1.0))
        self._logit_cap: float | None = getattr(config, "final_logit_softcapping", None)
        if next(model.parameters()).dtype == torch.float16:
            log.warning("fp16 overflows in this model family; bfloat16 or float32 is safer")

    @classmethod
    def load(
        cls,
        name: str | Path,
        *,
        dtype: torch.dtype | None = None,
        device_map: str | None = None,
        context: int | None = None,
    ) -> "Host":
        """A local folder, a GGUF file, or a hub id.

        Raises:
            ModelError: it cannot be found, or is not a causal language model.
        """
        name = Path(name).expanduser() if str(name).startswith("~") else name
        _check_name(str(name))
        if is_gguf(name) and device_map:
            raise ModelError(
                "a GGUF file is loaded onto one device",
                found=f"device_map={device_map!r}",
                repair="device= (--device); or load it once and save_pretrained it as a folder",
            )
        options: dict[str, Any] = {"dtype": dtype or "auto", "output_loading_info": True, "trust_remote_code": False}
        if device_map:
            options["device_map"] = device_map
        try:
            if is_gguf(name):
                model, info, tokenizer = load_gguf(Path(name), dtype)
            else:
                loaded: Any = AutoModelForCausalLM.from_pretrained(name, **options)
                model, info = loaded
                tokenizer = load_tokenizer(name)
        except ModelError:
            raise
        except Exception as error:  # transformers, safetensors and the hub client raise many kinds
            if memory_ran_out(error):
                raise
            if "trust_remote_code" in str(error):
                raise ModelError(
                    f"the model {str(name)!r} needs code that its folder brings",
                    expected="a model that transformers knows itself",
                    repair="code from a folder is never run here; load it yourself, then HookedModel.from_model",
                ) from None
            raise ModelError(
                f"cannot load the model {str(name)!r}",
                expected="demo, a folder with config.json, weights and tokenizer, or a hub id like Qwen/Qwen2.5-32B",
                found=first_line(error, 240),
                repair="check the spelling; without a network only folders and models already in the cache load",
            ) from None
        missing = sorted(info["missing_keys"])
        if missing:  # transformers fills them with random numbers and raises no error
            raise ModelError(
                f"the weights of {name} are incomplete",
                expected="every tensor that its config.json asks for",
                found=f"{len(missing)} missing, {missing[0]} for one",
            )
        return cls(model, tokenizer, context)

    @property
    def end_tokens(self) -> frozenset[int]:
        """Tokens that end a text, by the model's current generation_config; empty if that has none."""
        model: Any = self.model
        config = getattr(model, "generation_config", None) or model.config
        ends = config.eos_token_id
        return frozenset() if ends is None else frozenset(torch.as_tensor(ends).flatten().tolist())

    @property
    def dtype(self) -> torch.dtype:
        """The model's own precision."""
        embedding: Any = self.model.get_input_embeddings()  # type: ignore[operator]
        return embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        """The device that token ids must be on."""
        return execution_device(self.model.get_input_embeddings())  # type: ignore[operator]

    def tails(self) -> list[Shaped[Tensor, "..."]]:
        """The last numbers of every parameter that is in memory, for `fingerprint`."""
        parts = (part for p in self.model.parameters() if not p.is_meta for part in stored_tensors(p.detach()))
        return [part.reshape(-1)[-16:] for part in parts]

    def device_of(self, layer: int) -> torch.device:
        """The device on which one block computes."""
        return execution_device(self.layers[layer])

    @property
    def decoder(self) -> Any:
        """The model without its unembedding; its output is the stream after the final norm."""
        return self.model.model

    def unembed(self, hidden: Float[Tensor, "*token d_model"]) -> Float[Tensor, "*token vocab"]:
        """Logits of normed hidden states, in fp32 also where the model runs in half precision.

        A bf16 logit near 20 has steps of 0.125, which would swallow most ablation effects. Where the unembedding is not
        a plain matrix in memory (quantised, offloaded), the model's own module is called.
        """
        head: Any = self.model.get_output_embeddings()  # type: ignore[operator]
        if not _plain_matrix(head) or head.weight.dtype.itemsize > 2:
            return self._behind_head(head(hidden.to(self.dtype) if self.exact else hidden))
        return self._behind_head(linear_fp32(hidden.to(head.weight.device), head.weight, head.bias))

    def _behind_head(self, logits: Float[Tensor, "*token vocab"]) -> Float[Tensor, "*token vocab"]:
        """Scale or cap the logits after the unembedding, as some architectures do."""
        if self.plain_logits:
            return logits
        scaled = logits * self._logit_scale
        return scaled if self._logit_cap is None else (scaled / self._logit_cap).tanh() * self._logit_cap

    @property
    def plain_logits(self) -> bool:
        """Whether logits are the unembedding's product alone, neither scaled (Granite, Cohere) nor capped (Gemma 2)."""
        return self._logit_scale == 1.0 and self._logit_cap is None

    def unembed_rows(
        self, hidden: Float[Tensor, "*token d_model"], tokens: Sequence[int]
    ) -> Float[Tensor, "*token target"]:
        """Logits of a few tokens of the vocabulary only. If the unembedding is no plain matrix, all are computed
        first."""
        head: Any = self.model.get_output_embeddings()  # type: ignore[operator]
        rows = list(tokens)
        if not _plain_matrix(head) or getattr(head, "_hf_hook", None) is not None:
            return self.unembed(hidden)[..., rows]
        bias = None if head.bias is None else head.bias[rows]
        return self._behind_head(linear_fp32(hidden.to(head.weight.device), head.weight[rows], bias))

    def top(self, logits: Float[Tensor, " vocab"], n: int) -> list[RankedToken]:
        """The n most likely tokens of one distribution."""
        n = whole(n, "n", least=0)
        wide = logits.double()
        probs = wide.softmax(-1)
        order = wide.sort(descending=True, stable=True).indices[:n].tolist()
        return [RankedToken(self.string(i), i, float(wide[i]), float(probs[i])) for i in order]

    # -- running -----------------------------------------------------------------------------------------------

    def attached(self, edits: Sequence[Edit]) -> "Attached":
        """A `with` block in which edits are attached, in order. With no edits, no hook is registered.

        Raises:
            UserError: on entering, another pass of this thread is running with edits attached.
        """
        return Attached(self, edits)

    def forward(self, batch: Batch, edits: Sequence[Edit] = ()) -> Float[Tensor, "batch pos vocab"]:
        """Logits of one pass over a batch, without gradients."""
        with self.attached(edits) as session, torch.no_grad():
            return session.run(batch)

    def window(self, first: int = 0, last: int | None = None) -> int | None:
        """The smallest sliding window of the blocks `first` to `last`; None where no block has one."""
        config: Any = self.model.config
        types = getattr(config, "layer_types", None)  # where a config has none, all layers are alike (Mistral)
        slides = types is None or "sliding_attention" in types[first:last]
        return (getattr(config, "sliding_window", None) or None) if slides else None

    def through_blocks(
        self, x: Float[Tensor, "batch pos d_model"], first: int, last: int
    ) -> Float[Tensor, "batch pos d_model"]:
        """Residual streams before block `first` → before block `last`. Only those blocks run; no padding, no cache.

        Raises:
            ModelError: a block has an unknown kind of attention.
        """
        places = torch.arange(x.shape[1], device=x.device)[None]
        with Exclusive(self.layers), torch.no_grad():
            rotary = self.decoder.rotary_emb(x, places)
            for number in range(first, last):
                mask = self._mask(number, x)
                x = self.layers[number](x, attention_mask=mask, position_ids=places, position_embeddings=rotary)
        return x

    def _mask(self, layer: int, x: Float[Tensor, "batch pos d_model"]) -> Shaped[Tensor, "1 1 pos pos"] | None:
        """The mask that transformers gives a block for rows without padding. None: the block is causal by itself, or
        has no attention."""
        config: Any = self.model.config
        slides, length = getattr(config, "sliding_window", None), x.shape[1]
        types = getattr(config, "layer_types", None)  # where a config has none, all layers are alike (Mistral)
        kind = types[layer] if types else "sliding_attention" if slides else "full_attention"
        if kind not in ("full_attention", "sliding_attention", "linear_attention"):
            raise ModelError(
                f"it is not known which tokens block {layer} attends to",
                expected="full, sliding or linear attention",
                found=str(kind),
            )
        eager = config._attn_implementation.removeprefix("held_") == "eager"
        window = int(slides or length) if kind == "sliding_attention" else length
        if kind == "linear_attention" or (window >= length and not eager):
            return None
        back = torch.arange(length, device=x.device)
        seen = ((back[:, None] >= back) & (back[:, None] - back < window))[None, None]
        if not eager:
            return seen
        return torch.zeros(seen.shape, dtype=x.dtype, device=x.device).masked_fill(~seen, torch.finfo(x.dtype).min)

    def forward_hidden(self, batch: Batch, edits: Sequence[Edit] = ()) -> Float[Tensor, "batch pos d_model"]:
        """The stream after the final norm; no logits are computed."""
        with self.attached(edits) as session, torch.no_grad():
            return session.hidden(batch)

    def forward_at(
        self, batch: Batch, pos: Int[Tensor, " batch"], edits: Sequence[Edit] = ()
    ) -> Float[Tensor, "batch vocab"]:
        """Logits at one position per row; no others are computed."""
        hidden = self.forward_hidden(batch, edits)
        with torch.no_grad():
            return self.unembed(hidden[torch.arange(len(pos), device=hidden.device), pos.to(hidden.device)])

    def forward_with_gradients(self, batch: Batch, edits: Sequence[Edit]) -> Float[Tensor, "batch pos vocab"]:
        """Logits with an autograd graph, whose leaves are the tensors that the edits put in. Parameters get no
        gradient."""
        with self.attached(edits) as session, torch.enable_grad():
            return session.run(batch)

    def own_logits(self, batch: Batch, hidden: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos vocab"]:
        """The logits that the model's own code computes from the stream after the final norm. The blocks are run again
        only if its code cannot compute logits without them."""
        given = MoeModelOutputWithPast(last_hidden_state=hidden)
        try:
            with Exclusive(self.layers) as block:
                block.set_attribute(self.decoder, "forward", lambda *_, **__: given)
                return self._whole(batch)
        except (AttributeError, TypeError, KeyError):  # the model's own code needs more than these streams
            return self._whole(batch)

    def _whole(self, batch: Batch) -> Float[Tensor, "batch pos vocab"]:
        with Exclusive(self.layers), torch.no_grad():
            return self.model(input_ids=batch.ids.to(self.device), use_cache=False).logits

    def capture(
        self, batch: Batch, sites: Sequence[Site]
    ) -> tuple[Float[Tensor, "batch pos d_model"], dict[Site, Float[Tensor, "batch pos d_model"]]]:
        """One plain pass: the stream after the final norm, and the tensor at each site."""
        seen: dict[Site, Tensor] = {}
        edits = [tap(site, seen) for site in dict.fromkeys(sites)]
        return self.forward_hidden(batch, edits), seen


def _plain_matrix(head: nn.Module) -> bool:
    """Whether a module is `x @ weight.T` with a plain weight in memory, not quantised and not offloaded."""
    return type(head) is nn.Linear and type(head.weight) is nn.Parameter and not head.weight.is_meta


def stored_tensors(tensor: Shaped[Tensor, "..."]) -> list[Shaped[Tensor, "..."]]:
    """The plain tensors that hold a parameter's numbers: itself, or the integers and scales of a quantised one."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names for part in stored_tensors(getattr(tensor, name))]


def fingerprint(parts: Iterable[Shaped[Tensor, "..."]]) -> str:
    """A digest of tensors' shapes and numbers that does not depend on their precision."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(str(tuple(part.shape)).encode())
        digest.update(part.to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def execution_device(module: nn.Module) -> torch.device:
    """The device on which a module computes: accelerate's choice for an offloaded module, else its weights' device."""
    for part in module.modules():
        planned = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        if planned is not None:
            return torch.device(planned if not isinstance(planned, int) else f"cuda:{planned}")
    return next(module.parameters()).device


def forward_of(module: nn.Module) -> str:
    """The name of the attribute that is the module's forward: accelerate wraps it in its own, which loads the
    weights."""
    return "_old_forward" if hasattr(module, "_hf_hook") else "forward"


def tap(site: Site, seen: dict[Site, Tensor]) -> Edit:
    """An edit that changes nothing and stores the site's tensor in `seen`."""

    def look(x: Tensor, at: Pass) -> Tensor:
        seen[site] = x
        return x

    return Edit(site, look)


@dataclass
class _Now:
    """Holds the pass that is running."""

    current: Pass


class Attached:
    """A `with` block in which edits are attached to the model and passes can be run."""

    def __init__(self, host: Host, edits: Sequence[Edit]):
        self._host, self._block = host, Exclusive(host.layers)
        self._sites: dict[Site, list[Edit]] = {}
        for edit in edits:
            self._sites.setdefault(edit.site, []).append(edit)
        self._now = _Now(Pass(0, []))

    @property
    def current(self) -> Pass:
        """The pass that is running; edits get it as their second argument."""
        return self._now.current

    @current.setter
    def current(self, current: Pass) -> None:
        self._now.current = current

    @uninterrupted
    def __enter__(self) -> "Attached":
        self._block.__enter__()
        try:
            self._block.begin_edits()
            # branch sites last, so that they get mlp_out after it was edited
            for site, here in sorted(self._sites.items(), key=lambda item: branches_off(item[0])):
                self._attach(site, here)
        except BaseException:
            self._block.__exit__()
            raise
        return self

    @uninterrupted
    def __exit__(self, *_: object) -> None:
        self._block.__exit__()

    def _attach(self, site: Site, edits: list[Edit]) -> None:
        """One function per site; all edits of the site run inside it, in order."""
        now = self._now  # a hook must not refer to `self`: then this object could never be freed, nor its hooks removed

        def through(x: Tensor) -> Tensor:
            for edit in edits:
                x = edit.apply(x, now.current)
            return x

        if branches_off(site):
            _attach_branch(self, self._host.model, site, through)
        else:
            _attach_site(self, self._host.model, site, through)

    def hook(self, module: nn.Module, kind: HookKind, function: Callable[..., Any], **options: bool) -> None:
        """Register a hook until the end of the block."""
        tables = (module._forward_hooks, module._forward_hooks_with_kwargs)
        register: Callable[..., Any] = module.register_forward_hook
        if kind == "before":
            tables = (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs)
            register = module.register_forward_pre_hook

        def undo() -> None:
            for number in [number for number, other in tables[0].items() if other is function]:
                for table in tables:
                    table.pop(number, None)

        self._block.change(lambda: register(function, **options), undo)

    def run(self, batch: Batch, prompt_lengths: Sequence[int] | None = None) -> Float[Tensor, "batch pos vocab"]:
        """One pass over whole rows, without a cache. `prompt_lengths`: of each row, if other tokens follow its
        prompt."""
        return self._host.unembed(self.hidden(batch, prompt_lengths))

    def hidden(self, batch: Batch, prompt_lengths: Sequence[int] | None = None) -> Float[Tensor, "batch pos d_model"]:
        """The same without the unembedding: the stream after the final norm."""
        self.current = Pass(0, list(prompt_lengths or batch.lengths))
        device = self._host.device
        padded = len(set(batch.lengths)) > 1
        mask = {"attention_mask": batch.mask.long().to(device)} if padded else {}
        return self._host.decoder(input_ids=batch.ids.to(device), use_cache=False, **mask).last_hidden_state

    def step(
        self,
        ids: Int[Tensor, "batch column"],
        cache: DynamicCache | None,
        prompt_lengths: Sequence[int],
        pads: tuple[int, ...] = (),
    ) -> Float[Tensor, "batch vocab"]:
        """The next tokens' logits: `ids` follow the tokens in `cache`; without a cache, `ids` are all tokens.

        Args:
            pads: length of the padding before each row, if there is any. No token attends to it, and positions are
                counted from the first token after it.
        """
        first = cache.get_seq_length() if cache is not None else 0
        self.current = Pass(first, list(prompt_lengths), pads=pads)
        device = self._host.device
        masks = {name: tensor.to(device) for name, tensor in _padding(first, ids.shape[1], pads).items()}
        given = masks | {CACHE: cache}
        hidden = self._host.decoder(input_ids=ids.to(device), use_cache=cache is not None, **given).last_hidden_state
        return self._host.unembed(hidden[:, -1])


def _padding(first: int, count: int, pads: tuple[int, ...]) -> dict[str, Int[Tensor, "batch column"]]:
    """Mask and positions for columns `first .. first+count−1` of rows with padding before them; empty without
    padding."""
    if not any(pads):
        return {}
    columns, pad = torch.arange(first + count), torch.tensor(pads)[:, None]
    return {"attention_mask": (columns >= pad).long(), "position_ids": (columns[first:] - pad).clamp(min=0)}


def _attach_site(session: Attached, model: nn.Module, site: Site, through: Callable[[Tensor], Tensor]) -> None:
    module, end = module_at(model, site)

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # transformers passes hidden_states by position to layers and norms, by keyword to attention
        if args:
            return (through(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": through(kwargs["hidden_states"])}

    def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        # a transformers 5 decoder layer returns a plain tensor, attention a tuple
        if isinstance(output, tuple):
            return (through(output[0]), *output[1:])
        return through(output)

    if end == "input":
        session.hook(module, "before", before, with_kwargs=True)
    else:
        session.hook(module, "after", after)


def _attach_branch(session: Attached, model: nn.Module, site: Site, through: Callable[[Tensor], Tensor]) -> None:
    """Edit the stream at a site where the block keeps it in a local variable.

    The norm's input is only a copy for the MLP; the block adds the MLP's output to the stream in its variable. So the
    norm gets the edited stream, and the block's output is replaced by edited stream + mlp_out: exact in any precision.
    """
    edited: dict[str, Tensor] = {}

    def into_norm(_: nn.Module, args: tuple[Any, ...]) -> Any:
        out = through(args[0])
        edited.clear()
        if out is not args[0]:
            edited["stream"] = out
        return (out, *args[1:])

    def keep_mlp(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        edited["mlp_out"] = output

    def rebuild(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return edited["stream"] + edited["mlp_out"] if "stream" in edited else output

    module, _ = module_at(model, site)
    mlp, _ = module_at(model, Site("mlp_out", site.layer))
    block, _ = module_at(model, Site("resid_post", site.layer))
    session.hook(module, "before", into_norm)
    session.hook(mlp, "after", keep_mlp)
    session.hook(block, "after", rebuild, prepend=True)  # runs before edits at resid_post


def _check_kind(model: nn.Module) -> None:
    name = type(model).__name__
    if any(kind.__name__ == "PeftModel" for kind in type(model).__mro__):
        raise ModelError(
            f"{name} is a wrapper around a model with adapters",
            expected="the transformers model itself, the adapters merged into its weights",
            repair="model.merge_and_unload(), and what that returns instead",
        )
    if not hasattr(model, "get_output_embeddings") or isinstance(model.get_output_embeddings(), nn.Module):  # type: ignore[operator]
        return  # an object that is no transformers model is refused when its layers are looked up
    raise ModelError(
        f"{name} has no unembedding, so there is no next token to predict",
        expected="a causal language model, as …ForCausalLM of transformers",
    )


_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def _check_name(name: str) -> None:
    path = Path(name)
    if is_gguf(name):
        if not path.is_file():
            raise ModelError(f"there is no file {name}", expected="a GGUF file of a causal language model")
        return
    looks_local = path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
    if path.is_dir() and not (path / "config.json").is_file():
        raise ModelError(
            f"the folder {name} holds no model",
            expected="config.json beside the weights",
            found=", ".join(sorted(p.name for p in path.iterdir())[:6]) or "an empty folder",
        )
    if path.is_dir() and not any((path / file).is_file() for file in _TOKENIZER_FILES):
        raise ModelError(f"the folder {name} holds no tokenizer", expected=f"one of {', '.join(_TOKENIZER_FILES)}")
    if looks_local and not path.exists():
        raise ModelError(f"there is no folder {name}", expected="a folder with config.json, weights and tokenizer")
