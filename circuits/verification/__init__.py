"""Predictions of a graph against measurements; edges taken apart by head."""
