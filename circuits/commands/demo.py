"""`circuits demo`: tell the story and write the report and the circuit."""

import argparse
import time
from dataclasses import asdict

from circuits.commands._options import settle
from circuits.commands._output import Result, say, show
from circuits.commands._places import check_places
from circuits.demo import PICTURES, Exam, report_markdown, report_terminal, tell
from hooks.files import write_text
from hooks.model import HookedModel


def run(args: argparse.Namespace) -> Result:
    """Tell the story and write the report and the circuit."""
    kinds = {"report.md": "report", **PICTURES}
    check_places(args.force, [(args.out / name, kind) for name, kind in kinds.items()])
    settle("demo")
    started = time.perf_counter()
    say("measuring; about half a minute on two cores")
    model = HookedModel.load("demo", args.transcoders)
    story = tell(Exam.of(model), args.out, lambda text: say(f"  {text} …"))
    seconds = time.perf_counter() - started
    write_text(args.out / "report.md", report_markdown(story, seconds))
    files = [*story.files, args.out / "report.md"]
    show(args, report_terminal(story) + f"written to {args.out}/: {', '.join(path.name for path in files)}")
    return {
        "prompt": story.prompt,
        "two_hop": asdict(story.two_hop),
        "swap_success": story.swap.success,
        "control_success": max(story.swap.third_state, story.swap.random),
        "controls": {"third_state": story.swap.third_state, "random": story.swap.random},
        "ablation": asdict(story.ablation),
        "fvu": [site.fvu for site in story.quality],
        "verification": story.graph.meta["verification"],
        "files": [str(path) for path in files],
        "seconds": seconds,
    }
