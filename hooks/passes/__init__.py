"""One forward pass: record it, swap sites for reconstructions, edit features."""
