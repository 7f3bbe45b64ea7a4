"""Allowed values of arguments that are words, with units and defaults. Importing this file loads no library.

The options of the command line and their help are made from these, so `circuits --help` needs neither torch nor
transformers. The modules that act on a word import it from here.
"""

ERROR_MODES = ("live", "frozen", "zero")
MASK_MODES = ("frozen", "live")
PRECISIONS = ("exact", "native")
SKIPS = ("special", "sinks")
ENGINES = ("static", "dynamic")
CHANGES = ("zero", "mean", "resample", "scale", "set")
METRICS = ("delta", "delta_logit", "delta_prob", "kl", "rank")

TABLES = (".parquet", ".csv", ".json")
REPORTS = (".csv", ".json", ".parquet")

CHECK_TOKENS = 4096
"""Tokens that a set's sites are measured on."""

TRAIN_TOKENS = 1_000_000
"""Tokens that a set is trained on."""

DEVICES = {"rtx4090": 24, "a100-40": 40, "a100-80": 80, "h100": 80, "h200": 141}
"""GB by name. A card's GB count as 10^9 bytes; what it has beyond (up to 7 %) is for driver, context and fragments."""

ITEM = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}
"""Bytes per number, by precision."""
