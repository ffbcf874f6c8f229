"""Many prompts at a time against one by one: texts that end at different lengths, options, marks."""

from dataclasses import replace

import pytest
import torch

from dualtoken.generation import rows as rows_module
from dualtoken.generation.generators import generate_text, stream_text
from dualtoken.generation.likelihood import option_log_likelihoods
from dualtoken.generation.rows import Rows
from dualtoken.unified_model.sequence import (
    Document,
    ImagePart,
    TextPart,
    pack_documents,
    tokenize_document,
)
from tests.support.unified_support import IDS, TOKENIZER, random_codes, tiny_model
from tests.test_dualtoken.generation.test_generation import naive_text

LETTERS = TOKENIZER.convert_tokens_to_ids(list("abcdefgh"))


def picture(seed):
    return ImagePart(random_codes(torch.Generator().manual_seed(seed)))


PROMPTS = [
    "what?",
    Document([picture(1), TextPart("how many dogs are there, and why?")]),
    "",
    Document([picture(2)]),
    "x" * 150,
    Document([TextPart("first"), picture(3), TextPart("second"), picture(4)]),
    "yes or no",
]


@pytest.fixture(scope="module", params=["qwen2", "llama"])
def model(request):
    """Writes eight letters, and ends at every few of them."""
    model = tiny_model(seed=5, sharpen=30.0, initializer_range=0.3, decoder=request.param)
    with torch.no_grad():
        head = model.get_output_embeddings()
        head.bias = torch.nn.Parameter(torch.full((head.out_features,), -1000.0))
        head.bias[[*LETTERS, IDS.end_of_text]] = 0.0
    return model


def opened(prompt):
    return prompt if isinstance(prompt, Document) else Document([TextPart(prompt)])


@pytest.mark.parametrize("batch_size", [None, 1, 2, 3])
def test_texts_of_different_lengths_equal_recomputed_ones(model, batch_size):
    texts = generate_text(model, TOKENIZER, PROMPTS, max_new_tokens=40, batch_size=batch_size)
    assert texts == [naive_text(model, opened(prompt), 40) for prompt in PROMPTS]
    lengths = sorted(map(len, texts))
    assert lengths[-1] == 40 and lengths[0] < 5 and len(set(lengths)) >= 4


def test_seeds_decide_whoever_the_neighbours_are(model):
    settings = {"max_new_tokens": 40, "temperature": 40.0, "top_k": 8, "top_p": 0.9}
    seeds = [7, 70, 700, 3, 30, 300, 1]
    texts = generate_text(model, TOKENIZER, PROMPTS, seed=seeds, **settings)
    assert len({len(text) for text in texts}) >= 4
    for prompt, seed, text in zip(PROMPTS, seeds, texts, strict=True):
        assert generate_text(model, TOKENIZER, [prompt], seed=seed, **settings) == [text]
        assert "".join(stream_text(model, TOKENIZER, prompt, seed=seed, **settings)) == text
    mixed = generate_text(model, TOKENIZER, PROMPTS[::-1], seed=seeds[::-1], batch_size=2, **settings)
    assert mixed == texts[::-1]


def test_what_has_ended_is_not_computed_and_its_place_is_taken(model, monkeypatch):
    fed = []
    original = Rows.feed
    monkeypatch.setattr(Rows, "feed", lambda self, x: (fed.append(len(x)), original(self, x))[1])
    settings = {"max_new_tokens": 40}
    lengths = [len(text) for text in generate_text(model, TOKENIZER, PROMPTS, **settings)]
    # A text is fed its tokens but for the last one where its length ends it.
    needed = sum(length - (length == 40) for length in lengths)
    assert sum(fed) == needed and sorted(fed, reverse=True) == fed and len(set(fed)) > 3
    fed.clear()
    generate_text(model, TOKENIZER, PROMPTS, batch_size=2, **settings)
    assert sum(fed) == needed and max(fed) == 2
    assert fed.count(1) <= 40  # the last one alone


def test_rows_keep_their_own_keys_as_others_come_go_and_the_cache_grows(model, monkeypatch):
    monkeypatch.setattr(rows_module, "PLACES_AT_A_TIME", 3)
    torch.manual_seed(0)
    documents = [
        tokenize_document(Document([TextPart("k" * length)]), TOKENIZER, IDS, end=False)
        for length in (5, 1, 9, 3)
    ]
    inputs = torch.randint(256, (4, 6))
    with torch.no_grad():
        embed = model.get_input_embeddings()
        rows = Rows(model, documents[:3])
        for step in range(3):
            rows.feed(embed(inputs[:3, step]))
        assert rows.drop({0}) == [2, 1]  # the last one moves up
        rows.add(documents[3:])
        going = [2, 1, 3]
        for step in range(3, 6):
            rows.feed(embed(inputs[going, step]))
        assert rows.lengths == [len(documents[i]) + n for i, n in ((2, 6), (1, 6), (3, 3))]
        for row, i in enumerate(going):
            whole = [*documents[i].input_ids.tolist(), *inputs[i, 3 if i == 3 else 0 :].tolist()]
            alone = model.decoder(inputs_embeds=embed(torch.tensor([whole])), use_cache=False)
            torch.testing.assert_close(rows.hidden[row], alone.last_hidden_state[0, -1], rtol=1e-4, atol=1e-4)


def test_texts_end_at_their_mark(model):
    settings = {"max_new_tokens": 30, "temperature": 60.0, "seed": 11}
    whole = generate_text(model, TOKENIZER, PROMPTS, **settings)
    found = 0
    for stop in ("ab", "c", whole[0][:2], whole[4][-3:], "abcabcabc"):
        texts = generate_text(model, TOKENIZER, PROMPTS, stop=stop, batch_size=3, **settings)
        assert texts == [text.partition(stop)[0] for text in whole]
        found += sum(stop in text for text in whole)
    assert found > 6


def test_no_tokens_no_text_and_no_batch_is_named(model):
    assert generate_text(model, TOKENIZER, PROMPTS, max_new_tokens=0) == [""] * len(PROMPTS)
    with pytest.raises(ValueError, match="batch_size=0; expected at least 1, or None"):
        generate_text(model, TOKENIZER, PROMPTS, batch_size=0)


def test_text_beyond_a_sliding_window_is_named():
    model = tiny_model()
    for layer in model.decoder.layers:
        layer.self_attn.sliding_window = 8
    assert generate_text(model, TOKENIZER, ["abcde"], max_new_tokens=2)
    with pytest.raises(ValueError, match="document of 9 tokens exceeds the decoder's sliding window of 8"):
        generate_text(model, TOKENIZER, ["abcde"], max_new_tokens=9)


# Options

OPTIONS = [
    ["A", "B", "C", "D"],
    [" yes", " no", " it depends on the weather"],
    ["<|endoftext|>", "x"],
    ["b"],
    ["longer than any other of the options here", "b", "longer", "b"],
    ["ä", "\n"],
    ["Yes", "No"],
]


@torch.no_grad()
def scored_alone(model, prompt, option):
    """The option as the target of one document, without a cache."""
    parts = [replace(part, loss=False) for part in opened(prompt).parts]
    document = tokenize_document(Document([*parts, TextPart(option)]), TOKENIZER, IDS, end=False)
    output = model(**pack_documents([document]).model_inputs())
    return -float(output.text_nll), int(output.text_count), bool(output.text_correct == output.text_count)


@pytest.mark.parametrize("decoder", ["qwen2", "llama"])
def test_options_that_share_a_prompt_score_as_documents_of_their_own(decoder):
    model = tiny_model(seed=3, sharpen=20.0, initializer_range=0.3, decoder=decoder).train()
    found = option_log_likelihoods(model, TOKENIZER, PROMPTS, OPTIONS)
    assert model.training
    model.eval()
    assert [len(row) for row in found] == [len(row) for row in OPTIONS]
    for prompt, options, row in zip(PROMPTS, OPTIONS, found, strict=True):
        for option, score in zip(options, row, strict=True):
            expected, tokens, most_likely = scored_alone(model, prompt, option)
            assert score.log_likelihood == pytest.approx(expected, rel=1e-4, abs=1e-4)
            assert (score.tokens, score.most_likely) == (tokens, most_likely)
    assert found[4][1] == found[4][3]  # whatever stands between them
    assert min(found[0], key=lambda one: one.log_likelihood).log_likelihood < -1
    letters = option_log_likelihoods(model, TOKENIZER, PROMPTS[:1], OPTIONS[:1])  # nothing to read after it
    assert [one.log_likelihood for one in letters[0]] == pytest.approx([o.log_likelihood for o in found[0]])


def test_the_text_that_is_written_is_the_most_likely_option(model):
    texts = generate_text(model, TOKENIZER, PROMPTS[:4], max_new_tokens=6)
    asked = [(prompt, text) for prompt, text in zip(PROMPTS, texts) if text]
    found = option_log_likelihoods(
        model, TOKENIZER, [prompt for prompt, _ in asked], [[text, text + "zz"] for _, text in asked]
    )
    assert len(asked) >= 2 and [[one.most_likely for one in row] for row in found] == [[True, False]] * len(
        asked
    )


@pytest.mark.parametrize(
    "prompts, options, message",
    [
        ([], [], "got 0 prompts and options of 0; give at least one prompt"),
        (["a"], [["b"], ["c"]], "got 1 prompts and options of 2"),
        (["a", "b"], [["c"], []], r"prompt 1 has the options \[\]; expected a list of at least one text"),
        ("a", [["b"]], "prompts is a single str; expected a list of prompts"),
        (["a"], ["yes"], "prompt 0 has the options 'yes'; expected a list"),
        (["a"], [["b", ""]], "option 1 of prompt 0 is '', which has no tokens; leave it out"),
    ],
)
def test_options_that_cannot_be_scored_are_named(model, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        option_log_likelihoods(model, TOKENIZER, prompts, options)
