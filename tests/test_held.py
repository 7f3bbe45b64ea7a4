"""Passes with cuts held: without a removal nothing moves; with one, a row is one explicit hooked run. And the tensors
that the store keeps beside its weights.
"""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from test_conventions import ALL, TEXT, WIDTH, exact_edges, hooked, settled
from worlds import random_qwen2, random_transcoder, word_tokenizer

from circuits import Direction, Feature, Logit, Mass
from circuits.building import settle
from circuits.edges import Removal, feature_values, run_held
from hooks import HookedModel, Site
from hooks.checkpoints import TranscoderStore
from hooks.types import Edit

SAME, NEXT, MLP = ("resid_pre", "resid_pre", ALL), ("resid_pre", "resid_post", ALL), ("mlp_in", "mlp_out", ALL)
MIDDLE, ATTENTION = ("resid_mid", "resid_mid", ALL), ("resid_pre", "attn_out", ALL)
EVERY_SET = pytest.mark.parametrize("sites", [SAME, NEXT, MLP, MIDDLE, ATTENTION], ids=lambda key: "-".join(key[:2]))


def vectors(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, 40, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_hand(setting, layers, removal=None, site=None, looked_at=()):
    """One run with every write site of `layers` put back to what it was, but for what is taken out of one site."""
    model, seen = setting.model, {}
    edits = [Edit(look, lambda x, at, look=look: seen.setdefault(look, x)) for look in looked_at]
    sites = {model.store[layer].write: setting.recording.layers[layer].target for layer in layers}
    for held in [*sites, *([site] if site and site not in sites else [])]:

        def apply(x, at, held=held):
            out = sites[held].clone() if held in sites else x.clone()
            if held == site:
                out[0, slice(None) if removal.pos is None else removal.pos] -= removal.vector
            return out

        edits.append(Edit(held, apply))
    logits = model.host.forward(setting.recording.batch, edits)
    values = torch.stack([target.value(logits)[0] for target in setting.targets])
    return values, {look: x[0] for look, x in seen.items()}


@EVERY_SET
@pytest.mark.parametrize("held", [(), (0, 2), ALL])
def test_without_a_removal_everything_stands_at_its_clean_value(sites, held):
    """Whatever is held: putting back what stood there changes nothing."""
    setting = settled(sites)
    reads = {layer: setting.model.store[layer].read for layer in ALL}
    seen: dict = {}
    looks = {site: (lambda x, start, site=site: seen.setdefault(site, (x, start))) for site in reads.values()}
    found = run_held(setting.model, setting.recording, held, [{}, {}, {}], looks, setting.targets)
    clean = torch.stack([target.value(setting.recording.logits)[0] for target in setting.targets])
    torch.testing.assert_close(found, clean.expand(3, -1), rtol=1e-12, atol=1e-12)
    for layer, site in reads.items():
        x, start = seen[site]
        assert start == 0
        torch.testing.assert_close(x, setting.recording.layers[layer].read.expand_as(x), rtol=1e-12, atol=1e-12)


@EVERY_SET
@pytest.mark.parametrize("held", [(), ALL])
def test_a_removal_is_one_hooked_run_per_row(sites, held):
    setting = settled(sites)
    model, above = setting.model, setting.model.store[3].read
    writes = {layer: model.store[layer].write for layer in ALL}
    taken = [
        (writes[1], Removal(1, vectors(1)[0])),
        (writes[0], Removal(None, vectors(1, 1)[0])),
        (writes[3], Removal(3, vectors(1, 2)[0])),
        (Site("resid_pre", 0), Removal(0, vectors(1, 3)[0])),
    ]
    rows = [{site: removal} for site, removal in taken]
    rows.insert(2, {})
    looked = torch.zeros(len(rows), 4, 40, dtype=torch.float64)

    def look(x, start):
        looked[start : start + len(x)] = x

    found = run_held(model, setting.recording, held, rows, {above: look}, setting.targets)
    for row, values, x in zip(rows, found, looked, strict=True):
        site, removal = next(iter(row.items()), (None, None))
        expected, seen = by_hand(setting, held, removal, site, [above])
        torch.testing.assert_close(values, expected, rtol=1e-10, atol=1e-11)
        torch.testing.assert_close(x, seen[above], rtol=1e-10, atol=1e-11)
    moved = (part - part[2] for part in (found, looked))  # row 2 is not edited
    assert max(float(change.abs().max()) for change in moved) > 1e-4


def test_with_every_cut_held_a_removal_reaches_only_what_it_feeds():
    """Taken out at layer 1 of a same-site set, it is gone again behind layer 2's cut: the target stays."""
    setting = settled(SAME)
    rows = [{}, {Site("resid_pre", 1): Removal(1, vectors(1)[0])}]
    seen: dict = {}
    looks = {Site("resid_pre", n): (lambda x, start, n=n: seen.setdefault(n, x)) for n in (1, 2, 3)}
    found = run_held(setting.model, setting.recording, ALL, rows, looks, setting.targets)
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-12)
    moved = {n: float((x[1] - x[0]).abs().max()) for n, x in seen.items()}
    assert moved[1] == 0  # a site that is held is seen before it is put back, and nothing below it moved
    assert moved[2] > 1e-3
    assert moved[3] < 1e-12


def test_a_row_may_take_something_out_of_several_sites():
    setting = settled(MLP)
    first, second = (Removal(n, v) for n, v in zip((0, 2), vectors(2), strict=True))
    low, high = Site("mlp_out", 0), Site("mlp_out", 2)
    together = run_held(setting.model, setting.recording, (), [{low: first, high: second}], {}, setting.targets)

    def without(removal):
        def apply(x, at):
            out = x.clone()
            out[:, removal.pos] -= removal.vector
            return out

        return apply

    edits = [Edit(low, without(first)), Edit(high, without(second))]
    logits = setting.model.host.forward(setting.recording.batch, edits)
    expected = torch.stack([target.value(logits)[0] for target in setting.targets])
    torch.testing.assert_close(together[0], expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("rows_per_pass", [1, 3, 100])
def test_rows_do_not_depend_on_how_many_share_a_pass(monkeypatch, rows_per_pass):
    """And looks are told the number of the first row they are shown."""
    setting = settled(NEXT)
    site = Site("resid_post", 1)
    rows = [{site: Removal(n % 4, v)} for n, v in enumerate(vectors(7))]
    expected = run_held(setting.model, setting.recording, ALL[2:], rows, {}, setting.targets)
    monkeypatch.setattr("circuits.edges.measured.ROWS", rows_per_pass)
    seen: dict = {}
    looks = {Site("resid_pre", 2): lambda x, start: seen.update({start + n: row for n, row in enumerate(x)})}
    found = run_held(setting.model, setting.recording, ALL[2:], rows, looks, setting.targets)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert sorted(seen) == list(range(7))
    clean = setting.recording.layers[2].read[0]
    for number, row in rows_of(rows):
        torch.testing.assert_close(clean - seen[number], row, rtol=1e-9, atol=1e-12)


def rows_of(rows):
    for number, row in enumerate(rows):
        (removal,) = row.values()
        out = torch.zeros(4, 40, dtype=torch.float64)
        out[removal.pos] = removal.vector
        yield number, out


@pytest.mark.parametrize(
    "targets",
    [
        Mass(0.5),
        [Logit("w5", pos=0), Logit("w6")],
        Feature("L3/7@2"),
        Direction(vectors(1)[0], Site("resid_mid", 2), 1),
    ],
    ids=["mass", "list", "feature", "direction"],
)
def test_every_kind_of_target_is_read_where_it_stands(targets):
    setting = settle(hooked(*MLP), TEXT, targets)
    site = Site("mlp_out", 0)
    removal = Removal(0, vectors(1)[0])
    found = run_held(setting.model, setting.recording, (), [{}, {site: removal}], {}, setting.targets)
    assert found.shape == (2, len(setting.targets))
    for row, edits in enumerate(([], [Edit(site, lambda x, at: _less(x, removal))])):
        seen: dict = {}
        end = setting.targets[0].site
        looks = [Edit(end, lambda x, at, seen=seen: seen.setdefault("x", x))] if end else []
        logits = setting.model.host.forward(setting.recording.batch, [*edits, *looks])
        expected = torch.stack([target.value(seen["x"] if end else logits)[0] for target in setting.targets])
        torch.testing.assert_close(found[row], expected, rtol=1e-11, atol=1e-12)


def _less(x, removal):
    out = x.clone()
    out[:, removal.pos] -= removal.vector
    return out


def test_without_rows_or_targets_nothing_is_returned():
    setting = settled(SAME)
    assert run_held(setting.model, setting.recording, ALL, [], {}, setting.targets).shape == (0, 1)
    assert run_held(setting.model, setting.recording, ALL, [{}], {}).shape == (1, 0)


def test_feature_values_are_preactivations():
    setting, run, _ = exact_edges(MLP)
    for cut in run.cuts:
        record = setting.recording.layers[cut.layer]
        pre = cut.transcoder.preactivations(record.read[0])
        found = feature_values(setting.model, cut.layer, cut.pos, cut.feature, record.read.expand(3, -1, -1))
        torch.testing.assert_close(found, pre[cut.pos, cut.feature].expand(3, -1), rtol=1e-12, atol=1e-12)


def test_half_precision_is_subtracted_wide_and_cast_once():
    """A removal far below bf16's step goes nowhere; that of the whole stream leaves nothing."""
    coders = [random_transcoder(n, 40, WIDTH, 4, dtype=torch.bfloat16) for n in ALL]
    model = HookedModel.from_model(random_qwen2(dtype=torch.bfloat16), word_tokenizer(), coders)
    setting = settle(model, TEXT)
    site, seen = Site("resid_pre", 2), []
    size = setting.recording.layers[2].target[0, 1].float().abs()
    tiny, whole = Removal(1, size * 2.0**-12), Removal(1, setting.recording.layers[2].target[0, 1].float())
    after = Site("resid_post", 1)
    rows = [{}, {after: tiny}, {after: whole}]
    run_held(model, setting.recording, (), rows, {site: lambda x, start: seen.append(x)})
    clean, little, nothing = seen[0]
    assert clean.dtype == torch.bfloat16
    assert torch.equal(little, clean)
    assert (nothing[1] == 0).all()
    assert torch.equal(nothing[0], clean[0])


# -- what the store keeps beside the weights -------------------------------------------------------------------------


@pytest.fixture
def store() -> TranscoderStore:
    """Three layers, all resident."""
    store = TranscoderStore.of([random_transcoder(n, 8, 16, 4) for n in range(3)])
    assert len(list(store)) == 3
    return store


class Made:
    """A maker that counts."""

    def __init__(self, numbers: int = 10):
        self.count, self.numbers = 0, numbers

    def __call__(self) -> torch.Tensor:
        self.count += 1
        return torch.full((self.numbers,), float(self.count))


def test_a_derived_tensor_is_made_once(store):
    given, make = (torch.ones(3), torch.ones(2)), Made()
    first = store.derived(0, "values", given, make)
    assert store.derived(0, "values", given, make) is first
    assert make.count == 1
    store.derived(0, "keys", given, make)  # by name
    store.derived(1, "values", given, make)  # and by layer
    assert make.count == 3
    assert store.derived(0, "values", given, make) is first


def test_it_is_made_anew_when_a_given_tensor_is_written_to(store):
    given, make = (torch.ones(3), torch.ones(2)), Made()
    store.derived(0, "values", given, make)
    given[1].mul_(2)
    assert store.derived(0, "values", given, make)[0] == 2
    given[0][1] = 5  # through a view, too
    assert store.derived(0, "values", given, make)[0] == 3
    assert store.derived(0, "values", given, make)[0] == 3
    assert make.count == 3


def test_it_is_made_anew_for_another_tensor_however_equal(store):
    make, given = Made(), torch.ones(3)
    store.derived(0, "values", (given,), make)
    other = torch.ones(3)
    assert store.derived(0, "values", (other,), make)[0] == 2
    del given, other
    gc.collect()
    for _ in range(20):  # a tensor that takes the place of one that is gone is not mistaken for it
        store.derived(0, "values", (torch.ones(3),), make)
    assert make.count == 22


def test_given_tensors_are_not_kept_alive(store):
    given = torch.ones(3)
    seen = weakref.ref(given)
    store.derived(0, "values", (given,), Made())
    del given
    gc.collect()
    assert seen() is None


def test_derived_tensors_count_in_the_bytes_and_go_with_their_layer(store):
    one, all_three = store[0].nbytes, store.nbytes
    given, make = (torch.ones(3),), Made(100)
    store.derived(0, "values", given, make)
    assert store.nbytes == all_three + 400
    store.place(0, torch.device("meta"))  # another device: the layer is dropped
    assert store.nbytes == all_three - one
    store.place(0, torch.device("cpu"))
    assert store[0].nbytes == one
    assert store.nbytes == all_three
    store.derived(0, "values", given, make)
    assert make.count == 2


def test_a_full_budget_drops_the_layer_used_longest_ago_with_what_is_derived_from_it(store):
    one = store[0].nbytes
    small = TranscoderStore.of(list(store))
    small.budget_bytes = 2 * one + 400
    given, make = (torch.ones(3),), Made(100)
    small[0]
    small.derived(0, "values", given, make)
    small[1]
    assert small.nbytes == 2 * one + 400
    small[2]  # no room: layer 0 goes, and its tensor
    assert small.nbytes == 2 * one
    small[1]
    small.derived(1, "values", given, make)
    assert small.nbytes == 2 * one + 400
    small.derived(1, "keys", given, make)  # what is derived takes room, too
    assert small.nbytes == one + 800
    small[0]
    assert small.nbytes <= small.budget_bytes


def test_nothing_is_kept_for_a_layer_that_is_not_resident(store):
    """A graph may hold on to a layer that the budget has dropped; what it derives then must not pile up."""
    one = store[0].nbytes
    small = TranscoderStore.of(list(store))
    small.budget_bytes = one
    given = (torch.ones(3),)
    for layer in range(3):
        small[layer]
    for layer in range(3):
        made = small.derived(layer, "values", given, Made(1000))
        assert made.shape == (1000,)
    assert small.nbytes <= one + 4000  # the last layer and its own
    small[2]
    small[1]
    assert small.nbytes == one


def test_another_transcoder_of_the_layer_has_its_own():
    """A store's weights are frozen, so a set with other weights is another store."""
    coder = random_transcoder(0, 8, 16, 4)
    stores = [TranscoderStore.of([one]) for one in (coder, replace(coder, W_dec=2 * coder.W_dec))]
    given, make = (torch.ones(3),), Made()
    assert [store[0].layer for store in stores] == [0, 0]
    values = [float(store.derived(0, "values", given, make)[0]) for store in stores for _ in range(2)]
    assert values == [1, 1, 2, 2]
