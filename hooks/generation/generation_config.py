"""What a model's own `generation_config` does to the choice of a token: transformers' processors, built and called.

Greedy decoding is not always the largest logit: `repetition_penalty`, `no_repeat_ngram_size`, `bad_words_ids`,
`suppress_tokens`, `min_new_tokens` and more change it. transformers builds the processors for that itself: its
`generate` hands them to a decoding loop of the caller's (`custom_generate`), and the one here takes them and decodes
nothing. A field that asks for another kind of decoding is refused by its name.

The configuration is read anew for every text, since people change it in place.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList, StopStringCriteria, WatermarkingConfig

from hooks.errors import ModelError, first_line, memory_ran_out
from hooks.files import shown
from hooks.host import Host, execution_device

REFUSED = {  # another kind of decoding → the value that does not ask for it
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "penalty_alpha": 0.0,
    "dola_layers": None,
    "constraints": None,
    "force_words_ids": None,
    "prompt_lookup_num_tokens": None,
    "assistant_early_exit": None,
    "use_mtp": False,
    "speculation_type": None,
    "is_assistant": False,
    "token_healing": False,
    "guidance_scale": 1.0,  # a second prompt would have to be steered too
    "max_time": None,  # the text would depend on the machine
}
HONOURED = {
    "eos_token_id", "stop_strings", "min_length", "min_new_tokens", "repetition_penalty",
    "encoder_repetition_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids",
    "sequence_bias", "suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id",
    "exponential_decay_length_penalty", "remove_invalid_values", "watermarking_config", "renormalize_logits",
}  # fmt: skip
# what `Sampling` says in their place, and the values with which transformers does nothing
SAMPLING = {
    "do_sample": False,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "min_p": None,
    "top_h": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
}
REPLACED = {"max_length": None, "max_time": None, "stop_strings": None, "use_cache": False}
WITHOUT_EFFECT = {  # on which tokens come
    "max_new_tokens", "cache_implementation", "cache_config", "max_cache_len", "early_stopping", "length_penalty",
    "diversity_penalty", "low_memory", "prefill_chunk_size", "num_assistant_tokens", "num_assistant_tokens_schedule",
    "assistant_confidence_threshold", "assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight",
    "max_matching_ngram_size", "output_attentions", "output_hidden_states", "output_scores", "output_logits",
    "return_dict_in_generate", "pad_token_id", "bos_token_id", "decoder_start_token_id", "compile_config",
    "disable_compile", "continuous_batching_config", "transformers_version",
}  # fmt: skip


def check_config(model: Any) -> None:
    """Refuse a generation_config that asks for what is not done here.

    Raises:
        ModelError: naming the field.
    """
    config = getattr(model, "generation_config", None)
    theirs = vars(GenerationConfig())  # what is no field of transformers' has no effect there either
    for name, value in vars(config).items() if config is not None else ():
        if value is None or name.startswith("_") or name not in theirs:
            continue
        if name in REFUSED:
            wanted = REFUSED[name]
            fits = value == wanted
        elif name == "watermarking_config":  # SynthID's keeps a state between tokens
            wanted, fits = None, isinstance(value, dict) or type(value) is WatermarkingConfig
        elif name == "cache_implementation":  # keys and values in few bits are other numbers
            wanted, fits = None, value != "quantized"
        else:
            wanted = None
            fits = value is False or name in HONOURED or name in SAMPLING or name in REPLACED or name in WITHOUT_EFFECT
        if not fits:
            raise ModelError(
                f"the model's generation_config sets {name}, which is not supported here",
                expected=str(wanted),
                found=shown(value),
                repair=f"set it to {wanted} in generation_config.json, or model.host.model.generation_config.{name}",
            )


def asked_of(
    model: Any, prompt: Sequence[int], max_new_tokens: int, warpers: LogitsProcessorList, **changed: Any
) -> tuple[LogitsProcessorList, GenerationConfig]:
    """The processors that transformers makes for a prompt, with `warpers` where its own would stand, and the complete
    configuration. Nothing runs.

    Args:
        changed: fields with other values than the model's.

    Raises:
        ModelError: transformers refuses the configuration.
    """

    def take(_: Any, __: Any, **given: Any) -> tuple[LogitsProcessorList, GenerationConfig]:
        return given["logits_processor"], given["generation_config"]

    where = execution_device(model.get_output_embeddings())
    ids = torch.tensor([list(prompt)], device=where)
    fields = {**REPLACED, **changed, "max_new_tokens": max_new_tokens}
    with _refusals():
        return model.generate(
            ids, attention_mask=torch.ones_like(ids), logits_processor=warpers, custom_generate=take, **fields
        )


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """What transformers raises, in our words."""
    try:
        yield
    except Exception as error:  # each processor has its own way of refusing
        if memory_ran_out(error):
            raise
        raise ModelError(
            "transformers cannot use the model's generation_config",
            found=first_line(error, 240),
            repair="correct generation_config.json, or model.host.model.generation_config in place",
        ) from None


class Processing:
    """What stands between one row's logits and the choice of its next token.

    Args:
        prompt: the row's own tokens, no padding; lengths count from its end.
        max_new_tokens: where transformers would stop; `forced_eos_token_id` is forced there.
        warpers: of a sampling, empty where greedy.
        repetition_penalty: in place of the configuration's.

    Attributes:
        stops: the configuration's stop strings.

    Raises:
        ModelError: see `check_config` and `asked_of`.
    """

    def __init__(
        self,
        host: Host,
        prompt: Sequence[int],
        max_new_tokens: int,
        warpers: LogitsProcessorList,
        repetition_penalty: float | None = None,
    ):
        model: Any = host.model
        check_config(model)
        self._prompt, self._processors = list(prompt), warpers
        self._stopping: StopStringCriteria | None = None
        self.stops: tuple[str, ...] = ()
        if not isinstance(model, GenerationMixin):
            return
        changed = {} if repetition_penalty is None else {"repetition_penalty": float(repetition_penalty)}
        self._processors, _ = asked_of(model, prompt, max_new_tokens, warpers, **SAMPLING, **changed)
        strings = getattr(model.generation_config, "stop_strings", None)
        if strings:
            self.stops = (strings,) if isinstance(strings, str) else tuple(strings)
            with _refusals():
                self._stopping = StopStringCriteria(host.tokenizer, list(self.stops))

    def scores(self, new: Sequence[int], logits: Float[Tensor, " vocab"]) -> Float[Tensor, " vocab"]:
        """What the next token is chosen from, in fp32 as in transformers.

        Args:
            new: the tokens behind the prompt.

        Raises:
            ModelError: no token is left.
        """
        scores = logits.float()
        if not self._processors:
            return scores
        text: Any = torch.tensor([[*self._prompt, *new]], device=logits.device)
        with _refusals():
            scores = self._processors(text, scores[None].clone())[0]
        if not bool(scores.max().isfinite()):
            raise ModelError(
                f"no token is left to choose from behind {len(new)} new tokens",
                expected="at least one that generation_config and sampling leave, with a finite score",
                repair="look for suppressed tokens, bad words or n-grams in the model's generation_config",
            )
        return scores

    def stopped(self, new: Sequence[int]) -> bool:
        """Whether one of the configuration's stop strings is complete, with the prompt's end counted in."""
        if self._stopping is None:
            return False
        return bool(self._stopping(torch.tensor([[*self._prompt, *new]]), None)[0])
