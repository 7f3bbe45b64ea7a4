"""Why does the model do it? Attribution graphs that carry their own verification."""
