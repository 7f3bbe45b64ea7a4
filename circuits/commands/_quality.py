"""`circuits check --quality`: how good a set is on a model and a text."""

import argparse

from circuits.commands._options import load
from circuits.commands._output import Result, finish, say, show, table
from circuits.plots import quality_plot
from hooks.check import QualityReport, Texts, check_report_suffix, quality, rows_of
from hooks.host import Host, Prompt

SITES = ("swapped", "fvu", "fvu_calm", "fvu_normed", "cosine", "norm_ratio", "l0", "dead", "always_on", "features")
LOSSES = ("loss", "stored_loss")
PREDICTIONS = ("swapped", "delta_ce", "ce_ablated", "ce_score", "kl", "kl_ablated", "kl_score", "top1_agreement")


def run(args: argparse.Namespace) -> Result:
    """Load, measure, write; --plot is a picture of FVU, L0 and cost by layer.

    Raises:
        UserError: a file cannot be written.
    """
    if args.out:
        check_report_suffix(args.out)
    texts = Texts.built_in(args.model == "demo") if args.text is None else Texts.of_file(args.text)
    model = load(args, args.layers)
    prompts = _prompts(model.host, texts, args.tokens)
    say(f"{texts.name}: {sum(map(len, prompts)):,} tokens in {len(prompts)} rows; {len(model.store)} layers")
    report = quality(model, prompts, progress=not args.json)
    if args.out:
        report.save(args.out)
    show(args, _text(report))
    result = {"text": texts.name, **report.to_dict()}
    return finish(result, args.plot, lambda path: quality_plot(report, path))


def _prompts(host: Host, texts: Texts, tokens: int) -> list[Prompt]:
    """The rows that calibration measures on too."""
    return [
        row[:length].tolist()
        for batch in rows_of(host, texts.texts, tokens).batches
        for row, length in zip(batch.ids, batch.lengths, strict=True)
    ]


def _text(report: QualityReport) -> str:
    frame = report.table
    losses = LOSSES if frame["stored_loss"].notna().any() else LOSSES[:1]
    every = report.together["all"]
    mean = every.ablated.ce - report.clean_ce
    lines = [
        f"reconstruction on {report.tokens:,} tokens (dead and always on: at none or at all of these)",
        table(frame[[*SITES, *losses]]),
        f"\npredictions, cross-entropy {report.clean_ce:.4g} nats per token; sites swapped, error dropped:",
        table(frame[list(PREDICTIONS)]),
        f"\nall {len(every.layers)} sites swapped: {every.delta_ce:+.3g} nats per token, KL {every.swapped.kl:.3g}, "
        f"top-1 agreement {every.swapped.top1_agreement:.1%}; at their means {mean:+.3g} nats",
    ]
    return "\n".join(lines)
