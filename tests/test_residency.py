"""Loading in parts, room made beforehand, reading ahead, host memory, single rows: the same weights by every way."""

import dataclasses
import gc
import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_store import coders, publish, save_native, weights
from worlds import random_transcoder

import hooks.checkpoints.loading
import hooks.checkpoints.store
from hooks.checkpoints import TranscoderStore
from hooks.checkpoints.loading import LEAST_PART_BYTES, PART_BYTES, load_weights, part_bytes, stored
from hooks.checkpoints.residency import following
from hooks.errors import AddressError, CheckpointError
from hooks.files import safetensors_rows, write_safetensors
from hooks.formats import LayerSource, TensorSource
from hooks.transcoder import Transcoder

CPU = torch.device("cpu")
LAYERS = (0, 2, 5, 7)
ONE = random_transcoder(0, 40).nbytes  # bytes of a layer of `coders`, fp32
PLACES = {"read": "resid_pre", "write": "resid_pre"}


@pytest.fixture(scope="module")
def four(tmp_path_factory) -> Path:
    return save_native(tmp_path_factory.mktemp("four"), coders(*LAYERS))


@pytest.fixture(autouse=True)
def no_thread_outlives_its_test():
    """A thread of one test would count in the next."""
    yield
    gc.collect()
    for thread in threading.enumerate():
        if thread.name.startswith("read ahead"):
            thread.join(30)
            assert not thread.is_alive(), thread.name


class Reads:
    """Which layers were read, by whom; with `gate`, reads of other threads wait for it (or for being stopped)."""

    def __init__(self) -> None:
        self.layers: list[int] = []
        self.mine: list[bool] = []
        self.entered: dict[int, threading.Event] = {layer: threading.Event() for layer in LAYERS}
        self.gate: threading.Event | None = None
        self.before: Callable[[int], None] = lambda layer: None

    def __call__(self, source, device, dtype, stop=lambda: False, part=PART_BYTES):
        mine = threading.current_thread() is threading.main_thread()
        self.layers.append(source.layer)
        self.mine.append(mine)
        self.before(source.layer)
        self.entered[source.layer].set()
        while self.gate is not None and not mine and not self.gate.wait(0.01):
            if stop():
                raise hooks.checkpoints.loading.Stopped
        return load_weights(source, device, dtype, stop, part)


@pytest.fixture
def reads(monkeypatch, no_thread_outlives_its_test) -> Reads:
    counter = Reads()
    monkeypatch.setattr(hooks.checkpoints.store, "load_weights", counter)
    return counter


def same(one: Transcoder, two: Transcoder) -> bool:
    first, second = weights(one), weights(two)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# -- in parts ------------------------------------------------------------------------------------------------


def written(root: Path, tensor: torch.Tensor, packing: str) -> tuple[Path, tuple[str, ...]]:
    if packing == "safetensors":
        write_safetensors(root / "x.safetensors", {"x": tensor, "other": torch.ones(3)})
        return root / "x.safetensors", ("x",)
    content = {"a": {"x": tensor}, "other": torch.ones(3)}
    torch.save(content, root / "x.pt", _use_new_zipfile_serialization=packing == "zip")
    return root / "x.pt", ("a", "x")


@settings(max_examples=60, deadline=None)
@given(
    packing=st.sampled_from(["safetensors", "zip", "legacy"]),
    shape=st.lists(st.integers(0, 6), max_size=2).map(tuple),
    part=st.integers(1, 60),
    turned=st.booleans(),
    to=st.sampled_from([None, torch.bfloat16, torch.float64]),
    cut=st.tuples(st.integers(0, 6), st.integers(0, 6)),
)
def test_any_part_size_gives_the_tensor(packing, shape, part, turned, to, cut):
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    rows = tuple(sorted(min(edge, shape[0]) for edge in cut)) if len(shape) == 2 else None
    expected = tensor[slice(*rows)] if rows else tensor
    turned = turned and len(shape) == 2
    with tempfile.TemporaryDirectory() as folder:
        file, key = written(Path(folder), tensor, packing)
        source = LayerSource(0, 1, 1, {"x": TensorSource(file, key, turned, rows)}, None, "stored")
        loaded, dtypes = load_weights(source, CPU, to, part=part)
        assert stored(source)["x"].shape == tuple(expected.shape)
    found = loaded["x"]
    assert dtypes == {"x": torch.float32}
    assert found.is_contiguous()
    assert torch.equal(found, (expected.T if turned else expected).to(to or torch.float32))


def test_parts_shrink_where_memory_is_short_and_never_vanish():
    assert part_bytes(None) == part_bytes(1 << 40) == PART_BYTES
    assert part_bytes(-5) == part_bytes(0) == LEAST_PART_BYTES
    assert LEAST_PART_BYTES < part_bytes(6 * LEAST_PART_BYTES) < PART_BYTES


def test_nothing_is_read_on_when_nobody_waits(four):
    source = TranscoderStore.open(four)._sources[0]
    asked = iter([False, False, True])
    with pytest.raises(hooks.checkpoints.loading.Stopped):
        load_weights(source, CPU, None, lambda: next(asked))
    assert next(asked, None) is None


MEASURE = """
import sys, torch
from pathlib import Path
torch.set_num_threads(1)
from hooks.checkpoints import TranscoderStore
def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
x = torch.ones(2, 2)
torch.aminmax(x @ x)
Path("/proc/self/clear_refs").write_text("5")
start = status("VmRSS")
store = TranscoderStore.open(sys.argv[1], read="resid_pre", write="resid_pre")
layer = store[0]
print(status("VmHWM") - start, layer.nbytes)
"""


@pytest.mark.slow  # two processes that import torch
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux")
@pytest.mark.parametrize("packing", ["native", "published"])
def test_a_layer_is_not_in_memory_twice_while_it_is_loaded(tmp_path, packing):
    """Bound: the layer, and 24 MB for parts of the file and the library's own workspaces."""
    wide = [random_transcoder(0, 2048, 8192, 5, dtype=torch.bfloat16)]
    root = (save_native if packing == "native" else publish)(tmp_path / "set", wide)
    out = subprocess.run([sys.executable, "-c", MEASURE, str(root)], capture_output=True, text=True, check=True)
    extra, nbytes = map(int, out.stdout.split())
    assert nbytes > 64 << 20
    assert extra < nbytes + (24 << 20) < 2 * nbytes


# -- what is no number ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("W_enc", "nan"), ("b_enc", "inf"), ("W_dec", "-inf"), ("b_dec", "nan"), ("norm_weight", "inf"),
        ("norm_bias", "-inf"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("packing", ["native", "published"])
def test_nan_and_infinity_are_found_and_placed_before_first_use(tmp_path, packing, name, value):
    good, bad = coders(0, 2)
    spoiled = getattr(bad, name).clone()
    place = (3, 17) if spoiled.ndim == 2 else (3,)
    spoiled[place] = float(value)
    root = (save_native if packing == "native" else publish)(
        tmp_path, [good, dataclasses.replace(bad, **{name: spoiled})]
    )
    store = TranscoderStore.open(root, **PLACES)
    with pytest.raises(CheckpointError, match="NaN" if value != value else "infinity") as caught:
        store[2]
    turned = packing == "published" and name == "W_dec"  # stored [d_model feature]
    key = {"W_enc": "enc.1.weight", "W_dec": "dec.weight"}.get(name, name) if packing == "published" else name
    assert caught.value.where == str(root / ("transcoder_L2.pt" if packing == "published" else "layer_02.safetensors"))
    if spoiled.ndim == 2:
        assert key in caught.value.problem
    assert caught.value.problem.endswith(f"row {17 if turned else 3}")
    assert same(store[0], good)
    with pytest.raises(CheckpointError):  # and it is not served the second time
        store[2]


def test_the_row_is_counted_in_the_file_whatever_the_part(tmp_path, monkeypatch):
    (bad,) = coders(0)
    bad.W_dec[55, 1] = float("nan")
    root = save_native(tmp_path, [bad])
    for part in (1, 200, 1 << 20):
        monkeypatch.setattr(hooks.checkpoints.store, "part_bytes", lambda room, part=part: part)
        with pytest.raises(CheckpointError, match="W_dec, row 55"):
            TranscoderStore.open(root)[0]


def test_a_cast_that_overflows_is_refused(tmp_path):
    (wide,) = coders(0)
    wide.W_enc[7, 0] = 1e6
    root = save_native(tmp_path, [wide])
    assert same(TranscoderStore.open(root)[0], wide)
    store = TranscoderStore.open(root, dtype=torch.float16)
    for ask in (lambda: store[0], lambda: store.encoder_rows(0, [7])):
        with pytest.raises(CheckpointError, match="float16 cannot hold the numbers in W_enc, row 7") as caught:
            ask()
        assert caught.value.found == "1e+06"
        assert "--dtype" in caught.value.expected
        assert "download" not in caught.value.repair


def test_a_cast_that_overflows_behind_a_finish_is_refused(tmp_path):
    (wide,) = coders(0)
    wide.W_dec[3, 1] = 1e6
    root = publish(tmp_path, [wide])
    with pytest.raises(CheckpointError, match="float16 cannot hold the numbers in W_dec"):
        TranscoderStore.open(root, **PLACES, encoder="card", dtype=torch.float16)[0]


# -- digests -------------------------------------------------------------------------------------------------


def test_a_digest_is_taken_once_for_a_file_as_it_is(tmp_path, monkeypatch):
    taken = []
    real = hooks.checkpoints.loading.sha256
    monkeypatch.setattr(hooks.checkpoints.loading, "sha256", lambda file: (taken.append(file.name), real(file))[1])
    root = save_native(tmp_path, coders(0, 2))
    store = TranscoderStore.open(root, budget_bytes=1)
    for layer in (0, 2, 0, 2, 0):
        store[layer]
    TranscoderStore.open(root)[0]
    assert taken == ["layer_00.safetensors", "layer_02.safetensors"]
    file = root / "layer_00.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    with pytest.raises(CheckpointError, match="not the file its manifest describes"):
        TranscoderStore.open(root)[0]
    assert len(taken) == 3


# -- room beforehand -----------------------------------------------------------------------------------------


def gated(root: Path, layers: int, d: int = 8, f: int = 32) -> Path:
    """Gated autoencoders in bf16: what is worked out from them is fp32."""
    for layer in range(layers):
        folder = root / f"layer{layer}"
        folder.mkdir(parents=True)
        matrices = {"encoder.weight": torch.randn(f, d), "decoder.weight": torch.randn(d, f)}
        vectors = {"decoder_bias": torch.zeros(d)} | dict.fromkeys(("r_mag", "gate_bias", "mag_bias"), torch.zeros(f))
        torch.save({key: part.bfloat16() for key, part in (matrices | vectors).items()}, folder / "ae.pt")
        trainer = {"dict_class": "GatedAutoEncoder", "activation_dim": d, "dict_size": f, "layer": layer}
        (folder / "config.json").write_text(json.dumps({"trainer": trainer}))
    return root


def test_room_is_counted_for_what_is_stored_and_what_is_worked_out_from_it(tmp_path):
    """By hand, d = 8 and f = 32: the two matrices are 256 numbers each. Bias and shift are read once each."""
    store = TranscoderStore.open(gated(tmp_path, 1), **{"read": "resid_post", "write": "resid_post"})
    read = 2 * (256 + 256 + 8 + 8 + 3 * 32)  # bf16
    made = 4 * (256 + 32 + 32)  # W_enc, b_enc and threshold, fp32
    assert store.bytes_of(0) == read + made
    assert store[0].nbytes == made + 2 * (256 + 8 + 8)


@pytest.mark.parametrize("dtype", [None, torch.float64, torch.bfloat16])
def test_a_budget_holds_whatever_is_worked_out(tmp_path, dtype):
    options = {"read": "resid_post", "write": "resid_post", "dtype": dtype, "prefetch": False}
    root = gated(tmp_path, 3)
    one = TranscoderStore.open(root, **options)[0].nbytes
    for budget in range(one, 4 * one, one // 3):
        store = TranscoderStore.open(root, budget_bytes=budget, **options)
        assert store.bytes_of(0) >= one
        for layer in (0, 1, 2, 1, 0):
            assert store[layer].layer == layer
            assert store.nbytes <= budget
            assert layer in store._resident


def test_a_layer_larger_than_foreseen_drops_others_and_never_itself(four, monkeypatch):
    monkeypatch.setattr(hooks.checkpoints.store, "bytes_needed", lambda source, dtype: 1)
    store = TranscoderStore.open(four, budget_bytes=2 * ONE, prefetch=False)
    for layer in (0, 2, 5):
        store[layer]
    assert list(store._resident) == [2, 5]
    tight = TranscoderStore.open(four, budget_bytes=1, prefetch=False)
    for layer in (0, 2):
        tight[layer]
    assert list(tight._resident) == [2]


def test_a_smaller_budget_holds_at_once(four):
    store = TranscoderStore.open(four)
    for layer in (0, 2, 5, 2):
        store[layer]
    store.budget_bytes = 2 * ONE
    assert list(store._resident) == [5, 2]
    store.budget_bytes = 1
    assert list(store._resident) == [2]  # the one asked for last


@pytest.mark.parametrize("prefetch", [False, True])
@pytest.mark.parametrize("room", [1, 2, 3])
def test_room_is_made_before_a_layer_is_read(four, reads, room, prefetch):
    budget = room * ONE
    store = TranscoderStore.open(four, budget_bytes=budget, prefetch=prefetch)
    reads.before = lambda layer: seen.append(store.nbytes + ONE)
    seen: list[int] = []
    for layer in (0, 2, 5, 7, 5, 2, 0, 7):
        store[layer]
    store._near.settle()
    assert len(seen) >= 4
    assert max(seen) <= budget


def test_room_for_a_cast_is_counted_in_the_new_precision(four, reads):
    store = TranscoderStore.open(four, budget_bytes=ONE, dtype=torch.float64, prefetch=False)
    seen: list[int] = []
    reads.before = lambda layer: seen.append(store.nbytes)
    list(store)
    assert seen == [0, 0, 0, 0]  # one layer of fp64 is more than the budget; never two
    halves = TranscoderStore.open(four, budget_bytes=ONE, dtype=torch.bfloat16, prefetch=False)
    list(halves)
    assert list(halves._resident) == [5, 7]


# -- reading ahead -------------------------------------------------------------------------------------------


def test_the_next_layer_is_read_while_one_is_used(four, reads):
    reads.gate = threading.Event()
    store = TranscoderStore.open(four, budget_bytes=2 * ONE)
    first = store[0]
    assert reads.entered[2].wait(30)  # begun by itself
    assert list(store._resident) == [0]  # and not there yet
    assert store[0] is first
    reads.gate.set()
    assert same(store[2], coders(2)[0])
    assert reads.layers[:2] == [0, 2]
    assert reads.mine[:2] == [True, False]


def test_a_pass_reads_every_layer_once_and_all_but_the_first_ahead(four, reads):
    store = TranscoderStore.open(four, budget_bytes=2 * ONE)
    for expected, transcoder in zip(coders(*LAYERS), store, strict=True):
        assert same(transcoder, expected)
    assert reads.layers == list(LAYERS)
    assert reads.mine == [True, False, False, False]


def test_a_pass_downwards_is_read_ahead_too(four, reads):
    store = TranscoderStore.open(four, budget_bytes=2 * ONE)
    for layer in reversed(LAYERS):
        store[layer]
    assert reads.layers == list(reversed(LAYERS))
    assert reads.mine == [True, False, False, False]


@pytest.mark.parametrize(
    ("options", "asked"),
    [
        ({"budget_bytes": None}, [0]),
        ({"budget_bytes": 2 * ONE - 1}, [0, 2]),
        ({"budget_bytes": 2 * ONE, "prefetch": False}, [0, 2]),
        ({"budget_bytes": 4 * ONE}, [2]),  # neither an end of the set nor a neighbour of another
    ],
    ids=["no budget", "no room", "not wanted", "no pass"],
)
def test_nothing_is_read_ahead(four, reads, options, asked):
    store = TranscoderStore.open(four, **options)
    for layer in asked:
        store[layer]
        assert store._near.ahead is None
    assert reads.layers == asked
    assert all(reads.mine)


def test_transcoders_in_memory_are_not_read_ahead():
    store = TranscoderStore.of(coders(*LAYERS))
    store.budget_bytes = 2 * ONE
    store[0]
    assert store._near.ahead is None


def test_what_the_thread_raises_is_raised_where_the_layer_is_asked_for(tmp_path):
    good, bad, last = coders(0, 2, 5)
    bad.W_enc[4, 4] = float("nan")
    store = TranscoderStore.open(save_native(tmp_path, [good, bad, last]), budget_bytes=2 * ONE)
    assert same(store[0], good)
    store._near.ahead._thread.join()  # it has failed by now, and nobody has heard of it
    assert same(store[0], good)
    for _ in range(2):
        with pytest.raises(CheckpointError, match="NaN in W_enc, row 4"):
            store[2]
    assert same(store[5], last)


def test_a_file_that_is_gone_is_no_error_before_its_layer_is_asked_for(tmp_path):
    store = TranscoderStore.open(save_native(tmp_path, coders(0, 2)), budget_bytes=2 * ONE)
    (tmp_path / "layer_02.safetensors").unlink()
    store[0]
    with pytest.raises(CheckpointError, match=r"layer_02\.safetensors"):
        store[2]


def test_reading_begins_only_when_the_dropped_layer_is_gone(four, reads):
    store = TranscoderStore.open(four, budget_bytes=2 * ONE)
    held = store[0]
    store[2]  # 5 could be read now, in the place of 0; but 0 is still in memory
    assert list(store._resident) == [2]
    assert store._near.ahead.layer == 5
    assert not store._near.ahead._begin.is_set()
    assert reads.layers == [0, 2]
    del held
    gc.collect()
    assert reads.entered[5].wait(30)
    assert reads.layers == [0, 2, 5]


def test_a_layer_that_is_asked_for_is_read_whoever_holds_another(four, reads):
    store = TranscoderStore.open(four, budget_bytes=2 * ONE)
    held = [store[layer] for layer in LAYERS]
    assert [transcoder.layer for transcoder in held] == list(LAYERS)
    assert reads.layers == list(LAYERS)


def test_back_and_forth_costs_one_read_in_vain_at_most(four, reads):
    store = TranscoderStore.open(four, budget_bytes=2 * ONE)
    for _ in range(20):
        store[0]
        store[2]
    store._near.settle()
    assert len(reads.layers) <= 2 + 2  # each once, 5 in vain, and one again for that


@settings(max_examples=40, deadline=None)
@given(
    room=st.integers(1, 4),
    asked=st.lists(st.sampled_from(LAYERS), max_size=14),
    dtype=st.sampled_from([None, torch.bfloat16]),
)
def test_reading_ahead_changes_no_weight_and_keeps_the_budget(four, room, asked, dtype):
    budget = room * ONE // (1 if dtype is None else 2)
    store = TranscoderStore.open(four, budget_bytes=budget, dtype=dtype, host_budget_bytes=ONE)
    expected = {t.layer: t.to("cpu", dtype) for t in coders(*LAYERS)}
    for layer in asked:
        assert same(store[layer], expected[layer])
        assert store.nbytes + (store._near.ahead.nbytes if store._near.ahead else 0) <= budget
        assert next(reversed(store._resident)) == layer
    store.close()
    assert store.nbytes == 0


def test_what_is_derived_ends_reading_ahead_where_both_do_not_fit(four, reads):
    reads.gate = threading.Event()
    store = TranscoderStore.open(four, budget_bytes=2 * ONE)
    store[0]
    assert reads.entered[2].wait(30)
    store.derived(0, "values", (torch.ones(1),), lambda: torch.zeros(100))
    assert store._near.ahead is None
    assert list(store._resident) == [0]


@pytest.mark.parametrize("how", ["closed", "forgotten"])
def test_the_thread_ends_with_the_store(four, reads, how):
    reads.gate = threading.Event()
    store = TranscoderStore.open(four, budget_bytes=2 * ONE)
    store[0]
    assert reads.entered[2].wait(30)
    thread = store._near.ahead._thread
    assert thread.daemon
    if how == "closed":
        store.close()
        assert not thread.is_alive()
        assert store.nbytes == 0
        assert same(store[0], coders(0)[0])  # a closed store can still be asked
    del store
    gc.collect()
    thread.join(30)
    assert not thread.is_alive()


def test_another_device_ends_reading_ahead(four, reads):
    reads.gate = threading.Event()
    store = TranscoderStore.open(four, budget_bytes=2 * ONE)
    store[0]
    assert reads.entered[2].wait(30)
    store.place(2, torch.device("meta"))
    assert store._near.ahead is None
    reads.gate.set()
    assert store[2].device == torch.device("meta")


@pytest.mark.parametrize(
    ("previous", "layer", "expected"),
    [
        *((None, 0, 2), (None, 7, 5), (None, 2, None)),
        *((0, 2, 5), (2, 0, None), (5, 2, 0), (2, 5, 7), (5, 7, None)),
        *((0, 5, None), (7, 0, 2), (0, 7, 5), (99, 2, None)),
    ],
)
def test_a_pass_begins_at_an_end_and_takes_neighbours(previous, layer, expected):
    assert following(LAYERS, previous, layer) == expected
    assert following((4,), None, 4) is None


# -- host memory ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_cast_layer_comes_back_from_host_memory_without_reading(four, reads, dtype):
    store = TranscoderStore.open(four, budget_bytes=1, dtype=dtype, host_budget_bytes=4 * ONE)
    for _ in range(3):
        for expected, transcoder in zip(coders(*LAYERS), store, strict=True):
            assert same(transcoder, expected.to("cpu", dtype))
    assert reads.layers == list(LAYERS)  # the first time; 7 is resident and then kept
    assert store._near.host.nbytes == 4 * (
        ONE if dtype == torch.float64 else ONE // 2
    )  # the smaller of both precisions


def test_host_memory_has_a_budget_of_its_own(four, reads):
    store = TranscoderStore.open(four, budget_bytes=1, dtype=torch.float64, host_budget_bytes=2 * ONE + 1)
    for layer in LAYERS:
        store[layer]
        assert store._near.host.nbytes <= 2 * ONE + 1
    assert store.nbytes == 2 * ONE  # of fp64: not what waits in host memory
    reads.layers.clear()
    store[5]  # one of the two dropped last
    assert reads.layers == []
    store[0]
    assert reads.layers == [0]


def test_what_would_be_there_twice_is_not_kept(four, reads):
    store = TranscoderStore.open(four, budget_bytes=1, host_budget_bytes=9 * ONE)
    list(store)
    assert store._near.host.nbytes == 0
    none = TranscoderStore.open(four, budget_bytes=1, dtype=torch.float64)
    list(none)
    assert none._near.host.nbytes == 0


def test_layers_of_another_device_come_back_as_they_were(four, reads, monkeypatch):
    """The device is played by a transcoder that says so: no second device is needed to count reads."""
    monkeypatch.setattr(Transcoder, "device", property(lambda self: torch.device("cuda", 0)))
    store = TranscoderStore.open(four, budget_bytes=1, host_budget_bytes=4 * ONE)
    for _ in range(2):
        for expected, transcoder in zip(coders(*LAYERS), store, strict=True):
            assert same(transcoder, expected)
    assert reads.layers == list(LAYERS)
    assert store._near.host.nbytes == 4 * ONE


# -- single rows ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_rows_are_read_without_their_layer(four, reads, dtype, as_tensor):
    store = TranscoderStore.open(four, dtype=dtype)
    chosen = [95, 0, 3, 3]
    expected = coders(5)[0].to("cpu", dtype)
    for _ in range(2):
        given_rows = torch.tensor(chosen) if as_tensor else chosen
        assert torch.equal(store.decoder_rows(5, given_rows), expected.W_dec[chosen])
        assert torch.equal(store.encoder_rows(5, given_rows), expected.W_enc[chosen])
        assert store.decoder_rows(5, []).shape == (0, 40)
    assert not store._resident
    assert not reads.layers
    store[5]
    (four / "nothing").touch()
    assert torch.equal(store.decoder_rows(5, chosen), expected.W_dec[chosen])
    assert reads.layers == [5]


def test_rows_of_a_resident_layer_come_from_it(tmp_path):
    store = TranscoderStore.open(save_native(tmp_path, coders(0)))
    store[0]
    (tmp_path / "layer_00.safetensors").unlink()
    assert torch.equal(store.decoder_rows(0, [4]), coders(0)[0].W_dec[[4]])
    memory = TranscoderStore.of(coders(0))
    assert torch.equal(memory.encoder_rows(0, [4]), coders(0)[0].W_enc[[4]])


def test_rows_come_from_host_memory(four, reads):
    store = TranscoderStore.open(four, budget_bytes=1, dtype=torch.float64, host_budget_bytes=9 * ONE)
    list(store)
    rows = store.decoder_rows(0, [1, 8])
    assert rows.dtype == torch.float64
    assert torch.equal(rows, coders(0)[0].W_dec[[1, 8]].double())


@pytest.mark.skipif(not os.access("/proc/self/io", os.R_OK), reason="needs Linux")
def test_a_hundred_rows_read_a_hundred_rows(tmp_path):
    """Of a dictionary of the published width: 100 rows of 10 kB, a header, and nothing else."""
    wide = random_transcoder(0, 5120, 512, 5, dtype=torch.bfloat16)
    store = TranscoderStore.open(save_native(tmp_path, [wide]))
    chosen = list(range(0, 500, 5))

    def read() -> int:
        lines = Path("/proc/self/io").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("rchar")))

    start = read()
    rows = store.decoder_rows(0, chosen)
    assert read() - start < rows.nbytes + (1 << 15)
    assert torch.equal(rows, wide.W_dec[chosen])


def test_decoder_rows_of_pt_files_load_the_layer_and_say_what_it_costs_once(tmp_path, reads, caplog):
    root = publish(tmp_path, coders(*LAYERS))
    store = TranscoderStore.open(root, **PLACES)
    with caplog.at_level(logging.WARNING, "hooks"):
        assert torch.equal(store.encoder_rows(2, [7]), coders(2)[0].W_enc[[7]])  # stored row by row
        assert not reads.layers
        assert not caplog.records
        for layer in (2, 5, 2):
            assert torch.equal(store.decoder_rows(layer, [7, 1]), coders(layer)[0].W_dec[[7, 1]])
    assert reads.layers == [2, 5]
    assert len(caplog.records) == 1
    assert "circuits convert" in caplog.text
    assert "MB" in caplog.text


def test_rows_of_one_of_several_decoders_and_of_the_cards_encoder(tmp_path):
    (coder,) = coders(0)
    store = TranscoderStore.open(publish(tmp_path, [coder]), encoder="card", **PLACES)
    assert torch.equal(store.encoder_rows(0, [3]), coder.W_enc[[3]])
    both = torch.cat([coder.W_dec.T, 2 * coder.W_dec.T])
    state = torch.load(tmp_path / "transcoder_L0.pt")
    state["state_dict"] |= {"_orig_mod.dec.weight": both, "_orig_mod.dec.bias": torch.cat([coder.b_dec] * 2)}
    torch.save(state, tmp_path / "transcoder_L0.pt")
    second = TranscoderStore.open(tmp_path, decoder=1, **PLACES)
    assert torch.equal(second.decoder_rows(0, [3]), 2 * coder.W_dec[[3]])


@pytest.mark.parametrize("features", [[96], [-1], [0, 1 << 40]])
def test_rows_that_do_not_exist_are_refused(four, features):
    store = TranscoderStore.open(four)
    with pytest.raises(AddressError, match="there is no feature") as caught:
        store.decoder_rows(0, features)
    assert "0 to 95" in caught.value.expected
    with pytest.raises(CheckpointError, match="layer 1 has no transcoder"):
        store.encoder_rows(1, [0])


def test_a_row_that_is_no_number_is_refused(tmp_path):
    (bad,) = coders(0)
    bad.W_dec[9, 0] = float("inf")
    store = TranscoderStore.open(save_native(tmp_path, [bad]))
    assert torch.equal(store.decoder_rows(0, [8]), bad.W_dec[[8]])
    with pytest.raises(CheckpointError, match="infinity in W_dec, row 9"):
        store.decoder_rows(0, [8, 9])


def test_a_file_that_shrinks_while_it_is_read_is_refused(four, tmp_path, monkeypatch):
    root = save_native(tmp_path, coders(0))
    file = root / "layer_00.safetensors"
    place = hooks.files.weight_files._stored_at

    def shrinking(path, key):
        found = place(path, key)
        os.truncate(path, 600)
        return found

    monkeypatch.setattr(hooks.files.weight_files, "_stored_at", shrinking)
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        safetensors_rows(file, "W_enc", [90])
