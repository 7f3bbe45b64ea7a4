"""Token → feature edges of a group that reads the embedding: the same under every rule.

There a token node *is* the whole stream. The exact derivative after a norm, along the stream itself, is zero, since
scaling x changes nothing. So the encoder's norm is held at its value. This is the right linearisation for replacing a
whole position, and the single token explains everything except the encoder's bias.
"""

import torch

from circuits.blocks import Rule
from circuits.edges.metric_ends import constants, encoder_gradient
from circuits.edges.run import LocalRun, Rows
from hooks.kernels import working_dtype

HELD = Rule(norms="frozen", attention="frozen", gate="frozen")


def token_rows(run: LocalRun, number: int) -> Rows:
    """All edges into a group that reads the embedding."""
    everything = slice(None)
    cut = run.cuts[number]
    dtype = working_dtype(cut.transcoder.W_enc)
    clean = run.recording.layers[cut.layer].read[0][cut.pos].to(dtype)
    rows = cut.transcoder.W_enc[cut.feature].to(dtype)
    gradients = encoder_gradient(cut.transcoder, rows, clean, HELD)
    own = (gradients * run.embedding.to(gradients)[cut.pos]).sum(-1)
    constant = constants(run, number, everything).to(own)
    weights = own.new_zeros(len(own), len(run.embedding) + 1)
    weights[torch.arange(len(own), device=own.device), cut.pos] = own
    weights[:, -1] += constant
    return Rows(run.target_rows(number), run.source_rows(number), weights, (gradients * clean).sum(-1) + constant)
