"""What the embedded default shows, measured through the public engine: the protocols, the story, the report."""
