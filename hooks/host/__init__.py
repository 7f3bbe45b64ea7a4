"""The language model: where hooks attach, who uses it, what is read from it, and what can be held still in it."""
