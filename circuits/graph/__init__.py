"""The graph, and everything that is computed from it alone."""
