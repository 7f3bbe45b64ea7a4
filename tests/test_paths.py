"""Effects along paths: the sum over chains of modules multiplied out by hand, and models whose wiring is known."""

import itertools
import math

import pytest
import torch
from torch import Tensor
from worlds import random_hooked, random_qwen2, random_transcoder, word_tokenizer

from hooks import Ablate, Add, Clamp, HookedModel, Scale, UserError
from hooks.effects import path_effects
from hooks.host import Hold, module, modules, tap
from hooks.host.frozen_parts import PARTS, record_held
from hooks.sites import Site

TEXT = "w1 w2 w3 w4 w5"
LAST = 4
TARGET, AGAINST = 7, 11
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


@pytest.fixture(scope="module")
def affine() -> HookedModel:
    """Three layers in fp64: held norms, patterns and gates compute in it throughout."""
    return random_hooked(missing=None, layers=3, heads=4, kv_heads=2, d_model=32, tied=False, dtype=torch.float64)


def metric(logits: Tensor) -> float:
    return float(logits[TARGET].double() - logits[AGAINST].double())


def change(model: HookedModel, plan: list, hold) -> float:
    run = model.run(TEXT, plan, hold=hold)
    return metric(run.logits[-1]) - metric(run.baseline[-1])


class ByHand:
    """The three-layer model with its parts held, as matrices taken from the weights."""

    def __init__(self, model: HookedModel):
        self.model, self.host = model, model.host
        self.clean = record_held(model.host, model.host.batch([TEXT]))

    def scaled(self, name: str, delta: Tensor) -> Tensor:
        return self.host.decoder.get_submodule(name).weight * delta * self.clean.inverse_rms[name][0]

    def module(self, site: Site, delta: Tensor) -> Tensor:
        """Change of a module's output for a change [pos d_model] of the stream in front of it."""
        place, block = f"layers.{site.layer}", self.host.layers[site.layer]
        if site.name == "mlp_out":
            normed, gate = (
                self.scaled(f"{place}.post_attention_layernorm", delta),
                self.clean.gates[f"{place}.mlp.act_fn"],
            )
            return (gate[0] * (normed @ block.mlp.up_proj.weight.T)) @ block.mlp.down_proj.weight.T
        value = (self.scaled(f"{place}.input_layernorm", delta) @ block.self_attn.v_proj.weight.T).unflatten(
            -1, (2, 16)
        )
        pattern = self.clean.patterns[f"{place}.self_attn"][0]
        heads = [pattern[head] @ value[:, head // 2] for head in range(4)]
        return torch.cat(heads, dim=-1) @ block.self_attn.o_proj.weight.T

    def chain(self, delta: Tensor, sites: tuple[Site, ...]) -> float:
        """Through exactly these modules, one after the other, then along the stream to the logits."""
        for site in sites:
            delta = self.module(site, delta)
        logits = self.scaled("norm", delta)[-1] @ self.host.model.lm_head.weight.T
        return float(logits[TARGET] - logits[AGAINST])


def shift(model: HookedModel, layer: int, feature: int, pos: int, amount: float) -> tuple[list, Tensor]:
    """An `Add`, and the change of the stream that it is."""
    delta = torch.zeros(LAST + 1, model.host.d_model, dtype=torch.float64)
    delta[pos] = amount * model.store[layer].W_dec[feature].double()
    return [Add((layer, pos, feature), amount)], delta


def subsets(sites: list[Site]):
    return (part for size in range(len(sites) + 1) for part in itertools.combinations(sites, size))


# -- all paths -------------------------------------------------------------------------------------------------------


def test_every_set_of_open_modules_carries_the_chains_that_lie_in_it(affine):
    """64 sets of open modules of the running model, against 64 products of matrices."""
    plan, delta = shift(affine, 0, 5, LAST, 1.5)
    hand, every = ByHand(affine), modules(3)
    chains = {sites: hand.chain(delta, sites) for sites in subsets(every)}
    assert min(abs(value) for value in chains.values()) > 1e-6
    for opened in subsets(every):
        along = sum(value for sites, value in chains.items() if set(sites) <= set(opened))
        hold = Hold(PARTS, attn_out="all", mlp_out="all", open=opened)
        assert change(affine, plan, hold) == pytest.approx(along, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("pos", [1, LAST])
def test_effects_take_the_total_apart(affine, pos):
    plan, delta = shift(affine, 0, 5, pos, 1.5)
    hand, every = ByHand(affine), modules(3)
    out = affine.effects(TEXT, plan, TARGET, AGAINST, hold=PARTS, receivers="all")
    chains = {sites: hand.chain(delta, sites) for sites in subsets(every)}
    assert out.direct == pytest.approx(chains[()], rel=1e-9, abs=1e-9)
    assert out.total == pytest.approx(sum(chains.values()), rel=1e-9, abs=1e-9)
    assert list(out.through) == every
    for site, value in out.through.items():
        assert value == pytest.approx(chains[site,], rel=1e-9, abs=1e-9)
    longer = sum(value for sites, value in chains.items() if len(sites) > 1)
    assert out.remainder == pytest.approx(longer, rel=1e-9, abs=1e-9)
    assert abs(longer) > 1e-2
    assert out.indirect == out.total - out.direct


def test_only_modules_behind_the_edit_are_receivers(affine):
    behind = affine.effects(TEXT, [Add("L1/5@1", 1.0)], receivers="all").through
    assert list(behind) == modules(3)[2:]


def test_with_all_parts_held_effects_are_linear_in_the_edit_and_without_they_are_not(affine):
    first, second = [Add("L0/5@1", 1.0)], [Add("L1/9@3", 2.0)]
    twice, both = [Add("L0/5@1", 2.0)], [*first, *second]

    def logits(plan, hold):
        run = affine.run(TEXT, plan, hold=hold)
        return run.logits - run.baseline

    for hold, linear in ((PARTS, True), (("attention", "norms"), False), ("gates", False)):
        one, other = logits(first, hold), logits(second, hold)
        gap = (logits(twice, hold) - 2 * one).abs().max(), (logits(both, hold) - one - other).abs().max()
        assert (max(gap) < 1e-9) if linear else (min(gap) > 1e-3)


# -- the direct path --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hold", ["nothing", "norms"])
def test_the_direct_effect_is_the_unembedding_behind_the_final_norm(affine, hold):
    plan, delta = shift(affine, 1, 9, LAST, 3.0)
    last = Site("resid_post", 2)
    stream = affine.host.capture(affine.host.batch([TEXT]), [last])[1][last][0, LAST]
    norm, eps = affine.host.decoder.norm.weight, affine.host.decoder.norm.variance_epsilon

    def logits(x, scaled_like):
        scale = (scaled_like.square().mean() + eps) ** -0.5
        return (norm * x * scale) @ affine.host.model.lm_head.weight.T

    edited = stream + delta[LAST]
    after = logits(edited, stream if hold == "norms" else edited)
    expected = metric(after) - metric(logits(stream, stream))
    out = affine.effects(TEXT, plan, TARGET, AGAINST, hold=hold)
    # live norms of transformers round to fp32 inside
    assert out.direct == pytest.approx(expected, rel=1e-9, abs=1e-9 if hold == "norms" else 1e-5)
    assert abs(out.direct - out.total) > 1e-2
    assert out.through == {}


def test_at_another_token_nothing_is_direct(affine):
    out = affine.effects(TEXT, [Ablate("L0/5@1"), Add("L1/9@2", 2.0)], receivers=["attn_out 1", "mlp_out 1"])
    # zero but for the last bits: a processor's library may sum rows of another batch in another order
    assert out.direct == pytest.approx(0, abs=1e-13)
    assert out.through[Site("mlp_out", 1)] == pytest.approx(0, abs=1e-13)
    assert abs(out.through[Site("attn_out", 1)]) > 1e-3


def test_what_is_not_held_is_what_run_measures(model, prompt):
    """The tolerance: rows of a batch of another size round differently."""
    layer = model.store.layers[1]
    feature = int(model.record(prompt).layers[layer].acts.indices[0, -1, 3])
    plan = [Scale((layer, -1, feature), 3.0)]
    truth = model.run(prompt, plan).effect()
    out = model.effects(prompt, plan)
    assert (out.target, out.against) == (truth.target, truth.against)
    assert out.total == pytest.approx(truth.delta, abs=1e-4)
    direct = model.run(prompt, plan, hold=Hold(attn_out="all", mlp_out="all")).effect()
    assert out.direct == pytest.approx(direct.delta, abs=1e-4)


# -- one head ---------------------------------------------------------------------------------------------------------


def one_head() -> HookedModel:
    """Two layers. Only head 1 of layer 0 writes, and it attends evenly: queries are zero."""
    model = random_qwen2(layers=2, heads=2, kv_heads=1, d_model=32, tied=False, dtype=torch.float64)
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.down_proj.weight.zero_()
            block.self_attn.q_proj.weight.zero_()
            block.self_attn.q_proj.bias.zero_()
            block.self_attn.o_proj.weight[:, :16] = 0
        model.model.layers[1].self_attn.o_proj.weight.zero_()
    coders = [random_transcoder(layer, 32, dtype=torch.float64) for layer in range(2)]
    return HookedModel.from_model(model, word_tokenizer(), coders)


def moved_by_hand(model: HookedModel, delta: Tensor, pos: int) -> Tensor:
    """The head's share of a change of the stream at `pos`, as it arrives at the last token; its norm held."""
    block = model.host.layers[0]
    stream = model.host.model.get_input_embeddings().weight[model.host.batch([TEXT]).ids[0, pos]]
    normed = block.input_layernorm.weight * delta / math.sqrt(float(stream.square().mean()) + 1e-5)
    value = block.self_attn.v_proj.weight @ normed
    return block.self_attn.o_proj.weight[:, 16:] @ value / (LAST + 1)


def test_a_path_through_the_one_head_that_writes():
    """In front of the receiver the head adds v to the last token's stream; the pre-activation is then the encoder's."""
    model, pos, receiver = one_head(), 1, "L1/7@-1"
    amount = 4.0
    delta = amount * model.store[0].W_dec[5]
    moved = moved_by_hand(model, delta, pos)
    arrived = model.record(TEXT).layers[1].read[0, LAST]
    expected = [float(model.store[1].preactivations(x)[7]) for x in (arrived, arrived + moved)]
    opened = model.path_effect(TEXT, Add((0, pos, 5), amount), receiver, ["attn_out 0"], hold="norms")
    assert opened.preactivation_before == pytest.approx(expected[0], abs=1e-6)
    assert opened.preactivation_after == pytest.approx(expected[1], abs=1e-6)
    assert abs(opened.delta_preactivation) > 1e-2
    for through in ("direct", ["mlp_out 0"], []):
        closed = model.path_effect(TEXT, Add((0, pos, 5), amount), receiver, through, hold="norms")
        changes = closed.delta_preactivation, closed.delta_activation, closed.delta
        assert changes == pytest.approx((0, 0, 0), abs=1e-13)
    every = model.path_effect(TEXT, Add((0, pos, 5), amount), receiver, "all", hold="norms")
    assert every.preactivation_after == pytest.approx(opened.preactivation_after, abs=1e-12)


def test_the_one_head_carries_the_whole_effect_on_the_logits():
    model, pos = one_head(), 1
    moved = moved_by_hand(model, 4.0 * model.store[0].W_dec[5], pos)
    last = Site("resid_post", 1)
    stream = model.host.capture(model.host.batch([TEXT]), [last])[1][last][0, LAST]
    normed = model.host.decoder.norm.weight * moved / math.sqrt(float(stream.square().mean()) + 1e-5)
    expected = metric(normed @ model.host.model.lm_head.weight.T)
    out = model.effects(TEXT, [Add((0, pos, 5), 4.0)], TARGET, AGAINST, hold="norms", receivers="all")
    assert out.total == pytest.approx(expected, abs=1e-6)
    assert abs(expected) > 1e-2
    assert (out.direct, out.remainder) == pytest.approx((0, 0), abs=1e-13)
    through = {str(site): value for site, value in out.through.items() if abs(value) > 1e-13}
    assert through == {"attn_out 0": pytest.approx(out.total, abs=1e-13)}


# -- from feature to feature -----------------------------------------------------------------------------------------


def arriving(model: HookedModel, layer: int, plan: list, hold=None) -> Tensor:
    """What layer's transcoder reads at the last token, from the plain machinery."""
    seen: dict = {}
    read = model.store.sites(layer)[0]
    batch = model.host.batch([TEXT])
    model.host.forward(batch, [*model.edits(batch, [plan]), tap(read, seen)])
    return seen[read][0, LAST]


def test_all_paths_are_the_run_itself_and_the_second_run_sets_the_receiver_alone(odd):
    sender, receiver = Add("L0/5@2", 4.0), "L3/7@-1"
    coder = odd.store[3]
    out = odd.path_effect(TEXT, sender, receiver, target=TARGET, against=AGAINST)
    for plan, pre, act in (
        ([], out.preactivation_before, out.activation_before),
        ([sender], out.preactivation_after, out.activation_after),
    ):
        x = arriving(odd, 3, plan)
        assert pre == pytest.approx(float(coder.preactivations(x)[7]), abs=1e-5)
        assert act == pytest.approx(float(coder.encode(x).dense(96)[7]), abs=1e-5)
    assert abs(out.delta_preactivation) > 1e-2
    alone = odd.run(TEXT, [Clamp(receiver, out.activation_after)]).effect(TARGET, AGAINST)
    assert out.delta == pytest.approx(alone.delta, abs=1e-5)


def test_a_receiver_that_moves_moves_the_logits(odd):
    """Some receiver is active before or after; there the second run is not the clean one."""
    grid = path_effects(odd.host, odd.store, odd.host.batch([TEXT]), [Add("L0/5@2", 4.0)],
                        [(3, -1, feature) for feature in range(96)])  # fmt: skip
    moved = [one for one in grid if one.delta_activation]
    assert len(moved) > 3
    for one in moved[:4]:
        alone = odd.run(TEXT, [Clamp(one.receiver, one.activation_after)]).effect(one.effect.target, one.effect.against)
        assert one.delta == pytest.approx(alone.delta, abs=1e-5)
        assert one.delta != 0
    assert all(one.delta == 0 for one in grid if not one.delta_activation)


def test_paths_to_a_feature_add_up_in_front_of_its_encoder(affine):
    """Between layer 0 and layer 2 lie four modules: sixteen sets of open ones, each the sum of its chains."""
    plan, delta = shift(affine, 0, 5, LAST, 1.5)
    hand, coder = ByHand(affine), affine.store[2]
    clean = arriving(affine, 2, [])
    chains: dict = {}
    for sites in subsets(modules(3)[:4]):
        x = delta
        for site in sites:
            x = hand.module(site, x)
        chains[sites] = x[LAST]
    for opened in subsets(modules(3)[:4]):
        out = affine.path_effect(TEXT, plan, "L2/7@-1", opened or "direct", hold=PARTS)
        x = clean + sum(value for sites, value in chains.items() if set(sites) <= set(opened))
        assert out.preactivation_after == pytest.approx(
            float(coder.preactivations(x)[7]), abs=1e-6
        )  # clean: live norms
        assert abs(out.delta_preactivation) > 1e-2


def test_a_grid_is_its_single_pairs(odd):
    batch = odd.host.batch([TEXT])
    senders = [Ablate("L0/3@-1"), [Add("L0/5@2", 4.0), Add("L1/8@3", 2.0)], (1, -1, 9, 5.0)]
    receivers = ["L3/7@-1", (3, 4, 11)]
    options = {"target": TARGET, "against": AGAINST, "hold": ("norms", "attention")}
    grid = path_effects(odd.host, odd.store, batch, senders, receivers, **options)
    pairs = list(itertools.product(senders, receivers))
    assert len(grid) == len(pairs)
    for one, (sender, receiver) in zip(grid, pairs, strict=True):
        alone = odd.path_effect(TEXT, sender, receiver, **options)
        assert (one.sender, one.receiver) == (alone.sender, alone.receiver)
        assert one.preactivation_after == pytest.approx(alone.preactivation_after, abs=1e-5)
        assert one.delta == pytest.approx(alone.delta, abs=1e-5)
    assert path_effects(odd.host, odd.store, batch, [], receivers) == ()


def test_more_rows_than_fit_one_pass(odd):
    many = path_effects(odd.host, odd.store, odd.host.batch([TEXT]), [Add("L0/5@2", float(n)) for n in range(70)],
                        ["L1/7@-1"], target=TARGET, against=AGAINST)  # fmt: skip
    assert many[0].delta_preactivation == 0
    alone = odd.path_effect(TEXT, Add("L0/5@2", 69.0), "L1/7@-1", target=TARGET, against=AGAINST)
    assert many[69].preactivation_after == pytest.approx(alone.preactivation_after, abs=1e-5)
    assert many[69].delta == pytest.approx(alone.delta, abs=1e-5)


@pytest.mark.parametrize(
    ("read", "write"), [("mlp_in", "mlp_out"), ("resid_mid", "resid_mid"), ("resid_pre", "resid_post")]
)
def test_other_sites_lie_where_they_lie(read, write):
    """The first module behind the sender is open to it, the last in front of the receiver counts, the next does not."""
    coders = [random_transcoder(layer, 40, read=Site(read, layer), write=Site(write, layer)) for layer in range(4)]
    model = HookedModel.from_model(random_qwen2(), word_tokenizer(), coders)
    between = {
        "mlp_out": ["attn_out 1", "mlp_out 1", "attn_out 2"],
        "resid_mid": ["mlp_out 0", "attn_out 1", "mlp_out 1", "attn_out 2"],
        "resid_post": ["attn_out 1", "mlp_out 1"],
    }[write]
    sender, receiver = Add("L0/5@-1", 4.0), "L2/7@-1"
    paths = {site: model.path_effect(TEXT, sender, receiver, [site]).delta_preactivation for site in between}
    direct = model.path_effect(TEXT, sender, receiver, "direct").delta_preactivation
    assert abs(direct) > 1e-3
    assert all(abs(value - direct) > 1e-4 for value in paths.values())
    total = model.path_effect(TEXT, sender, receiver).delta_preactivation
    assert model.path_effect(TEXT, sender, receiver, between).delta_preactivation == pytest.approx(total, abs=1e-5)
    for site in {str(site) for site in modules(4)} - set(between):
        with pytest.raises(UserError, match="no path of this edit goes through"):
            model.path_effect(TEXT, sender, receiver, [site])


# -- run under a hold ------------------------------------------------------------------------------------------------


def test_holding_nothing_is_run_bit_for_bit(model, prompt):
    layer = model.store.layers[1]
    plan = [Add((layer, -1, 3), 2.0)]
    plain = model.host.forward(batch := model.host.batch([prompt]), model.edits(batch, [plan]))[0]
    for hold in ("nothing", (), Hold(), Hold(attn_out=[0], open=["attn_out 0"])):
        run = model.run(prompt, plan, hold=hold)
        assert torch.equal(run.logits, plain)
        assert torch.equal(run.baseline, model.host.forward(batch)[0])


@pytest.mark.parametrize("parts", ["nothing", "norms", "attention", PARTS])
def test_without_edits_held_modules_change_no_bit(model, prompt, parts):
    held = model.run(prompt, hold=Hold(parts, attn_out="all", mlp_out="all"))
    assert torch.equal(held.logits, model.run(prompt, hold=parts).logits)
    torch.testing.assert_close(held.logits, model.run(prompt).logits, rtol=0, atol=1e-3)


def test_an_edit_at_a_held_output_acts_on_its_clean_value():
    coders = [random_transcoder(0, 40, read=Site("mlp_in", 0), write=Site("mlp_out", 0))]
    model = HookedModel.from_model(random_qwen2(layers=2), word_tokenizer(), coders)
    plan = [Add("L0/5@-1", 3.0)]
    assert torch.equal(model.run(TEXT, plan, hold=Hold(mlp_out=[0])).logits, model.run(TEXT, plan).logits)


def test_many_prompts_are_each_alone(odd):
    prompts = [TEXT, "w9 w8", "w4 w4 w7"]
    plans = [[Add("L0/5@1", 4.0)], [Ablate("L1/3")], []]
    for hold in ("attention", Hold(("norms",), attn_out=[1, 2], mlp_out="all")):
        rows = odd.run_many(prompts, plans, hold=hold)
        for row, prompt, plan in zip(rows, prompts, plans, strict=True):
            torch.testing.assert_close(row, odd.run(prompt, plan, hold=hold).logits[-1], rtol=0, atol=2e-5)
    assert (rows[0] - odd.run_many(prompts, plans)[0]).abs().max() > 1e-3


def test_a_swap_and_a_hold_can_go_together(odd):
    """Held patterns in the swapped model: the block reads reconstructions, and attends as in the clean run."""
    swapped = odd.run(TEXT, swap="all", error="zero", hold="attention")
    live = odd.run(TEXT, swap="all", error="zero")
    assert (swapped.logits - live.logits).abs().max() > 1e-2
    torch.testing.assert_close(swapped.baseline, live.baseline, rtol=0, atol=2e-5)
    # behind the last swapped site nothing is left to hold but layer 3: the same when only it is held
    closed = odd.run(TEXT, swap="all", error="zero", hold=Hold(attn_out=[3], mlp_out=[3]))
    assert (closed.logits - live.logits).abs().max() > 1e-2


# -- refused ---------------------------------------------------------------------------------------------------------


def never(*_, **__):
    raise AssertionError("the model ran")


SENDER, RECEIVER = Ablate("L1/5@2"), "L3/7@-1"
REFUSED = {
    "unknown part": lambda m: m.run(TEXT, [SENDER], hold="mlp"),
    "unknown layers": lambda m: m.run(TEXT, [SENDER], hold=Hold(attn_out="some")),
    "there is no mlp_out 4": lambda m: m.run_many([TEXT], hold=Hold(mlp_out=[4])),
    "is not the output of a module": lambda m: m.effects(TEXT, [SENDER], receivers=["resid_pre 2"]),
    "attn_out 1 is open, and nothing holds it": lambda m: m.run(TEXT, hold=Hold(mlp_out="all", open=["attn_out 1"])),
    "no interventions given": lambda m: m.effects(TEXT, []),
    "there is no attn_out 9": lambda m: m.effects(TEXT, [SENDER], receivers=["attn_out 9"]),
    "no path of this edit goes through mlp_out 0": lambda m: m.effects(TEXT, [SENDER], receivers=["mlp_out 0"]),
    "no path of this edit goes through mlp_out 3": lambda m: m.path_effect(TEXT, SENDER, RECEIVER, ["mlp_out 3"]),
    "mlp_out 2 cannot be open and held": lambda m: m.path_effect(
        TEXT, SENDER, RECEIVER, ["mlp_out 2"], hold=Hold(mlp_out=[2])
    ),
    "unknown paths": lambda m: m.path_effect(TEXT, SENDER, RECEIVER, "mlp_out 2"),
    "the receiver L1/7@-1 is not after L1/5@2": lambda m: m.path_effect(TEXT, SENDER, "L1/7@-1"),
    "the receiver L0/7@-1 is not after": lambda m: m.path_effect(TEXT, SENDER, "L0/7@-1"),
    "is at an earlier token": lambda m: m.path_effect(TEXT, SENDER, "L3/7@1"),
    "is at several tokens": lambda m: m.path_effect(TEXT, SENDER, "L3/7"),
    "position 9 does not occur": lambda m: m.path_effect(TEXT, SENDER, "L3/7@9"),
    "position 8 does not occur": lambda m: m.path_effect(TEXT, Ablate("L1/5@8"), RECEIVER),
    "layer 2 has no transcoder": lambda m: m.path_effect(TEXT, SENDER, "L2/7@-1"),
    "no feature 96": lambda m: m.effects(TEXT, [Ablate("L1/96")]),
    "the same token": lambda m: m.effects(TEXT, [SENDER], TARGET, TARGET),
    "position 5 does not occur": lambda m: m.effects(TEXT, [SENDER], pos=5),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_is_refused_before_the_model_runs(odd, monkeypatch, message):
    monkeypatch.setattr(odd.host.decoder, "forward", never)
    with pytest.raises(UserError, match=message):
        REFUSED[message](odd)


def test_a_replaced_site_cannot_be_held():
    coders = [random_transcoder(n, 40, read=Site("mlp_in", n), write=Site("mlp_out", n)) for n in range(2)]
    model = HookedModel.from_model(random_qwen2(layers=2), word_tokenizer(), coders)
    with pytest.raises(UserError, match="mlp_out 1 is held at its clean value, and replaced"):
        model.run(TEXT, swap=[1], error="zero", hold=Hold(mlp_out="all"))
    model.run(TEXT, swap=[1], error="zero", hold=Hold(mlp_out=[0]))


def test_modules_are_read_from_text():
    assert module("mlp_out 3") == Site("mlp_out", 3)
    assert Hold("norms", attn_out=(2, 0, 2), open=["attn_out 0"]).outputs(3) == {Site("attn_out", 2)}
