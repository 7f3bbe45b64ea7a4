"""Token → feature edges where the first cut is the embedding: the same under every rule.

There a token node *is* the whole stream, and the exact derivative behind a norm along the stream itself is zero,
since scaling x changes nothing. So the encoder's norm is held at its value, which is the right linearisation for
replacing a whole position, and the one token explains everything but the encoder's bias.
"""

import torch
import torch.nn.functional as F  # noqa: N812

from circuits.attribution import LocalRun, Rows
from hooks.kernels import working_dtype


def token_rows(run: LocalRun) -> Rows:
    """All edges into a first cut that is the embedding itself."""
    cut = run.cuts[0]
    transcoder = cut.transcoder
    dtype = working_dtype(transcoder.W_enc)
    x, rows = run.embedding[cut.pos].to(dtype), transcoder.W_enc[cut.feature].to(dtype)
    if transcoder.norm_weight is not None:
        x = F.layer_norm(x, (transcoder.d_model,), transcoder.norm_weight.to(dtype), eps=transcoder.norm_eps)
    contribution = (x * rows).sum(-1)
    weights = x.new_zeros(len(cut.pos), len(run.embedding) + 1)  # the last column: no blocks, no bias
    weights[torch.arange(len(cut.pos)), cut.pos] = contribution
    return Rows(run.target_rows(0), run.source_rows(0), weights, contribution)
