"""Sweeps: what staggered passes of thousands of variants measure is what one whole pass per variant measures."""

import itertools
import json
from functools import cache

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_interventions import KINDS, inactive, strongest
from worlds import left_behind, random_hooked, random_qwen2, random_transcoder, word_tokenizer

from circuits.cli import main
from circuits.plots import sweep_plot
from hooks import Ablate, Add, Clamp, HookedModel, Scale, UserError
from hooks.effects import Change, active_features, changed, doses, pairs
from hooks.effects.staggered import StaggeredPass
from hooks.errors import AddressError, InterventionError, OutputError, PromptError, TargetError
from hooks.host.frozen_parts import held, record_held
from hooks.sites import SiteSpec

TEXT = "w1 w2 w3 w4 w5 w6"
EXACT = 1e-4  # of logits of order 10 in fp32: other products, other order of sums


def one_by_one(model: HookedModel, prompt, groups, position: int = -1) -> list[float]:
    """One whole pass per group, the metric held at the clean run's two best tokens."""
    return [model.run(prompt, group).effect(pos=position).delta for group in groups]


def close(found, expected) -> None:
    torch.testing.assert_close(torch.tensor(list(found)), torch.tensor(expected), rtol=EXACT, atol=EXACT)


def test_every_layer_and_position_as_in_whole_passes(model, prompt):
    length = model.host.batch([prompt]).lengths[0]
    kinds = itertools.cycle(make for make, _ in KINDS.values())
    groups = [
        [next(kinds)(f"L{layer}/{feature}@{pos}")]
        for layer in model.store.layers
        for pos in range(length)
        for feature in (strongest(model, prompt, layer, pos)[0], inactive(model, prompt, layer, pos))
    ]
    found = model.sweep(prompt, groups)
    close(found.table["delta"], one_by_one(model, prompt, groups))
    assert 0 < found.noise_floor < EXACT  # unchanged rows may agree bit for bit; rounding is still there


@pytest.mark.parametrize("tokens_at_once", [None, 8])
def test_groups_and_pairs_across_layers_and_positions(model, prompt, tokens_at_once):
    """Later layers of a group see what earlier ones changed; batches of any size give the same."""
    a, b = strongest(model, prompt, 0, 1)[0], strongest(model, prompt, 3, -1)[0]
    single = [[Ablate(f"L0/{a}@1")], [Ablate(f"L3/{b}@-1")], [Clamp("L1/7@2:4", 2.0)], [Scale(f"L3/{b}", 3.0)]]
    groups = [*single, *pairs(single[:1] + single[2:]), [Add("L0/3", 1.0), Add("L1/3", 1.0), Ablate(f"L3/{b}@-2:")]]
    found = model.sweep(prompt, groups, tokens_at_once=tokens_at_once)
    close(found.table["delta"], one_by_one(model, prompt, groups))
    assert found.passes == 1 if tokens_at_once is None else found.passes > 1


CONVENTIONS = [
    ("resid_pre", "resid_pre"), ("resid_post", "resid_post"), ("resid_mid", "resid_mid"), ("mlp_in", "mlp_out"),
    ("mlp_in", "mlp_out+1"), ("resid_pre", "attn_out"), ("resid_pre", "mlp_out"), ("resid_mid", "resid_post"),
    ("resid_post", "resid_post+1"),
]  # fmt: skip


@cache
def hooked(read: str, write: str) -> HookedModel:
    layers = range(3 if "+" in write else 4)
    reads, writes = SiteSpec.parse(read), SiteSpec.parse(write)
    coders = [random_transcoder(n, 40, read=reads.at(n), write=writes.at(n)) for n in layers]
    return HookedModel.from_model(random_qwen2(), word_tokenizer(), coders)


changes = st.tuples(
    st.integers(0, 2), st.integers(0, 95), st.sampled_from(["0", "2", "-1", "1:4", "all", "3:", "{0,3}"]),
    st.sampled_from(["ablate", "clamp", "scale", "add"]),
)  # fmt: skip


@pytest.mark.parametrize(("read", "write"), CONVENTIONS)
@settings(max_examples=12, deadline=None)
@given(drawn=st.lists(st.lists(changes, min_size=1, max_size=3, unique_by=lambda c: c[:2]), min_size=1, max_size=4))
def test_any_groups_under_any_convention(read, write, drawn):
    model = hooked(read, write)
    groups = [[KINDS[kind][0](f"L{layer}/{feature}@{at}") for layer, feature, at, kind in group] for group in drawn]
    close(model.sweep(TEXT, groups).table["delta"], one_by_one(model, TEXT, groups))


@pytest.mark.parametrize("position", [0, 2, -1])
def test_every_metric_at_any_position(model, prompt, position):
    groups = [[Clamp("L1/7", 3.0)], [Clamp("L0/5@2", 3.0)], [Ablate(f"L1/{strongest(model, prompt, 1, 0)[0]}@0")]]
    found = model.sweep(prompt, groups, pos=position, metrics=["delta_logit", "delta_prob", "kl", "rank"])
    for row, group in zip(found.table.to_dict("records"), groups, strict=True):
        run = model.run(prompt, group)
        effect = run.effect(pos=position)
        before, after = (logits[position].double().log_softmax(-1) for logits in (run.baseline, run.logits))
        assert row["delta_logit"] == pytest.approx(effect.delta_logit, abs=EXACT)
        assert row["delta_prob"] == pytest.approx(effect.delta_prob, abs=1e-5)
        assert row["kl"] == pytest.approx(float((before.exp() * (before - after)).sum()), rel=1e-3, abs=1e-6)
        assert row["rank"] == effect.edited.rank
    standing = model.run(prompt).effect(pos=position)
    assert found.baseline["logit"] == pytest.approx(standing.baseline.logit, abs=1e-6)
    assert found.baseline["metric"] == pytest.approx(standing.metric_before, abs=1e-6)


def test_target_and_against_are_the_users(demo):
    prompt = "fact: the capital of the state containing Dallas is"
    feature = strongest(demo, prompt, 3, 8)[0]
    found = demo.sweep(prompt, [[Ablate(f"L3/{feature}@8")]], target="Austin", against="Albany")
    effect = demo.run(prompt, [Ablate(f"L3/{feature}@8")]).effect("Austin", "Albany")
    assert found.table["delta"][0] == pytest.approx(effect.delta, abs=EXACT)


def test_what_left_padding_gives_the_plain_model(odd):
    """Plain transformers, the prompt left-padded in a batch beside a longer one, a hook at the real token's place."""
    ids = odd.host.tokenize(TEXT)
    pad = 3
    rows = torch.tensor([[0] * pad + ids, odd.host.tokenize("w9 w8 w7 w6 w5 w4 w3 w2 w1")])
    mask = torch.tensor([[0] * pad + [1] * len(ids), [1] * (pad + len(ids))])
    plain = odd.host.model
    first, second = odd.run(TEXT).baseline[-1].topk(2).indices.tolist()
    groups, expected = [], []

    def measured(layer=None, pos=None, vector=None) -> float:
        def add(module, args):
            out = args[0].clone()
            out[0, pad + pos] += vector
            return (out, *args[1:])

        hook = None if layer is None else plain.model.layers[layer].register_forward_pre_hook(add)
        with torch.no_grad():
            logits = plain(input_ids=rows, attention_mask=mask, use_cache=False).logits[0, -1].double()
        if hook is not None:
            hook.remove()
        return float(logits[first] - logits[second])

    clean = measured()
    for layer in odd.store.layers:
        for pos in range(len(ids)):
            feature, activation = strongest(odd, TEXT, layer, pos)
            groups.append([Ablate(f"L{layer}/{feature}@{pos}")])
            expected.append(measured(layer, pos, -activation * odd.store[layer].W_dec[feature]) - clean)
    close(odd.sweep(TEXT, groups).table["delta"], expected)


# -- what is swept ---------------------------------------------------------------------------------------------------


def test_every_active_feature_is_the_default(odd):
    recording = odd.record([TEXT])
    found = odd.sweep(TEXT)
    count = sum(int((layer.acts.values > 0).sum()) for layer in recording.layers.values())
    assert len(found.table) == count == len(active_features(recording))
    some = odd.sweep(TEXT, layers=[1], positions=[-1, 0])
    assert set(some.table["layer"]) == {1}
    assert set(some.table["pos"]) == {0, 5}
    whole = found.table.query("layer == 1 and pos in (0, 5)")
    close(some.table["delta"], whole["delta"].tolist())
    order = found.ranked()["delta"].abs().tolist()
    assert order == sorted(order, reverse=True)


def test_what_a_feature_is_changed_to(odd):
    """mean, resample, scale and set against clamps worked out by hand from dense activations."""
    recording, other = odd.record([TEXT]), odd.record(["w6 w5 w4 w3 w2 w1"])
    both = odd.record(["w6 w5 w4 w3 w2 w1", "w9 w8"])
    address = active_features(recording, [1], [2])[0]
    dense = other.layers[1].acts.dense(96)[0]
    mean = torch.cat([both.layers[1].acts.dense(96)[0], both.layers[1].acts.dense(96)[1, :2]]).mean(0)
    by_hand = [
        (Change("zero"), 0.0),
        (Change("set", 2.5), 2.5),
        (Change("resample", reference=other), float(dense[2, address.feature])),
        (Change("mean", reference=both), float(mean[address.feature])),
    ]
    for change, value in by_hand:
        [group] = changed([address], change, recording)
        assert group[0].affine == pytest.approx((0.0, value), abs=1e-6)
    assert changed([address], Change("scale", 2.0), recording)[0][0].affine == (2.0, 0.0)
    resampled = Change("resample", reference=other)
    groups = changed(active_features(recording, [1]), resampled, recording)
    close(odd.sweep(TEXT, layers=[1], change=resampled).table["delta"], one_by_one(odd, TEXT, groups))


def test_inactive_features_and_later_positions_have_no_effect_and_cost_no_run(odd):
    groups = [[Ablate(f"L1/{inactive(odd, TEXT, 1, 2)}@2")], [Clamp("L1/7@4", 3.0)]]
    found = odd.sweep(TEXT, groups, pos=3)
    assert found.table["delta"].tolist() == [0.0, 0.0]
    assert found.passes == 0
    assert found.table["resolved"].all()


def test_a_dose_curve(demo):
    prompt = "fact: the capital of the state containing Dallas is"
    groups = doses("L3/99@8", [0.0, 1.0, 4.0])
    found = demo.sweep(prompt, groups)
    close(found.table["delta"], one_by_one(demo, prompt, groups))
    assert (
        found.table["name"].tolist() == ["L3/99@8 = 0", "L3/99@8 = 1", "L3/99@8 = 4"]
        or "L3/99@8" in found.table["name"][0]
    )


# -- precision and memory ------------------------------------------------------------------------------------------


def test_unchanged_rows_give_the_noise_floor_in_half_precision():
    """In bf16 a packed pass rounds otherwise than a whole one: effects are told from that by the floor."""
    model = random_hooked(None, dtype=torch.bfloat16)
    exact = random_hooked(None)
    for plain, half in zip(exact.host.model.parameters(), model.host.model.parameters(), strict=True):
        plain.data.copy_(half.data.float())
    found = model.sweep(TEXT, layers=[0, 1])
    assert found.noise_floor > 0
    small = found.table[~found.table["resolved"]]
    assert (small["delta"].abs() <= found.noise_floor).all()
    strong = found.ranked().head(10)
    groups = [[Clamp(name.split(" ")[0], 0.0)] for name in strong["name"]]
    whole = torch.tensor(one_by_one(model, TEXT, groups))
    assert torch.corrcoef(torch.stack([torch.tensor(strong["delta"].tolist()), whole]))[0, 1] > 0.95


def test_when_memory_runs_out_the_batch_is_halved_and_the_numbers_are_the_same(odd, monkeypatch):
    plain = odd.sweep(TEXT)
    through, sizes = StaggeredPass._through, []

    def tight(self, x, block):
        sizes.append(len(x))
        if len(x) > 200:
            raise torch.OutOfMemoryError("simulated")
        return through(self, x, block)

    monkeypatch.setattr(StaggeredPass, "_through", tight)
    found = odd.sweep(TEXT, tokens_at_once=4096)
    assert max(sizes) > 200 >= sizes[-1]
    assert found.passes > plain.passes
    close(found.table["delta"], plain.table["delta"].tolist())


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("x"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_when_nothing_fits_the_message_says_so(odd, monkeypatch, error):
    def full(self, x, block):
        raise error

    monkeypatch.setattr(StaggeredPass, "_through", full)
    with pytest.raises(UserError, match="memory does not hold"):
        odd.sweep(TEXT)
    assert not left_behind(odd.host.model)


def test_other_failures_are_not_taken_for_a_lack_of_memory(odd, monkeypatch):
    def broken(self, x, block):
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(StaggeredPass, "_through", broken)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        odd.sweep(TEXT)


def test_the_plain_model_is_as_it_was(odd):
    before = odd.run(TEXT).baseline
    odd.sweep(TEXT, layers=[0])
    assert odd.host.model.config._attn_implementation == "sdpa"
    assert torch.equal(odd.run(TEXT).baseline, before)


# -- files, pictures, the command line -----------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".json"])
def test_a_saved_table_is_the_table(odd, tmp_path, suffix):
    found = odd.sweep(TEXT, layers=[1])
    path = tmp_path / f"sweep{suffix}"
    found.save(path)
    read = {".csv": pd.read_csv, ".parquet": pd.read_parquet, ".json": pd.read_json}[suffix](path)
    assert read["name"].tolist() == found.table["name"].tolist()
    close(read["delta"], found.table["delta"].tolist())
    assert [child.name for child in tmp_path.iterdir()] == [path.name]


def test_the_picture_is_the_same_twice(odd, tmp_path):
    found = odd.sweep(TEXT)
    for name in ("a.svg", "b.svg"):
        sweep_plot(found, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert "strongest single effect" in (tmp_path / "a.svg").read_text()
    with pytest.raises(UserError, match="no map"):
        sweep_plot(odd.sweep(TEXT, [[Clamp("L1/7", 1.0)]]), tmp_path / "c.svg")


PROMPT = "fact: the capital of the state containing Dallas is"


def test_the_command_gives_what_the_method_gives(demo, tmp_path, capsys):
    out, plot = tmp_path / "effects.csv", tmp_path / "effects.png"
    arguments = ["--layers", "3", "--positions", "-1", "8", "--out", str(out), "--plot", str(plot)]
    assert main(["sweep", PROMPT, "--json", *arguments]) == 0
    result = json.loads(capsys.readouterr().out)
    table = demo.sweep(PROMPT, layers=[3], positions=[-1, 8]).table
    assert [row["name"] for row in result["rows"]] == table["name"].tolist()
    assert {"layer", "pos", "feature", "activation", "delta"} <= set(result["rows"][0])
    close([row["delta"] for row in result["rows"]], table["delta"].tolist())
    assert result["target"]["token"] == " Austin"
    assert result["way"] == "suffix"
    assert result["noise_floor"] < EXACT
    assert len(pd.read_csv(out)) == len(table)
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_groups_pairs_and_doses_on_the_command_line(demo, capsys):
    assert main(["sweep", PROMPT, "--json", "--group", "L3/99@8+L1/208@8", "L0/637@8", "--pairs"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    groups = [[Ablate("L3/99@8"), Ablate("L1/208@8")], [Ablate("L0/637@8")]]
    close([row["delta"] for row in rows], one_by_one(demo, PROMPT, [*groups, [*groups[0], *groups[1]]]))
    assert rows[0]["layer"] is None
    assert main(["sweep", PROMPT, "--dose", "L3/99@8", "--values", "0:4:3"]) == 0
    assert "= 2" in capsys.readouterr().out


BAD = [
    (["--dose", "L3/99@8"], "belong together"),
    (["--values", "1,2"], "belong together"),
    (["--dose", "L3/99@8", "--values", "1,nan"], "not a finite number"),
    (["--dose", "L3/99@8", "--values", "1:2"], "cannot read the grid"),
    (["--dose", "L3/99@8", "--values", "x1,x2"], "are no activations"),
    (["--dose", "L3/99@8", "--values", "1,2", "--pairs"], "says all"),
    (["--group", "L3/99@8", "--layers", "3"], "each say"),
    (["--pairs"], "needs --group"),
    (["--group", "L3/99@88"], "does not occur"),
    (["--group", "L9/99@8"], "no transcoder"),
    (["--group", "L3/99@8+L3/99@8"], "two interventions act on the same"),
    (["--layers", "9"], "no transcoder"),
    (["--positions", "40"], "does not occur"),
    (["--at", "40"], "does not occur"),
    (["--change", "set"], "takes a value"),
    (["--change", "zero", "--value", "1"], "takes no value"),
    (["--change", "mean"], "takes reference prompts"),
    (["--change", "resample", "--reference", "fact: the capital of Texas is"], "same number of tokens"),
    (["--target", "Austin", "--against", "Austin"], "same token"),
    (["--out", "effects.xlsx"], "table format"),
    (["--plot", "effects.gif"], "picture format"),
]


@pytest.mark.parametrize(
    ("arguments", "message"), BAD, ids=lambda value: "-".join(value) if isinstance(value, list) else ""
)
def test_bad_input_ends_with_status_2(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["sweep", PROMPT, *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert not captured.out
    assert not list(tmp_path.iterdir())


def test_bad_calls_are_refused(odd, tmp_path):
    with pytest.raises(UserError, match="nothing to sweep"):
        odd.sweep(TEXT, [])
    with pytest.raises(UserError, match="unknown metric"):
        odd.sweep(TEXT, metrics=["perplexity"])
    with pytest.raises(AddressError, match="no feature"):
        odd.sweep(TEXT, [[Ablate("L1/99999")]])
    with pytest.raises(InterventionError, match="empty"):
        doses("L1/7", [])
    with pytest.raises(InterventionError, match="finite"):
        doses("L1/7", [float("inf")])
    with pytest.raises(InterventionError, match="unknown kind"):
        Change("average")
    with pytest.raises(PromptError, match="same number of tokens"):
        odd.sweep(TEXT, change=Change("resample", reference=odd.record(["w1 w2"])))
    with pytest.raises(TargetError):
        odd.sweep(TEXT, target="no such word")
    with pytest.raises(OutputError, match="table format"):
        odd.sweep(TEXT, layers=[1]).save(tmp_path / "x.txt")
    assert not list(tmp_path.iterdir())
    recording = odd.record([TEXT], [1])
    with pytest.raises(UserError, match="was not recorded"):
        active_features(recording, [0])
    clean = record_held(odd.host, odd.host.batch([TEXT]), ["attention"])
    with held(odd.host, clean), pytest.raises(UserError, match="cannot be held"):
        odd.sweep(TEXT)
