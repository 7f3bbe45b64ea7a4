"""Threads that share a model: every result equals, bit for bit, that of the same call alone."""

import random
import sys
import threading
from typing import Any

from _models import main, small_model

from circuits import trace
from hooks import Ablate, Clamp, HookedModel

THREADS = 8
PROMPTS = ["w1 w2 w3 w4", "w9 w8 w7", "w5 w6 w1 w1 w2"]


def call(model: HookedModel, kind: str, number: int) -> Any:
    """One of several calls, as something that can be compared."""
    prompt, plan = PROMPTS[number % 3], [Ablate(f"L1/{number % 24}"), Clamp(f"L0/{number % 23}@1", 2.0)]
    if kind == "run":
        return model.run(prompt, plan).logits.tolist()
    if kind == "hold":
        return model.run(prompt, plan, hold=("attention", "norms")).logits.tolist()
    if kind == "generate":
        return model.generate([prompt, PROMPTS[0]], plan, max_new_tokens=3)[0].logits.tolist()
    if kind == "stream":
        return [token.logprob for token in model.stream(prompt, plan, max_new_tokens=3)]
    if kind == "sweep":
        return model.sweep(prompt, layers=[1]).table.to_csv()
    if kind == "effects":
        return model.effects(prompt, plan).total
    if kind == "swap":
        return model.swap(prompt).effect.kl
    if kind == "record":
        return model.record(prompt).layers[1].acts.values.tolist()
    graph = trace(model, prompt, max_nodes=12, sample=4, progress=False)
    return graph.to_networkx().number_of_edges(), graph.meta["verification"]


KINDS = ("run", "run", "hold", "generate", "stream", "sweep", "effects", "swap", "record", "trace")


def measure(count: int, seed: int) -> dict[str, Any]:
    """`count` calls on each of eight threads, in an order of its own, compared with the same calls one by one."""
    model, draw = small_model(), random.Random(seed)
    work = [[(draw.choice(KINDS), draw.randrange(24)) for _ in range(count)] for _ in range(THREADS)]
    alone = {job: call(model, *job) for jobs in work for job in jobs}
    wrong: list[str] = []

    def run(jobs: list[tuple[str, int]]) -> None:
        for job in jobs:
            try:
                if call(model, *job) != alone[job]:
                    wrong.append(f"{job}: another result")
            except Exception as error:
                wrong.append(f"{job}: {type(error).__name__}: {error}")

    threads = [threading.Thread(target=run, args=(jobs,)) for jobs in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {"count": count * THREADS, "failed": len(wrong), "wrong": sorted(set(wrong))[:10]}


if __name__ == "__main__":
    sys.exit(main(measure, "Threads that share a model.", 100))
