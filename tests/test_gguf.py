"""A small Qwen2 written as a GGUF file in llama.cpp's layout, and read back as any other model."""

import pytest
import torch
from transformers import Qwen2ForCausalLM
from worlds import random_qwen2, random_transcoder

from circuits.cli import main
from hooks import Ablate, HookedModel
from hooks.errors import ModelError
from hooks.host import Host, config_of, gguf

pytest.importorskip("gguf", reason="the extra gguf is not installed")
from gguf import GGUFWriter

BLOCK = {  # of transformers → of llama.cpp
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
WHOLE = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
WHOLE["lm_head.weight"] = "output.weight"
TEXT = "ABC ABD"


def name_of(key: str) -> str:
    if key in WHOLE:
        return WHOLE[key]
    _, _, layer, *path, last = key.split(".")
    return f"blk.{layer}.{BLOCK['.'.join(path)]}.{last}"


def write(path, model: Qwen2ForCausalLM, leave_out: str = "") -> None:
    config = model.config
    writer = GGUFWriter(str(path), "qwen2")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    writer.add_tokenizer_model("gpt2")
    tokens = ["<end>", "Ġ", "AB", *(chr(ord("!") + n) for n in range(config.vocab_size - 3))]
    writer.add_token_list(tokens)
    writer.add_token_merges(["A B"])
    writer.add_token_types([3, *([1] * (len(tokens) - 1))])
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(0)
    for key, tensor in model.state_dict().items():
        if key != leave_out:
            writer.add_tensor(name_of(key), tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def plain() -> Qwen2ForCausalLM:
    """Heads of d_model / heads, which is all that this format can say."""
    return random_qwen2(d_model=40, heads=4, kv_heads=2, head_dim=10, tied=False)


@pytest.fixture(scope="module")
def file(plain, tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    write(path, plain)
    return path


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_a_gguf_model_computes_what_its_source_computes(plain, file, dtype):
    host = Host.load(file, dtype=dtype)
    assert host.dtype == (dtype or torch.bfloat16)
    for key, tensor in plain.state_dict().items():
        assert torch.equal(host.model.state_dict()[key], tensor.to(host.dtype))
    if dtype is not None:
        ids = torch.tensor([host.tokenize(TEXT)])
        with torch.no_grad():
            torch.testing.assert_close(host.model(input_ids=ids).logits, plain(input_ids=ids).logits)
    assert host.end_tokens == {0}
    assert config_of(file).num_hidden_layers == plain.config.num_hidden_layers


def test_it_is_saved_ablated_and_generated_from_like_any_other(plain, file, tmp_path):
    coders = [random_transcoder(layer, 40) for layer in range(4)]
    model = HookedModel.load(file, coders, dtype="float32")
    truth = HookedModel.from_model(plain, model.host.tokenizer, coders)
    for one, two in zip(*(m.run(TEXT, [Ablate("L1/3")]).logits for m in (model, truth)), strict=True):
        torch.testing.assert_close(one, two)
    assert model.generate(TEXT, max_new_tokens=4).ids == truth.generate(TEXT, max_new_tokens=4).ids
    model.host.model.save_pretrained(tmp_path / "folder")
    again = Qwen2ForCausalLM.from_pretrained(tmp_path / "folder")
    assert all(torch.equal(again.state_dict()[key], tensor) for key, tensor in plain.state_dict().items())


def test_what_is_not_there_is_refused(plain, file, tmp_path, monkeypatch, capsys):
    with pytest.raises(ModelError, match="there is no file"):
        Host.load(tmp_path / "none.gguf")
    with pytest.raises(ModelError, match="onto one device"):
        Host.load(file, device_map="auto")
    (tmp_path / "damaged.gguf").write_bytes(file.read_bytes()[:2000])
    with pytest.raises(ModelError, match="cannot load the model"):
        Host.load(tmp_path / "damaged.gguf")
    write(tmp_path / "less.gguf", plain, leave_out="model.layers.1.mlp.up_proj.weight")
    with pytest.raises(ModelError, match="incomplete"):
        Host.load(tmp_path / "less.gguf")
    assert main(["features", TEXT, "--model", str(tmp_path / "none.gguf"), "--transcoders", "demo"]) == 2
    assert "there is no file" in capsys.readouterr().err
    monkeypatch.setattr(gguf, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"qwen-circuits\[gguf\]"):
        Host.load(file)
