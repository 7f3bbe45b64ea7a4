"""Text and token ids: what a prompt is, how it is read, and what a token is called."""

import json
import logging
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, SupportsIndex

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hooks.errors import PromptError, TargetError, first_line

log = logging.getLogger("hooks")

Prompt = str | Sequence[int] | Int[Tensor, " pos"] | Int[Tensor, "1 pos"]


@dataclass(frozen=True)
class Batch:
    """Token ids of one or more prompts, padded on the right.

    The padding of a causal model's right end changes nothing for the real tokens before it, so positions are plain
    indices and no position ids are needed.
    """

    ids: Int[Tensor, "batch pos"]
    lengths: tuple[int, ...]
    strings: tuple[tuple[str, ...], ...]

    @property
    def mask(self) -> Bool[Tensor, "batch pos"]:
        """True at real tokens."""
        return torch.arange(self.ids.shape[1]) < torch.tensor(self.lengths)[:, None]

    @property
    def last(self) -> Int[Tensor, " batch"]:
        """Index of each row's last real token."""
        return torch.tensor(self.lengths) - 1

    def rows(self, index: Sequence[int]) -> "Batch":
        """Some rows, in the given order; rows may repeat."""
        return Batch(
            self.ids[list(index)],
            tuple(self.lengths[i] for i in index),
            tuple(self.strings[i] for i in index),
        )


class Tokens:
    """A tokenizer, in front of a vocabulary and a context of known sizes."""

    def __init__(self, tokenizer: Any, d_vocab: int, max_positions: int):
        self.tokenizer, self.d_vocab, self.max_positions = tokenizer, d_vocab, max_positions

    def tokenize(self, prompt: Prompt) -> list[int]:
        """Token ids of one prompt, special tokens as the tokenizer adds them.

        Raises:
            PromptError: the prompt is empty, has ids outside the vocabulary, or is longer than the context.
        """
        if isinstance(prompt, Tensor) and prompt.ndim == 2 and len(prompt) == 1:
            prompt = prompt[0]
        if isinstance(prompt, str) and _is_broken(prompt):
            raise PromptError("the prompt is not valid text", found=ascii(prompt)[:80], repair="give it as UTF-8")
        ids = list(self.tokenizer(prompt).input_ids) if isinstance(prompt, str) else [int(i) for i in prompt]
        if not ids or (isinstance(prompt, str) and not prompt.strip()):
            raise PromptError("the prompt is empty", expected="at least one token", found=repr(prompt))
        outside = [i for i in ids if not 0 <= i < self.d_vocab]
        if outside:
            raise PromptError(f"token id {outside[0]} is outside the vocabulary", expected=f"0 to {self.d_vocab - 1}")
        if len(ids) > self.max_positions:
            raise PromptError(
                f"the prompt has {len(ids)} tokens",
                expected=f"at most {self.max_positions}, the model's context",
            )
        self._note_unknown(prompt, ids)
        return ids

    def chat(self, messages: str | Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation in the tokenizer's chat template, up to where the assistant's answer begins.

        Args:
            messages: what the user says; or a whole conversation, `[{"role": "user", "content": "…"}, …]`.

        Raises:
            PromptError: it is empty, the tokenizer has no chat template, or the template refuses the messages.
        """
        if not messages or (isinstance(messages, str) and not messages.strip()):
            raise PromptError("the prompt is empty", expected="at least one message", found=repr(messages))
        if not getattr(self.tokenizer, "chat_template", None):
            raise PromptError(
                "the tokenizer has no chat template",
                expected="an instruct model's tokenizer",
                repair="leave --chat away; the prompt is then taken as it stands",
            )
        turns = [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)
        try:
            ids = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        except Exception as error:  # a template is a program of the model's makers and raises what it likes
            raise PromptError("the chat template refuses the messages", found=first_line(error)) from None
        return [int(i) for i in ids]

    def _note_unknown(self, prompt: Prompt, ids: list[int]) -> None:
        unknown = getattr(self.tokenizer, "unk_token_id", None)
        if unknown is not None and unknown in ids and isinstance(prompt, str):
            log.warning("some words of %r are not in the vocabulary and become %s", prompt, self.string(unknown))

    def string(self, token: int) -> str:
        """One token as text."""
        return self.tokenizer.decode([token])

    def strings(self, ids: Sequence[int]) -> tuple[str, ...]:
        """Every token as text."""
        return tuple(self.string(int(i)) for i in ids)

    def text(self, ids: Sequence[int]) -> str:
        """Tokens joined to text."""
        return self.tokenizer.decode(list(ids))

    def batch(self, prompts: Sequence[Prompt]) -> Batch:
        """Several prompts as one right-padded batch.

        Raises:
            PromptError: no prompts, or one of them is not usable.
        """
        if not prompts:
            raise PromptError("no prompts given", expected="at least one")
        rows = [self.tokenize(prompt) for prompt in prompts]
        width = max(map(len, rows))
        ids = torch.tensor([row + [row[-1]] * (width - len(row)) for row in rows])
        known: dict[int, str] = {i: self.string(i) for row in rows for i in set(row)}
        strings = tuple(tuple(known[i] for i in row) for row in rows)
        return Batch(ids, tuple(map(len, rows)), strings)

    def token_id(self, target: str | SupportsIndex) -> int:
        """The single token meant by `target`. A word without a leading space means the one with it, if that exists:
        inside a sentence that is what the model predicts.

        Raises:
            TargetError: no such single token; the message shows how the text splits.
        """
        if not isinstance(target, str):
            target = operator.index(target)
            if not 0 <= target < self.d_vocab:
                raise TargetError(f"token id {target} is outside the vocabulary", expected=f"0 to {self.d_vocab - 1}")
            return target
        texts = [target] if target[:1].isspace() else [" " + target, target]
        splits = [self.tokenizer(text, add_special_tokens=False).input_ids for text in texts if text.strip()]
        unknown = getattr(self.tokenizer, "unk_token_id", None)
        for ids in splits:
            if len(ids) == 1 and ids[0] != unknown:
                return ids[0]
        shown = [" | ".join(map(repr, self.strings(ids))) for ids in splits]
        known = not any(unknown in ids for ids in splits)
        raise TargetError(
            f"the target {target!r} is not one token" if known else f"the target {target!r} is not in the vocabulary",
            expected="text that the tokenizer keeps whole, or a token id",
            found=" or ".join(dict.fromkeys(shown)) or "an empty text",
            repair="use its first token as the target" if known else "",
        )


def _is_broken(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # bytes that were no UTF-8 arrive as lone surrogates
        return True
    return False


def load_tokenizer(name: str | Path) -> Any:
    """AutoTokenizer, except where a folder brings a complete tokenizer of its own.

    transformers 5 maps model_type "qwen2" to its own class and silently drops a folder's normalizer and
    pre-tokenizer, even when tokenizer_config.json names PreTrainedTokenizerFast.
    """
    config = Path(name) / "tokenizer_config.json"
    if config.is_file():
        named = json.loads(config.read_text(encoding="utf-8")).get("tokenizer_class")
        if named in ("PreTrainedTokenizerFast", "TokenizersBackend"):
            return PreTrainedTokenizerFast.from_pretrained(name)
    return AutoTokenizer.from_pretrained(name)
