"""Memory plans: sizes against public figures and real modules, estimates against measured peaks, advice, messages.

Peaks are those of torch's own CPU allocator (`benchmarks/_allocations.py`): exact to the byte and the same in every
run, where the resident set of a process this small is mostly interpreter, heap and libraries. Estimates of what running
takes are held to 15 % *without* the weights, which alone would make most of the figure right.
"""

import argparse
import json
from dataclasses import replace

import pytest
import torch
from benchmarks._allocations import allocations
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM
from worlds import word_tokenizer

from circuits import trace
from circuits.attribution import _factored, _middle, autograd
from circuits.commands import _plan
from circuits.commands._options import command
from circuits.held import ROWS
from hooks import Clamp, HookedModel, Site, Transcoder, kernels, sweep
from hooks.demo import TRANSCODERS, WEIGHTS
from hooks.errors import CheckpointError, ModelError, UserError
from hooks.formats import recognise
from hooks.memory import (
    QWEN25,
    Ask,
    ModelShape,
    SetShape,
    _work,
    explained,
    gib,
    known_model,
    model_shape,
    plan,
    refuse,
    repair_for,
    work,
)

SHAPE = ModelShape(8, 512, 1376, 8, 2, 64, 1000)
CODERS = SetShape.of_numbers(8, 512, 2048, 245, "float32")
PROMPT = torch.randint(2, 60, (48,), generator=torch.Generator().manual_seed(0)).tolist()
GB = 10**9


def config_of(shape: ModelShape) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=shape.d_vocab,
        hidden_size=shape.d_model,
        intermediate_size=shape.d_ff,
        num_hidden_layers=shape.n_layers,
        num_attention_heads=shape.n_heads,
        num_key_value_heads=shape.n_kv,
        head_dim=shape.d_head,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=0,
    )


def coder(layer: int, read: str, write: str, dtype: torch.dtype) -> Transcoder:
    generator = torch.Generator().manual_seed(layer)

    def normal(*size: int, std: float) -> torch.Tensor:
        return (std * torch.randn(*size, generator=generator)).to(dtype)

    width, features = CODERS.d_model, CODERS.d_features
    return Transcoder(
        layer=layer,
        read=Site(read, layer),
        write=Site(write, layer),
        W_enc=normal(features, width, std=width**-0.5),
        b_enc=normal(features, std=0.1),
        W_dec=normal(features, width, std=CODERS.k**-0.5),
        b_dec=normal(width, std=0.1),
        norm_weight=1 + normal(width, std=0.2),
        norm_bias=normal(width, std=0.1),
        norm_eps=1e-5,
        k=CODERS.k,
    )


def built(dtype: str = "float32", read: str = "resid_pre", write: str = "resid_pre") -> HookedModel:
    torch.manual_seed(0)
    precision = getattr(torch, dtype)
    model = Qwen2ForCausalLM(config_of(SHAPE)).to(precision).eval()
    coders = [coder(layer, read, write, precision) for layer in range(SHAPE.n_layers)]
    return HookedModel.from_model(model, word_tokenizer(), coders)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def case(request: pytest.FixtureRequest) -> tuple[HookedModel, Ask]:
    dtype = request.param
    ask = Ask(SHAPE, replace(CODERS, dtype=dtype), len(PROMPT), dtype, on="cpu", new=8, nodes=800, sample=0)
    return built(dtype), ask


def check(estimate: float, measured: float) -> None:
    assert estimate == pytest.approx(measured, rel=0.15), f"estimate {estimate:,.0f}, measured {measured:,.0f}"


# -- sizes -----------------------------------------------------------------------------------------------------------

PUBLISHED = {  # numbers in each checkpoint, as the hub counts them
    "0.5B": 494_032_768,
    "1.5B": 1_543_714_304,
    "3B": 3_085_938_688,
    "7B": 7_615_616_512,
    "14B": 14_770_033_664,
    "32B": 32_763_876_352,
    "72B": 72_706_203_648,
}


@pytest.mark.parametrize("size", PUBLISHED)
def test_built_in_facts_have_the_published_number_of_parameters(size):
    assert QWEN25[size].parameters == PUBLISHED[size]


def test_names_of_the_family():
    for name in ("32B", "Qwen2.5-32B", "Qwen/Qwen2.5-32B-Instruct"):
        assert known_model(name) == QWEN25["32B"]
    assert known_model("Qwen/Qwen3-32B") is None


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", [(Qwen2Config, Qwen2ForCausalLM), (Qwen3Config, Qwen3ForCausalLM)])
def test_parameters_of_a_config_are_those_of_the_module(family, tied):
    make, module = family
    config = make(
        vocab_size=70, hidden_size=40, intermediate_size=56, num_hidden_layers=3, num_attention_heads=5,
        num_key_value_heads=1, head_dim=16, tie_word_embeddings=tied,
    )  # fmt: skip
    with torch.device("meta"):
        model = module(config)
    shape = ModelShape.of_config(config.to_dict(), "here")
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert shape.nbytes(2) == 2 * shape.parameters


def test_the_published_model_and_set_by_hand():
    model, coders = QWEN25["32B"], SetShape.of_numbers(63, 5120, 12288, 1474)
    assert model.nbytes(2) == 65_527_752_704
    assert coders.layer_bytes == 2 * (2 * 12288 * 5120 + 12288 + 3 * 5120)
    assert coders.nbytes == pytest.approx(15.9e9, rel=0.01)
    ask = Ask(model, coders, 32, new=0)
    cache = 2 * 64 * 32 * 8 * 128 * 2  # keys and values, layers, tokens, heads, width, bytes
    assert work(ask, "generate").steps[0].adds == {"keys and values": cache}
    assert work(ask, "features").steps[0].adds == {"streams": 63 * 32 * 5120 * 2}
    assert work(ask, "features").steps[1].adds == {"logits": 32 * 152064 * 4}
    assert work(ask, "features").steps[2].adds["features, reconstructions"] == 63 * 32 * (5120 * 4 + 1474 * 12)


def test_quantised_weights_by_hand():
    shape = ModelShape(2, 64, 128, 4, 2, 16, 100)  # seven matrices: 64 x (2·64 + 2·32 + 3·128)
    assert shape.matrices == 64 * 576
    outside = 2 * (2 * 100 * 64 + 64 + 2 * (2 * 64 + 64 + 2 * 32))  # embeddings, norms, biases, in bf16
    assert shape.nbytes(2, 8) == 2 * (64 * 576 + 4 * (64 + 32 + 32 + 64 + 128 + 128 + 64)) + outside
    assert shape.nbytes(2, 4) == 2 * int(64 * 576 * (0.5 + 4 / 64)) + outside


def test_a_quantised_checkpoint_says_so():
    facts = config_of(SHAPE).to_dict()
    assert ModelShape.of_config(facts | {"quantization_config": {"load_in_4bit": True}}, "").bits == 4
    assert ModelShape.of_config(facts | {"quantization_config": {"bits": 4, "quant_method": "gptq"}}, "").bits == 4
    assert ModelShape.of_config(facts | {"quantization_config": {"load_in_8bit": True}}, "").bits == 8
    assert {mode.name for mode in plan(Ask(replace(SHAPE, bits=4), CODERS, 8)).modes} >= {"4-bit model"}


def test_a_config_without_a_size_is_refused():
    facts = config_of(SHAPE).to_dict()
    for broken in (None, 0, "512", True):
        with pytest.raises(ModelError, match="does not say hidden_size"):
            ModelShape.of_config(facts | {"hidden_size": broken}, "here")


@pytest.mark.parametrize("name", ["demo", "demo-dense"])
def test_a_folder_of_transcoders_is_planned_from_its_headers(name):
    model = HookedModel.load("demo", name)
    found = SetShape.of_checkpoint(recognise(TRANSCODERS[name]))
    assert found.nbytes == sum(transcoder.nbytes for transcoder in model.store)
    assert (found.layers, found.k) == (len(model.store), model.store.k(model.store.layers[0]))
    assert model_shape(WEIGHTS / "config.json").parameters == sum(p.numel() for p in model.host.model.parameters())


def test_how_edges_are_found_follows_from_the_sites():
    from hooks.sites import SiteSpec

    def kind(read: str, write: str) -> str:
        return CODERS.between(SiteSpec.parse(read), SiteSpec.parse(write)).edges

    assert kind("resid_pre", "resid_pre") == "middle"
    assert kind("resid_mid", "resid_pre+1") == "middle"
    assert kind("resid_pre", "resid_post") == "here"
    assert kind("mlp_in", "mlp_out") == "walk"


def test_limits_are_those_of_the_modules_that_have_them():
    assert (_work.TARGETS_AT_ONCE, _work.ENTRIES_AT_ONCE) == (_factored.MOST_AT_ONCE, _factored.ENTRIES_AT_ONCE)
    assert _factored.STREAM_ENTRIES == _work.STREAM_ENTRIES
    assert (_work.POSITIONS_AT_ONCE, _work.GATHERED) == (_middle.POSITIONS_AT_ONCE, _middle.GATHERED)
    assert (_work.COPIES, _work.HELD_ROWS, _work.SWEEP_TOKENS) == (autograd.COPIES, ROWS, sweep.TOKENS_AT_ONCE)
    assert (_work.CAST, _work.CAST_ROWS) == (kernels._CAST_CHUNK, kernels._CAST_BLOCK)


# -- estimates against measured peaks ----------------------------------------------------------------------------------


def test_the_counter_by_hand():
    with allocations() as found:
        first = torch.zeros(1000, 100)
        second = first + 1
        del first
        third = second * 2  # noqa: F841
        del second
    assert (found.peak, found.left) == (800_000, 400_000)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_all_resident(dtype):
    with allocations() as found:
        model = built(dtype)
    estimate = SHAPE.nbytes(_work.ITEM[dtype]) + replace(CODERS, dtype=dtype).nbytes
    assert estimate == pytest.approx(found.left, rel=0.001)  # beside them: the rotation's frequencies
    assert estimate == sum(p.nbytes for p in model.host.model.parameters()) + sum(t.nbytes for t in model.store)


@pytest.mark.parametrize("batch", [1, 8])
def test_recording(case, batch):
    model, ask = case
    running = work(replace(ask, batch=batch), "features")
    with allocations() as found:
        recording = model.record([PROMPT] * batch)
    check(running.kept, found.left)
    if ask.dtype == "float32" or batch > 1:  # one prompt in bf16: a cast's buffer of 4 MB is most of it
        check(running.peak, found.peak)
    assert len(recording.layers) == 8


def test_recording_a_set_that_writes_elsewhere():
    for write, edges in (("resid_post", "here"), ("mlp_out", "walk")):
        model = built(read="resid_pre", write=write)
        ask = Ask(SHAPE, replace(CODERS, same_site=False, edges=edges), len(PROMPT), "float32", 4, on="cpu")
        with allocations() as found:
            recording = model.record([PROMPT] * 4)
        check(work(ask, "features").kept, found.left)
        check(work(ask, "features").peak, found.peak)
        del recording


def test_steered_generation(case):
    model, ask = case
    with allocations() as found:
        model.generate(PROMPT, [Clamp("L1/3", 4.0)], max_new_tokens=ask.new)
    check(work(ask, "generate").peak, found.peak)


def test_a_sweep(case):
    model, ask = case
    with allocations() as found:
        model.sweep(PROMPT, layers=[0], positions=[10], tokens_at_once=2048)
    check(work(replace(ask, sweep_tokens=2048), "sweep").peak, found.peak)


@pytest.mark.parametrize("nodes", [200, 1600])
def test_tracing(case, nodes):
    model, ask = case
    running = work(replace(ask, nodes=nodes), "trace")
    with allocations() as found:
        trace(model, PROMPT, max_nodes=nodes, sample=0)
    check(running.peak, found.peak)


def test_verification_is_the_peak_of_a_short_prompt(case):
    model, ask = case
    running = work(replace(ask, nodes=200, sample=16), "trace")
    assert max(running.peaks, key=lambda step: running.peaks[step]) == "verify"
    with allocations() as found:
        trace(model, PROMPT, max_nodes=200, sample=16)
    check(running.peak, found.peak)


@pytest.mark.parametrize(("write", "edges"), [("resid_post", "here"), ("mlp_out", "walk")])
def test_tracing_in_other_conventions(write, edges):
    """Which layers the nodes fall into is not known before; with the weights, 15 % holds; without, twice as much."""
    model = built(read="mlp_in" if write == "mlp_out" else "resid_pre", write=write)
    coders = replace(CODERS, same_site=False, edges=edges)
    ask = Ask(SHAPE, coders, len(PROMPT), "float32", on="cpu", nodes=400, sample=0)
    with allocations() as found:
        trace(model, PROMPT, max_nodes=400, sample=0)
    running, weights = work(ask, "trace").peak, SHAPE.nbytes(4) + coders.nbytes
    check(weights + running, weights + found.peak)
    assert running == pytest.approx(found.peak, rel=0.30)


def test_edges_by_autograd(case):
    model, ask = case
    with allocations() as found:
        trace(model, PROMPT[:16], max_nodes=400, sample=0, rule="autograd")
    running = work(replace(ask, nodes=400, tokens=16), "trace", edges_by_autograd=True)
    check(running.peak, found.peak)
