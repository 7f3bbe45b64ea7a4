"""What a prompt is, how it is read, and what is refused in words; the bridge reads text as the model does."""

import copy
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import config as jaxtyping_config
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from worlds import WORDS, random_qwen2, random_transcoder, word_tokenizer

from circuits.targets import Answer
from circuits.tracing import trace
from hooks import Clamp, HookedModel, UserError
from hooks.errors import ModelError, PromptError, TargetError
from hooks.host import Host, is_one, listed
from hooks.host.tokens import Tokens

IDS = [5, 6, 7]


@contextmanager
def no_checks() -> Iterator[None]:
    """As in a user's own process, where no types are checked at run time."""
    jaxtyping_config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping_config.update("jaxtyping_disable", False)


@pytest.fixture
def unchecked() -> Iterator[None]:
    with no_checks():
        yield


def with_bos(*, adds: bool = False) -> PreTrainedTokenizerFast:
    """Words behind a BOS token that the tokenizer has, and adds by itself or not."""
    vocab = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *WORDS[2:63]])}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if adds:
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    named = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **named)


def appends_eos() -> PreTrainedTokenizerFast:
    tokenizer = with_bos()
    template = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    tokenizer.backend_tokenizer.post_processor = template
    return tokenizer


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, initializer_range=0.3, max_position_embeddings=64)).eval()


def hooked(tokenizer: PreTrainedTokenizerFast | None) -> HookedModel:
    return HookedModel.from_model(llama(), tokenizer, [random_transcoder(n, 32) for n in range(2)])


@pytest.fixture(scope="module")
def bare() -> HookedModel:
    """A model without a tokenizer."""
    return hooked(None)


# -- ids in every form -------------------------------------------------------------------------------------------------

FORMS = {
    "list": list,
    "tuple": tuple,
    "tensor": torch.tensor,
    "row": lambda ids: torch.tensor([ids]),
    "int32": lambda ids: torch.tensor(ids, dtype=torch.int32),
    "array": np.array,
    "array row": lambda ids: np.array([ids], dtype=np.int32),
    "unsigned": lambda ids: np.array(ids, dtype=np.uint16),
    "numpy ints": lambda ids: [np.int64(i) for i in ids],
    "tensor scalars": lambda ids: [torch.tensor(i) for i in ids],
    "encoding": lambda ids: {"input_ids": ids, "attention_mask": [1] * len(ids)},
    "encoding of a batch": lambda ids: {"input_ids": [ids]},
    "encoding of tensors": lambda ids: {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids))},
}
VOCABULARY = 64
rows = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=12)
PLAIN = Tokens(None, VOCABULARY, 12)


@given(rows, st.sampled_from(sorted(FORMS)))
def test_ids_are_one_prompt_in_every_form_and_stay_as_they_are(ids, form):
    prompt = FORMS[form](ids)
    with no_checks():
        assert is_one(prompt)
        assert PLAIN.tokenize(prompt) == ids
        assert all(type(i) is int for i in PLAIN.tokenize(prompt))
        assert PLAIN.batch(listed(prompt)).ids.tolist() == [ids]


def broken(ids: list[int]) -> st.SearchStrategy[object]:
    """The same row with one item, or the whole of it, made into what is no token id."""
    item = st.one_of(
        st.floats(),
        st.booleans(),
        st.none(),
        st.binary(),
        st.just(np.float32(3)),
        st.just(np.bool_(True)),
        st.just(torch.tensor(True)),
        st.just(torch.tensor(3.0)),
        st.just("3"),
        st.just([3]),
        st.integers(max_value=-1),
        st.integers(min_value=VOCABULARY),
    )
    spoilt = st.tuples(st.integers(0, len(ids) - 1), item).map(lambda at: [*ids[: at[0]], at[1], *ids[at[0] + 1 :]])
    whole = st.sampled_from(
        [
            bytes(ids),
            bytearray(ids),
            memoryview(bytes(ids)),
            torch.tensor(ids).float(),
            torch.tensor(ids).bool(),
            np.array(ids, dtype=float),
            np.array(ids, dtype=bool),
            torch.tensor([ids, ids]),
            torch.tensor([[ids]]),
            torch.tensor(ids[0]),
            [ids, ids],
            [ids],
            None,
            3,
            2.5,
            {"role": "user", "content": "w1"},
            {},
            {"input_ids": [ids, ids]},
            {"input_ids": ids, "attention_mask": [0] + [1] * (len(ids) - 1)},
            {i: i for i in ids},
            set(ids),
            iter(ids),
            [],
            torch.tensor([], dtype=torch.long),
            ids * 13,
            "w1",
        ]
    )
    return st.one_of(spoilt, whole)


@given(rows.flatmap(broken))
def test_whatever_is_no_row_of_ids_is_refused_in_words(prompt):
    with no_checks(), pytest.raises(ModelError if isinstance(prompt, str) else PromptError):
        PLAIN.tokenize(prompt)


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        (["w1 w2", "w3"], "a list of prompts where one is meant"),
        ([[5, 6], [7]], "a list of prompts where one is meant"),
        (torch.tensor([[5, 6], [7, 8]]), r"int64 of shape \[2, 2\]"),
        ([{"role": "user", "content": "w1"}], r"model\.host\.chat"),
        ({"role": "user", "content": "w1"}, r"model\.host\.chat"),
        (b"\x03\x04", "found: bytes"),
        ([5, 6.9], "6.9 is no token id"),
        ([5, True], "True is no token id"),
        (None, "found: NoneType"),
        ("w1 \udcff", "not valid text"),
    ],
)
def test_what_is_wrong_with_a_prompt_is_said_by_every_call(odd, unchecked, prompt, said):
    calls = (odd.run, odd.features, odd.swap, odd.session, odd.stream, odd.sweep, lambda p: odd.run_many([p]))
    for call in (*calls, lambda p: trace(odd, p)):
        with pytest.raises(PromptError, match=said):
            call(prompt)


def test_one_text_is_no_list_of_prompts(odd, unchecked):
    """It would be read letter by letter."""
    with pytest.raises(PromptError, match=r"repair: \[prompt\]"):
        odd.run_many("w1 w2")


def test_rows_of_a_tensor_are_as_many_prompts_where_several_are_taken(odd):
    rows = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]])
    wanted = odd.record(rows.tolist())
    for given_rows in (rows, rows.numpy(), list(rows)):
        assert torch.equal(odd.record(given_rows).logits, wanted.logits)
        made = odd.generate(given_rows, max_new_tokens=2)
        assert [row.ids for row in made] == [row.ids for row in odd.generate(rows.tolist(), max_new_tokens=2)]


def test_what_a_tokenizer_returns_is_its_ids(odd, unchecked):
    wanted = odd.run("w1 w2")
    for options in ({}, {"return_tensors": "pt"}, {"return_tensors": "np"}):
        assert torch.equal(odd.run(word_tokenizer()("w1 w2", **options)).logits, wanted.logits)
    padded = word_tokenizer()(["w1 w2", "w3"], padding=True, return_tensors="pt")
    with pytest.raises(PromptError, match=r"shape \[2, 2\]"):
        odd.run(padded)
    with pytest.raises(PromptError, match="padding"):
        odd.run({name: rows[1:] for name, rows in padded.items()})


# -- no tokenizer ------------------------------------------------------------------------------------------------------


def test_without_a_tokenizer_ids_give_what_they_give_with_one(bare):
    other = hooked(with_bos())
    plan = [Clamp("L1/3@1", 5.0)]
    assert torch.equal(bare.run(IDS, plan).logits, other.run(IDS, plan).logits)
    assert bare.run(IDS).batch.strings == (("<5>", "<6>", "<7>"),)
    made = bare.generate(IDS, plan, max_new_tokens=4)
    assert made.ids == other.generate(IDS, plan, max_new_tokens=4).ids
    assert made.text == "".join(f"<{i}>" for i in made.ids)
    assert list(bare.features(IDS, top=1).token) == ["<5>", "<6>", "<7>"]
    assert bare.run(IDS).effect(9, 8) == other.run(IDS).effect(9, 8)
    assert bare.sweep(IDS, [plan], target=9, against=8).tokens == ("<5>", "<6>", "<7>")


def test_without_a_tokenizer_text_is_refused_in_words(bare):
    for call in (
        lambda: bare.run("w1"),
        lambda: bare.host.chat("w1"),
        lambda: bare.run(IDS).effect("w1"),
        lambda: trace(bare, IDS, Answer("w1")),
    ):
        with pytest.raises(UserError, match="no tokenizer, so it reads no text"):
            call()
    with pytest.raises(ModelError, match="TransformerLens needs a tokenizer"):
        _ = bare.bridge


# -- targets and names -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [2.5, True, b"w1", None, [3], np.float64(3), torch.tensor(3.0), torch.tensor(True)])
def test_a_target_that_is_neither_text_nor_an_id_is_refused(odd, unchecked, target):
    with pytest.raises(TargetError, match="no token"):
        odd.host.token_id(target)


def test_a_target_that_is_no_valid_text_is_refused(odd):
    for call in (lambda: odd.host.token_id("\udcff"), lambda: trace(odd, "w1 w2", Answer("w1 \udcff"))):
        with pytest.raises(TargetError, match="not valid text"):
            call()


# -- beginning of the sequence -----------------------------------------------------------------------------------------

TOKENIZERS = {
    "has a BOS": with_bos,
    "adds a BOS": lambda: with_bos(adds=True),
    "no BOS": word_tokenizer,
    "adds an EOS": appends_eos,
}


@pytest.mark.filterwarnings("ignore")  # of transformer-lens's own imports
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_bridge_reads_text_as_the_model_does(kind):
    """The tokenizer is in memory and was never saved: TransformerLens would look for its folder to add a BOS."""
    pytest.importorskip("transformer_lens")
    model, plan = hooked(TOKENIZERS[kind]()), [Clamp("L1/3@1", 5.0)]
    before = copy.deepcopy(model.host.tokenizer.special_tokens_map)
    for text in ("w1 w2 w3 w4", "w5"):
        assert model.bridge.to_tokens(text).tolist() == [model.host.tokenize(text)]
    given = model.bridge.run_with_hooks("w1 w2 w3 w4", fwd_hooks=model.fwd_hooks(plan))
    torch.testing.assert_close(given[0], model.run("w1 w2 w3 w4", plan).logits, rtol=1e-4, atol=1e-4)
    texts = ["w1 w2 w3", "w4 w5"]
    several = model.bridge.run_with_hooks(texts, fwd_hooks=model.fwd_hooks(plan), padding_side="left")
    wanted = torch.stack([model.run(text, plan).logits[-1] for text in texts])
    torch.testing.assert_close(several[:, -1], wanted, rtol=1e-4, atol=1e-4)
    assert model.host.tokenizer.special_tokens_map == before


@pytest.mark.filterwarnings("ignore")
def test_a_tokenizer_from_a_folder_is_read_by_the_bridge_as_by_the_model(tmp_path):
    pytest.importorskip("transformer_lens")
    llama().save_pretrained(tmp_path)
    with_bos().save_pretrained(tmp_path)
    model = HookedModel.load(tmp_path, [random_transcoder(0, 32)])
    assert model.bridge.to_tokens("w1 w2").tolist() == [model.host.tokenize("w1 w2")] == [[4, 5]]
    assert model.bridge.to_tokens("w1 w2", prepend_bos=True).tolist() == [[1, 4, 5]]


def chatting() -> Tokens:
    tokenizer = with_bos(adds=True)
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %} w50 {{ m['content'] }}{% endfor %} w51"
    return Tokens(tokenizer, 64, 64)


def test_a_second_bos_is_said_once_per_prompt_with_the_repair(caplog):
    tokens, chat = chatting(), [{"role": "user", "content": "w1 w2"}]
    text = tokens.tokenizer.apply_chat_template(chat, tokenize=False)
    with caplog.at_level(logging.WARNING, "hooks"):
        assert tokens.tokenize("w1 w2")[:2] == [1, 4]
        ids = tokens.chat(chat)
        assert tokens.tokenize(ids) == ids == [1, *tokens.split("w50 w1 w2 w51")]
        assert not caplog.records
        for _ in range(3):
            assert tokens.tokenize(text) == [1, *ids]
        assert [record.getMessage() for record in caplog.records] == [
            f"{text!r} begins with <s>, and the tokenizer puts another one in front: the model reads two; "
            "give the messages to model.host.chat (--chat), or the text without its own"
        ]
        tokens.tokenize(tokens.tokenizer(text))
        assert "add_special_tokens=False" in caplog.records[-1].getMessage()


def test_unknown_words_are_said_once_per_prompt(caplog):
    tokens = Tokens(with_bos(), 64, 64)
    with caplog.at_level(logging.WARNING, "hooks"):
        for prompt in ("w1 nowhere", "w1 nowhere", "w2 nowhere"):
            tokens.tokenize(prompt)
    assert len(caplog.records) == 2


# -- code of a model's own ---------------------------------------------------------------------------------------------


def folder_with_code(folder: Path, file: str, facts: dict) -> Path:
    """A model's folder whose `file` names code beside it; returns what that code would write."""
    random_qwen2().save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    mark = folder / "ran"
    (folder / "own.py").write_text(f"open({str(mark)!r}, 'w')\n")
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | facts))
    return mark


@pytest.fixture
def nobody_is_asked(monkeypatch) -> None:
    def asked(*_: object) -> str:
        raise AssertionError("asked on stdin")

    monkeypatch.setattr("builtins.input", asked)


def test_a_model_that_needs_code_of_its_own_is_refused_and_nobody_is_asked(tmp_path, nobody_is_asked):
    code = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}
    mark = folder_with_code(tmp_path, "config.json", {"model_type": "own", "auto_map": code})
    with pytest.raises(ModelError, match="needs code that its folder brings"):
        Host.load(tmp_path)
    assert not mark.exists()


def test_a_tokenizer_of_a_model_that_transformers_knows_is_read_without_its_code(tmp_path, nobody_is_asked):
    code = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    mark = folder_with_code(tmp_path, "tokenizer_config.json", code)
    assert Host.load(tmp_path).tokenize("w1 w2")
    assert not mark.exists()
