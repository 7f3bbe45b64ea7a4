"""Language models in GGUF files, as llama.cpp keeps them: read by transformers, held as plain weights.

transformers gives a model that still knows of its quantised file and refuses to be saved. The weights are therefore
moved into a fresh model of the same configuration, which is any other model.
"""

import contextlib
import logging
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from hooks.errors import ModelError

SUFFIX = ".gguf"
DTYPE = torch.bfloat16  # of the weights, unless told otherwise

log = logging.getLogger("hooks")


def is_gguf(name: str | Path) -> bool:
    """Whether a model's name is that of a GGUF file."""
    return str(name).lower().endswith(SUFFIX)


def config_of(name: str | Path) -> Any:
    """The configuration of a model that is not loaded: of a folder, a hub id or a GGUF file."""
    if is_gguf(name):
        return AutoConfig.from_pretrained(Path(name).parent, gguf_file=Path(name).name)
    return AutoConfig.from_pretrained(name, trust_remote_code=False)


def load_gguf(path: Path, dtype: torch.dtype | None) -> tuple[Any, dict[str, Any], Any]:
    """The model, what transformers says of its loading, and the tokenizer.

    Raises:
        ModelError: the package gguf is not installed. What transformers cannot read raises what transformers raises.
    """
    if find_spec("gguf") is None:
        raise ModelError("GGUF files need the package gguf", repair="pip install 'qwen-circuits[gguf]'")
    wanted = dtype or DTYPE
    with _quiet():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=wanted, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    read, info = loaded
    weights = {name: _plain(tensor, wanted) for name, tensor in read.state_dict().items()}
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    generation = read.generation_config
    del read, loaded
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=wanted)
    model.load_state_dict(weights, strict=False, assign=True)  # not strict: a tied head is there once
    model.tie_weights()
    _fill_buffers(model, config)
    model.generation_config = generation
    return model.eval(), info, tokenizer


def _plain(tensor: Any, dtype: torch.dtype) -> torch.Tensor:
    """A tensor as plain numbers, whatever it is packed in."""
    made: torch.Tensor = tensor.dequantize() if hasattr(tensor, "quant_type") else tensor
    return made.to(dtype) if made.is_floating_point() else made


def _fill_buffers(model: Any, config: Any) -> None:
    """Fill buffers that follow from the configuration, such as the frequencies of a rotation, from a fresh module."""
    for module in model.modules():
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            fresh = type(module)(config)
            for name, buffer in fresh.named_buffers(recurse=False):
                setattr(module, name, buffer)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' bars and its advice on quantised kernels, which are not used."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        transformers_logging.enable_progress_bar()
