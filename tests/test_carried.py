"""What a target passes through at every site: sums, shares, words, and how much of a difference is explained."""

import numpy as np
import pytest

from circuits import Graph, trace
from circuits.building import settle
from circuits.cli import main
from circuits.graph import carried, least_site, warning
from hooks import UserError

PAIR = "fact: the capital of the state containing Miami is"


@pytest.fixture(params=[None, "other"])
def graph(request, model, odd, prompt) -> Graph:
    other = None if request.param is None else "w9 w2 w3 w4 w5 w8" if model is odd else PAIR
    return trace(model, prompt, counterfactual=other, sample=0, max_nodes=40, node_threshold=1.0, edge_threshold=1.0)


def test_parts_of_a_site_are_the_scores_of_its_nodes(graph):
    frame = graph.nodes_frame()
    for site in graph.meta["sites"]:
        here = frame[frame["layer"] == site["layer"]].groupby("kind")["score"].sum()
        for name, kinds in (("features", ("feature", "rest")), ("errors", ("error",)), ("biases", ("bias",))):
            assert site[name] == pytest.approx(sum(here.get(kind, 0.0) for kind in kinds), rel=1e-6, abs=1e-9)
        assert sum(site["share"].values()) == pytest.approx(1)


def test_parts_of_a_site_sum_to_the_gradient_times_what_the_site_holds(model, odd, prompt):
    """Features, error and bias are the whole stream: their scores sum to the gradient along it, or along its change."""
    for other in (None, "w9 w2 w3 w4 w5 w8" if model is odd else PAIR):
        setting = settle(model, prompt, counterfactual=other)
        graph = trace(model, prompt, counterfactual=other, sample=0, max_nodes=20)
        for site in graph.meta["sites"]:
            moved = setting.recording.layers[site["layer"]].target[0].double()
            if other is not None:
                there = setting.counterfactual.layers[site["layer"]]
                missed = setting.recording.layers[site["layer"]].error[0].double() - there.error[0].double()
                moved = moved - there.target[0].double()
                expected = 1 - float(missed.square().sum() / moved.square().sum())
                assert site["difference_explained"] == pytest.approx(expected, abs=1e-9)
            whole = float((setting.scores.gradients[site["layer"]].double().cpu() * moved.cpu()).sum())
            assert site["features"] + site["errors"] + site["biases"] == pytest.approx(whole, rel=1e-4, abs=1e-4)


def test_words_name_the_site_where_features_carry_least():
    def site(layer, features, errors):
        parts = {"features": features, "errors": errors, "biases": 0.0}
        return {"layer": layer, **parts, "share": parts}

    meta = {"sites": [site(1, 0.9, 0.1), site(3, 0.3, 0.7), site(4, 0.4, 0.6)]}
    assert least_site(meta)["layer"] == 3
    assert carried(meta) == "of the target, features carry 30% and errors 70% at layer 3, where features carry least"
    assert carried(meta | {"counterfactual": {}}).startswith("of the difference,")
    assert warning(meta).startswith("errors carry most of what is explained at layers 3, 4:")
    assert warning({"sites": [site(1, 0.9, 0.1)]}) is None
    assert carried({}) is warning({}) is None


def test_the_terminal_and_the_picture_say_it(tmp_path, capsys):
    out, picture = str(tmp_path / "g.safetensors"), str(tmp_path / "g.svg")
    line = ["trace", "fact: the capital of the state containing Dallas is", "--out", out, "--sample", "0"]
    assert main(line) == 0
    assert "where features carry least" in capsys.readouterr().out
    assert main(["export", out, "--format", "svg", "--out", picture]) == 0
    assert "where features carry least" in (tmp_path / "g.svg").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "damage",
    [{"layer": -1}, {"features": "much"}, {"errors": float("nan")}, {"share": {"features": 1.0}}, {"share": 3}],
)
def test_damaged_shares_are_refused(odd, tmp_path, damage):
    graph = trace(odd, "w1 w2 w3", sample=0, max_nodes=5)
    site = graph.meta["sites"][0] | damage
    with pytest.raises(UserError):
        graph.with_meta(sites=[site]).save(tmp_path / "g")
    assert np.isfinite(graph.meta["sites"][0]["features"])
