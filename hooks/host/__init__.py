"""The language model: attaching hooks, exclusive use, prompts and logits, and parts held at their clean values."""

from hooks.host.arithmetic import Precision, choose_precision, computes_in, computing, is_half, measured
from hooks.host.exclusive_use import Exclusive, exclusive
from hooks.host.frozen_parts import held, own_attention, plain_attention, record_held, unknown_attention
from hooks.host.gguf import config_of
from hooks.host.hold import ENTRY, Hold, HoldLike, check_hold, check_layer, holding, module, modules, parts_held
from hooks.host.host import CACHE, Host, execution_device, fingerprint, tap
from hooks.host.tokens import Batch, Prompt, Prompts, is_one, listed

__all__ = [
    "CACHE",
    "ENTRY",
    "Batch",
    "Exclusive",
    "Hold",
    "HoldLike",
    "Host",
    "Precision",
    "Prompt",
    "Prompts",
    "check_hold",
    "check_layer",
    "choose_precision",
    "computes_in",
    "computing",
    "config_of",
    "exclusive",
    "execution_device",
    "fingerprint",
    "held",
    "holding",
    "is_half",
    "is_one",
    "listed",
    "measured",
    "module",
    "modules",
    "own_attention",
    "parts_held",
    "plain_attention",
    "record_held",
    "tap",
    "unknown_attention",
]
