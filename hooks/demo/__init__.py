"""The embedded default: a tiny trained Qwen2 that composes two hops, and its two sets of transcoders."""

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
TRANSCODERS = {"demo": WEIGHTS / "transcoders" / "demo", "demo-dense": WEIGHTS / "transcoders" / "demo-dense"}
PROMPT = "fact: the capital of the state containing Dallas is"
