import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from data_pipeline.sources.text_tokenizer import SPECIAL_TOKENS, train_text_tokenizer

VOCAB_SIZE = 400
WORDS = ["zwei violette Hemden", "two purple shirts", "dos camisas moradas: ¿qué?"]
TEXTS = [
    "The quick brown fox doesn't jump; it's 12,345 steps away!",
    "  leading, trailing and   inner   spaces \n\n\t and tabs\r\n",
    "Grüße aus Köln: äöüß, señor ¿qué tal? œuvre, naïve, Ωμέγα, Привет мир",
    "中文和日本語のテキスト、한국어 문장, العربية, हिन्दी, ไทย",
    "🍎👩‍🚒❤️🏳️‍🌈 and zero\u200bwidth, e\u0301 decomposed",
    "def f(x):\n    return {'a': [1, 2]}  # ---- ====\n",
    "",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "t"
    return AutoTokenizer.from_pretrained(train_text_tokenizer(folder, WORDS * 3, VOCAB_SIZE))


def test_words_that_come_often_are_one_token(trained):
    assert trained.tokenize("zwei violette Hemden") == ["zwei", "Ġviolette", "ĠHemden"]
    assert trained.tokenize("two purple camisas") == ["two", "Ġpurple", "Ġcamisas"]
    assert len(trained.tokenize("violas")) > 1


def test_no_more_entries_than_asked_for_and_special_ones_last(tmp_path, trained):
    least = 256 + len(SPECIAL_TOKENS)
    assert least < len(trained) <= VOCAB_SIZE
    ids = trained.convert_tokens_to_ids(list(SPECIAL_TOKENS))
    assert ids == list(range(len(trained) - len(SPECIAL_TOKENS), len(trained)))
    bytes_alone = AutoTokenizer.from_pretrained(train_text_tokenizer(tmp_path / "t", WORDS * 3, least))
    assert len(bytes_alone) == least and len(bytes_alone.tokenize("zwei")) == 4
    with pytest.raises(ValueError, match="vocab_size is 263, expected at least 264: bytes and special"):
        train_text_tokenizer(tmp_path / "u", WORDS, least - 1)


def test_trained_twice_it_is_the_same(tmp_path):
    files = [
        (train_text_tokenizer(tmp_path / name, WORDS * 3, VOCAB_SIZE) / "tokenizer.json").read_bytes()
        for name in ("a", "b", "a")  # the last in place of the first
    ]
    assert files[0] == files[1] == files[2]


def test_special_tokens_are_qwens(trained):
    assert trained.eos_token == trained.pad_token == "<|endoftext|>"
    image = trained.convert_tokens_to_ids("<|image_pad|>")
    assert trained("a<|image_pad|>b")["input_ids"].count(image) == 1
    literal = trained("a<|image_pad|>b", split_special_tokens=True)["input_ids"]
    assert image not in literal
    assert trained.decode(literal) == "a<|image_pad|>b"


@pytest.mark.parametrize("text", TEXTS)
def test_other_texts_round_trip(trained, text):
    assert trained.decode(trained(text)["input_ids"]) == unicodedata.normalize("NFC", text)


@settings(deadline=None, max_examples=100)
@given(text=st.text(max_size=60))
def test_any_text_round_trips(trained, text):
    ids = trained(text, split_special_tokens=True)["input_ids"]
    assert trained.decode(ids) == unicodedata.normalize("NFC", text)
    assert all(i < len(trained) - len(SPECIAL_TOKENS) for i in ids)


def test_saved_again_it_loads_the_same(trained, tmp_path):
    trained.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert again(text)["input_ids"] == trained(text)["input_ids"]
    assert again.chat_template == trained.chat_template


def test_chat_template_is_qwens(trained):
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": "An egg."},
    ]
    assert trained.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What is it?<|im_end|>\n"
        "<|im_start|>assistant\nAn egg.<|im_end|>\n<|im_start|>assistant\n"
    )
    own = [{"role": "system", "content": "Be brief."}]
    assert trained.apply_chat_template(own, tokenize=False) == "<|im_start|>system\nBe brief.<|im_end|>\n"
