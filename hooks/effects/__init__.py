"""Many edits of one prompt, measured: sweeps, effects along paths, and what rounding does to them."""
