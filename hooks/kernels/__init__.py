"""Numbers alone: deterministic TopK, sparse decoding, products with rows of a table."""
