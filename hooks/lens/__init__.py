"""TransformerLens, both ways: its hook functions as our edits, our edits as its hooks."""
