"""Text and token ids: kinds of prompts, tokenizing, and the text of a token."""

import json
import logging
import operator
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, SupportsIndex

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hooks.errors import ModelError, PromptError, TargetError, first_line, printable

log = logging.getLogger("hooks")

Array = Int[Tensor, " pos"] | Int[Tensor, "1 pos"] | Int[np.ndarray, " pos"] | Int[np.ndarray, "1 pos"]
Prompt = str | Sequence[SupportsIndex] | Array | Mapping[str, Any]  # a mapping: a tokenizer's output for one prompt
Prompts = Prompt | Sequence[Prompt] | Int[Tensor, "batch pos"] | Int[np.ndarray, "batch pos"]


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

    @property
    def left_pads(self) -> tuple[int, ...]:
        """Padding in front of each row where rows are padded on the left, so that they grow at the same end."""
        return tuple(self.ids.shape[1] - length for length in self.lengths)

    def rows(self, index: Sequence[int]) -> "Batch":
        """Some rows, in the given order; rows may repeat."""
        return Batch(
            self.ids[list(index)],
            tuple(self.lengths[i] for i in index),
            tuple(self.strings[i] for i in index),
        )


class Tokens:
    """A tokenizer, with the sizes of the vocabulary and of the context."""

    def __init__(self, tokenizer: Any, d_vocab: int, max_positions: int):
        self.tokenizer, self.d_vocab, self.max_positions = tokenizer, d_vocab, max_positions
        self._said: deque[str] = deque(
            maxlen=256
        )  # earlier warnings: a prompt is read several times, but warned of once

    def tokenize(self, prompt: Prompt) -> list[int]:
        """Token ids of one prompt. The tokenizer adds its special tokens to text; ids stay as they are.

        Args:
            prompt: text; whole numbers in a sequence, a tensor or a numpy array, of shape [pos] or [1, pos]; or a
                tokenizer's output for one text.

        Raises:
            PromptError: the prompt is none of these; it is empty, has ids outside the vocabulary, or is longer than
                the context.
            ModelError: it is text, and there is no tokenizer.
        """
        ids = self.text_ids(prompt) if isinstance(prompt, str) else _whole_numbers(prompt)
        if not ids:
            raise PromptError("the prompt is empty", expected="at least one token", found=repr(prompt))
        outside = [i for i in ids if not 0 <= i < self.d_vocab]
        if outside:
            raise PromptError(f"token id {outside[0]} is outside the vocabulary", expected=f"0 to {self.d_vocab - 1}")
        if len(ids) > self.max_positions:
            raise PromptError(
                f"the prompt has {len(ids)} tokens",
                expected=f"at most {self.max_positions}, the model's context",
                repair="shorten it; if the model reads further than its config says: context=N, --context N",
            )
        self._note_unknown(prompt, ids)
        self._note_second_bos(prompt, ids)
        return ids

    def text_ids(self, text: str) -> list[int]:
        """Token ids of a text of any length, special tokens as the tokenizer adds them; none of an empty one.

        Raises:
            PromptError: it is not valid text.
            ModelError: there is no tokenizer.
        """
        if _is_broken(text):
            raise PromptError("the prompt is not valid text", found=ascii(text)[:80], repair="give it as UTF-8")
        if not text.strip():
            return []
        self._check_reads_text()
        return list(self.tokenizer(text).input_ids)

    def split(self, text: str) -> list[int]:
        """Token ids of a piece of text, without special tokens.

        Raises:
            TargetError: it is not valid text.
            ModelError: there is no tokenizer.
        """
        if _is_broken(text):
            raise TargetError("the target is not valid text", found=ascii(text.strip())[:80], repair="give it as UTF-8")
        self._check_reads_text()
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def _check_reads_text(self) -> None:
        if self.tokenizer is None:
            raise ModelError(
                "this model has no tokenizer, so it reads no text",
                expected="token ids, such as [1, 2, 3]",
                repair="give it a tokenizer, as in HookedModel.from_model(model, tokenizer, …)",
            )

    def chat(self, messages: str | Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation in the tokenizer's chat template, up to the beginning of the assistant's answer.

        Args:
            messages: the user's message; or a whole conversation, `[{"role": "user", "content": "…"}, …]`.

        Raises:
            PromptError: it is empty, the tokenizer has no chat template, or the template refuses the messages.
        """
        if not messages or (isinstance(messages, str) and not messages.strip()):
            raise PromptError("the prompt is empty", expected="at least one message", found=repr(messages))
        self._check_reads_text()
        if not getattr(self.tokenizer, "chat_template", None):
            raise PromptError(
                "the tokenizer has no chat template",
                expected="an instruct model's tokenizer",
                repair="leave --chat away; the prompt is then taken as it stands",
            )
        turns = [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)
        try:
            ids = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        except Exception as error:  # a template is a program by the model's makers and can raise any error
            raise PromptError("the chat template refuses the messages", found=first_line(error)) from None
        return [int(i) for i in ids]

    def _note_unknown(self, prompt: Prompt, ids: list[int]) -> None:
        unknown = getattr(self.tokenizer, "unk_token_id", None)
        if unknown is not None and unknown in ids and isinstance(prompt, str):
            self._warn(f"some words of {prompt!r} are not in the vocabulary and become {self.string(unknown)}")

    def _note_second_bos(self, prompt: Prompt, ids: list[int]) -> None:
        """Warn of two BOS tokens: a chat template's text begins with one, and the tokenizer adds another."""
        bos = getattr(self.tokenizer, "bos_token_id", None)
        if bos is None or ids[:2] != [bos, bos]:
            return
        name = self.string(bos)
        if isinstance(prompt, str):
            self._warn(
                f"{prompt!r} begins with {name}, and the tokenizer puts another one in front: the model reads two; "
                "give the messages to model.host.chat (--chat), or the text without its own"
            )
        else:
            self._warn(
                f"the token ids begin with {name} twice; a chat template's text is tokenized with "
                "add_special_tokens=False, as model.host.chat does"
            )

    def _warn(self, text: str) -> None:
        if text not in self._said:
            self._said.append(text)
            log.warning("%s", printable(text))

    def string(self, token: int) -> str:
        """One token as text; without a tokenizer its id, as in `<3>`."""
        return f"<{token}>" if self.tokenizer is None else self.tokenizer.decode([token])

    def strings(self, ids: Sequence[int]) -> tuple[str, ...]:
        """Every token as text."""
        return tuple(self.string(int(i)) for i in ids)

    def text(self, ids: Sequence[int]) -> str:
        """Tokens joined to text."""
        return "".join(map(self.string, ids)) if self.tokenizer is None else self.tokenizer.decode(list(ids))

    def batch(self, prompts: Sequence[Prompt]) -> Batch:
        """Several prompts as one right-padded batch.

        Raises:
            PromptError: no prompts, or one of them is not usable.
        """
        if isinstance(prompts, str | bytes):
            raise PromptError("one text where a list of prompts is meant", found=repr(prompts)[:80], repair="[prompt]")
        rows = [self.tokenize(prompt) for prompt in prompts]
        if not rows:
            raise PromptError("no prompts given", expected="at least one")
        width = max(map(len, rows))
        ids = torch.tensor([row + [row[-1]] * (width - len(row)) for row in rows])
        known: dict[int, str] = {i: self.string(i) for row in rows for i in set(row)}
        strings = tuple(tuple(known[i] for i in row) for row in rows)
        return Batch(ids, tuple(map(len, rows)), strings)

    def token_id(self, target: str | SupportsIndex) -> int:
        """The single token that `target` names. A word without a leading space means the token with a leading space, if
        there is one, since the model predicts that one inside a sentence.

        Raises:
            TargetError: the text is not one token; the message shows how it splits. Or it is neither text nor an id.
        """
        if not isinstance(target, str):
            found = _whole_number(target)
            if found is None:
                raise TargetError("the target is no token", expected="text or a token id", found=repr(target)[:80])
            target = found
            if not 0 <= target < self.d_vocab:
                raise TargetError(f"token id {target} is outside the vocabulary", expected=f"0 to {self.d_vocab - 1}")
            return target
        texts = [target] if target[:1].isspace() else [" " + target, target]
        splits = [self.split(text) for text in texts if text.strip()]
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


def is_one(prompts: Prompts) -> bool:
    """Whether this is one prompt, and not a sequence of several or a tensor with several rows."""
    if isinstance(prompts, Tensor | np.ndarray):
        return prompts.ndim != 2 or len(prompts) == 1
    if not isinstance(prompts, Sequence) or isinstance(prompts, str | bytes | bytearray | memoryview):
        return True
    return bool(prompts) and isinstance(prompts[0], SupportsIndex) and not _has_axes(prompts[0])


def listed(prompts: Prompts) -> list[Prompt]:
    """Prompts as a list, also if there is only one, or if they are the rows of a tensor."""
    return [prompts] if is_one(prompts) else list(prompts)  # type: ignore[list-item, arg-type]


def _has_axes(item: object) -> bool:
    return isinstance(item, Tensor | np.ndarray) and item.ndim > 0


def _whole_number(item: object) -> int | None:
    """An index as an int; None for anything else, and for bools, which Python would accept."""
    dtype = getattr(item, "dtype", None)
    if isinstance(item, bool) or dtype in (torch.bool, np.bool_):
        return None
    try:
        return operator.index(item)  # type: ignore[arg-type]
    except TypeError:
        return None


def _whole_numbers(prompt: object) -> list[int]:
    """Token ids from a prompt that is given as ids.

    Raises:
        PromptError: the prompt is no row of whole numbers.
    """
    if isinstance(prompt, Mapping):
        return _of_tokenizer(prompt)
    if isinstance(prompt, Tensor | np.ndarray):
        return _of_array(prompt)
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes | bytearray | memoryview):
        raise PromptError(
            "a prompt is text or token ids",
            expected="a str, or whole numbers in a list, a tensor or an array",
            found=f"{type(prompt).__name__} {prompt!r}"[:80],
        )
    found = [_whole_number(item) for item in prompt]
    ids = [item for item in found if item is not None]
    if len(ids) == len(found):
        return ids
    _refuse_item(prompt, found.index(None))


def _refuse_item(prompt: Sequence[object], place: int) -> NoReturn:
    item = prompt[place]
    if isinstance(item, Mapping) and "role" in item:
        _refuse_chat()
    if isinstance(item, str | Sequence) or _has_axes(item):
        raise PromptError(
            "a list of prompts where one is meant",
            expected="one text, or one row of token ids",
            found=f"{len(prompt)} items, the first {type(prompt[0]).__name__}",
            repair="one call per prompt; run_many, record and generate take several at once",
        )
    raise PromptError(
        f"{item!r} is no token id"[:80],
        expected=f"whole numbers, as at other places of {len(prompt)}",
        where=f"item {place}",
    )


def _refuse_chat() -> NoReturn:
    raise PromptError(
        "the messages of a chat are no prompt until a template has joined them",
        expected="text or token ids",
        repair="model.host.chat(messages) gives the ids; --chat on the command line",
    )


def _of_array(prompt: Tensor | np.ndarray) -> list[int]:
    row = prompt[0] if prompt.ndim == 2 and len(prompt) == 1 else prompt
    kind = str(prompt.dtype).removeprefix("torch.")
    if row.ndim == 1 and (kind.startswith(("int", "uint")) or not len(row)):
        return [int(i) for i in row.tolist()]
    raise PromptError(
        "a prompt is one row of token ids",
        expected="whole numbers, of shape [pos] or [1, pos]",
        found=f"{kind} of shape {list(prompt.shape)}",
        repair="one row at a time; record and generate take a tensor with several rows" if row.ndim == 2 else "",
    )


def _of_tokenizer(encoded: Mapping[Any, Any]) -> list[int]:
    if "role" in encoded:
        _refuse_chat()
    if "input_ids" not in encoded:
        raise PromptError(
            "a prompt is text or token ids", expected="a mapping with input_ids", found=f"keys {list(encoded)}"[:80]
        )
    rows = encoded["input_ids"]
    one_row = isinstance(rows, list | tuple) and len(rows) == 1 and isinstance(rows[0], list | tuple)
    ids = _whole_numbers(rows[0] if one_row else rows)
    if not torch.as_tensor(encoded.get("attention_mask", 1)).all():
        raise PromptError(
            "what the tokenizer returned has padding, which a prompt of its own does not need",
            repair="give the text itself, or tokenize it without padding",
        )
    return ids


def _is_broken(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # Python represents bytes that are no UTF-8 as lone surrogates
        return True
    return False


def load_tokenizer(name: str | Path) -> Any:
    """AutoTokenizer, except where a folder has its own complete tokenizer. Code from a folder is never run.

    transformers 5 maps model_type "qwen2" to its own class and silently drops a folder's normalizer and
    pre-tokenizer, even when tokenizer_config.json names PreTrainedTokenizerFast.
    """
    config = Path(name) / "tokenizer_config.json"
    if config.is_file():
        named = json.loads(config.read_text(encoding="utf-8")).get("tokenizer_class")
        if named in ("PreTrainedTokenizerFast", "TokenizersBackend"):
            return PreTrainedTokenizerFast.from_pretrained(name, trust_remote_code=False)
    return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
