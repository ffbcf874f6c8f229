"""Generation with caches against recomputing everything, and the promises it makes."""

import pytest
import torch

from dualtoken.generation.generators import generate, generate_images, generate_text, stream, stream_text
from dualtoken.generation.likelihood import document_nll, option_log_likelihoods
from dualtoken.generation.sampling import Sampling, row_noise
from dualtoken.unified_model.sequence import Document, ImagePart, TextPart, pack_documents, tokenize_document
from tests.support.unified_support import (
    CODES,
    DEPTH,
    IDS,
    POSITIONS,
    TOKENIZER,
    caption,
    generation,
    plain,
    random_codes,
    tiny_model,
    tokenized,
)

PROMPTS = ["red apple", "a", "", "some longer prompt with words"]


@pytest.fixture(scope="module")
def model():
    return tiny_model(seed=5, sharpen=30.0, initializer_range=0.3)


def hidden_states(model, ids, codes):
    """The decoder on one whole row, nothing cached: [T, H]."""
    codes = torch.tensor(codes, dtype=torch.long).reshape(-1, *model.config.code_shape[1:])
    embedded = model.embed(torch.tensor(ids)[None], codes)
    return model.llm.base_model(inputs_embeds=embedded, use_cache=False).last_hidden_state[0]


@torch.no_grad()
def naive_image(model, prompt, guidance_scale):
    """Greedy codes, the decoder and both heads run anew for every single code."""
    text = TOKENIZER(prompt, add_special_tokens=False)["input_ids"] if prompt else []
    rows = [[IDS.end_of_text, *text, IDS.image_gen_start], [IDS.end_of_text, IDS.image_gen_start]]
    codes = []
    for _ in range(POSITIONS):
        position = [[], []]
        for q, (projector, head) in enumerate(model.visual_heads()):
            for depth in range(DEPTH):
                so_far = torch.zeros(1, 2, DEPTH, dtype=torch.long)
                so_far[0, q, :depth] = torch.tensor(position[q], dtype=torch.long)
                prefix = model.codebooks(so_far)[:, q, :-1].cumsum(dim=1)
                logits = []
                for row in rows:
                    ids = row + [IDS.image_pad] * len(codes)
                    hidden = hidden_states(model, ids, codes)[-1:]
                    logits.append(head.logits(projector(hidden), prefix)[0, depth])
                conditional, unconditional = logits
                guided = unconditional + guidance_scale * (conditional - unconditional)
                position[q].append(int((conditional if guidance_scale == 1 else guided).argmax()))
        codes.append(position)
    return torch.tensor(codes)


@torch.no_grad()
def naive_text(model, prefix, count):
    document = tokenize_document(prefix, TOKENIZER, IDS, end=False)
    ids, new = document.input_ids.tolist(), []
    for _ in range(count):
        logits = model.llm.get_output_embeddings()(
            hidden_states(model, ids + new, document.codes.tolist())[-1]
        )
        logits[[*(IDS.ids() - {IDS.end_of_text}), *range(len(TOKENIZER), len(logits))]] = float("-inf")
        token = int(logits.argmax())
        if token == IDS.end_of_text:
            break
        new.append(token)
    return TOKENIZER.decode(new)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_cached_batched_images_equal_recomputed_single_ones(model, guidance_scale):
    codes = generate_images(model, TOKENIZER, PROMPTS, guidance_scale=guidance_scale, temperature=0)
    assert codes.shape == (len(PROMPTS), POSITIONS, 2, DEPTH)
    for prompt, got in zip(PROMPTS, codes, strict=True):
        assert torch.equal(got, naive_image(model, prompt, guidance_scale)), prompt
        alone = generate_images(model, TOKENIZER, [prompt], guidance_scale=guidance_scale, temperature=0)
        assert torch.equal(got, alone[0])
    assert len(codes.unique(dim=0)) == len(PROMPTS)  # the prompts matter


@pytest.mark.parametrize("visual_input", ["pixel", "semantic"])
def test_a_model_that_reads_one_codebook_draws_and_scores_with_that_one_alone(visual_input):
    model = tiny_model(seed=5, sharpen=30.0, initializer_range=0.3, visual_input=visual_input)
    codes = generate_images(model, TOKENIZER, PROMPTS[:2], guidance_scale=3.0, temperature=0)
    for prompt, got in zip(PROMPTS, codes):
        assert torch.equal(got, naive_image(model, prompt, 3.0)), prompt
    # With a wrong code in the book that is not read, prompts and likelihoods are what they were.
    unread = 1 - ["pixel", "semantic"].index(visual_input)
    shown = random_codes(torch.Generator().manual_seed(1))
    other = shown.clone()
    other[:, unread] = (other[:, unread] + 1) % CODES
    prefixes = [Document([ImagePart(one), TextPart("Say: ")]) for one in (shown, other)]
    texts = generate_text(model, TOKENIZER, prefixes, max_new_tokens=8)
    assert texts[0] == texts[1] == naive_text(model, prefixes[0], 8)
    drawn = generate_images(model, TOKENIZER, prefixes, temperature=0)
    assert torch.equal(drawn[0], drawn[1])
    options = [option_log_likelihoods(model, TOKENIZER, [prefix], [["a", "bc"]])[0] for prefix in prefixes]
    assert options[0] == options[1]
    other[:, 1 - unread] = (other[:, 1 - unread] + 1) % CODES
    changed = Document([ImagePart(other), TextPart("Say: ")])
    assert option_log_likelihoods(model, TOKENIZER, [changed], [["a", "bc"]])[0] != options[0]


def test_guidance_of_one_is_no_guidance_bit_for_bit(model, monkeypatch):
    import dualtoken.generation.decoding as decoding

    rows = []
    original = decoding.Rows

    def counted(model, documents):
        rows.append(len(documents))
        return original(model, documents)

    monkeypatch.setattr(decoding, "Rows", counted)
    first = generate_images(model, TOKENIZER, PROMPTS, seed=3)
    explicit = generate_images(model, TOKENIZER, PROMPTS, guidance_scale=1.0, seed=3)
    guided = generate_images(model, TOKENIZER, PROMPTS, guidance_scale=1.5, seed=3)
    assert torch.equal(first, explicit) and not torch.equal(first, guided)
    assert rows == [4, 4, 8]  # no unconditional rows without guidance


def test_guidance_on_the_empty_prompt_changes_nothing(model):
    codes = generate_images(model, TOKENIZER, [""], temperature=0)
    assert torch.equal(codes, generate_images(model, TOKENIZER, [""], guidance_scale=4.0, temperature=0))


def test_cached_batched_text_equals_recomputed_single_text(model):
    prefixes = [
        Document([ImagePart(random_codes(torch.Generator().manual_seed(1))), TextPart("Say: ")]),
        Document([TextPart("x")]),
        Document([ImagePart(random_codes(torch.Generator().manual_seed(i))) for i in (2, 3)]),
    ]
    texts = generate_text(model, TOKENIZER, prefixes, max_new_tokens=12)
    assert texts == [naive_text(model, prefix, 12) for prefix in prefixes]
    assert texts == [generate_text(model, TOKENIZER, [prefix], max_new_tokens=12)[0] for prefix in prefixes]
    assert len(set(texts)) == 3


def test_seeds_decide_and_rows_do_not_depend_on_their_neighbours(model):
    settings = {"guidance_scale": 2.0, "temperature": 1.3, "top_k": 8, "top_p": 0.95}
    codes = generate_images(model, TOKENIZER, PROMPTS, seed=10, **settings)
    assert torch.equal(codes, generate_images(model, TOKENIZER, PROMPTS, seed=10, **settings))
    assert not torch.equal(codes, generate_images(model, TOKENIZER, PROMPTS, seed=99, **settings))
    for i, prompt in enumerate(PROMPTS):
        assert torch.equal(codes[i], generate_images(model, TOKENIZER, [prompt], seed=10 + i, **settings)[0])
    reversed_codes = generate_images(model, TOKENIZER, PROMPTS[::-1], seed=[13, 12, 11, 10], **settings)
    assert torch.equal(codes, reversed_codes.flip(0))
    first, second = (generate_images(model, TOKENIZER, ["a"], **settings) for _ in range(2))
    assert not torch.equal(first, second)  # without a seed


def test_text_never_holds_image_tokens_and_ends_where_it_is_told(model):
    biased = tiny_model(seed=6)
    with torch.no_grad():  # wants nothing but image tokens, then rows beyond the text tokenizer, then to end
        head = biased.get_output_embeddings()
        head.bias = torch.nn.Parameter(torch.zeros(head.out_features))
        head.bias[list(IDS.ids())] = 50.0
        head.bias[len(TOKENIZER) :] = 90.0
    assert generate_text(biased, TOKENIZER, ["x"], max_new_tokens=5) == [""]  # end of text at once
    with torch.no_grad():
        head.bias[IDS.end_of_text] = -50.0
    text = generate_text(biased, TOKENIZER, ["x"], max_new_tokens=5)[0]
    assert len(TOKENIZER(text, add_special_tokens=False)["input_ids"]) == 5
    assert not IDS.ids() & set(TOKENIZER(text)["input_ids"])


def test_a_stream_adds_up_to_the_text(model):
    for seed in range(3):
        settings = {"max_new_tokens": 20, "temperature": 1.0, "seed": seed}
        pieces = list(stream_text(model, TOKENIZER, "x", **settings))
        assert "".join(pieces) == generate_text(model, TOKENIZER, ["x"], **settings)[0]
        assert len(pieces) > 1
        for cut in range(1, len(pieces)):
            assert not "".join(pieces[:cut]).endswith("\N{REPLACEMENT CHARACTER}")


def test_mixed_conversation_writes_images_whole():
    wants_images = tiny_model(seed=7, sharpen=30.0)
    with torch.no_grad():
        head = wants_images.get_output_embeddings()
        head.bias = torch.nn.Parameter(torch.zeros(head.out_features))
        head.bias[IDS.image_gen_start] = 100.0
        head.bias[IDS.end_of_text] = -100.0
    prefix = Document([TextPart("change"), ImagePart(random_codes(torch.Generator().manual_seed(4)))])
    greedy = Sampling(temperature=0)
    parts = generate(
        wants_images,
        TOKENIZER,
        prefix,
        max_new_tokens=6,
        max_images=2,
        guidance_scale=2.0,
        image_sampling=greedy,
    )
    kinds = [type(part) for part in parts]
    assert kinds == [ImagePart, ImagePart, TextPart]
    assert all(part.codes.shape == (POSITIONS, 2, DEPTH) for part in parts[:2])
    # The parts are what the model writes when each is asked for by itself, after what came before.
    first = generate_images(wants_images, TOKENIZER, [prefix], guidance_scale=2.0, temperature=0)[0]
    assert torch.equal(first, parts[0].codes)
    longer = Document([*prefix.parts, parts[0]])
    second = generate_images(wants_images, TOKENIZER, [longer], guidance_scale=2.0, temperature=0)[0]
    assert torch.equal(second, parts[1].codes)
    rest = Document([*prefix.parts, *parts[:2]])
    assert parts[2].text == generate_text(wants_images, TOKENIZER, [rest], max_new_tokens=4)[0]


def chatty_model(image_bias):
    """Writes the letters a, b and c by chance; `image_bias` says how gladly it draws."""
    model = tiny_model(seed=8)
    with torch.no_grad():
        head = model.get_output_embeddings()
        head.bias = torch.nn.Parameter(torch.full((head.out_features,), -100.0))
        head.bias[TOKENIZER.convert_tokens_to_ids(["a", "b", "c"])] = 0.0
        head.bias[IDS.image_gen_start] = image_bias
    return model


def test_a_stream_of_text_and_images_adds_up_to_what_generate_returns():
    settings = {"max_new_tokens": 24, "max_images": 2, "text_sampling": Sampling(), "seed": 3}
    model, calls = chatty_model(image_bias=0.0), []
    pieces = list(stream(model, TOKENIZER, "x", progress=lambda *done: calls.append(done), **settings))
    parts = generate(model, TOKENIZER, "x", **settings)
    images = [piece for piece in pieces if isinstance(piece, ImagePart)]
    assert len(images) == 2 and calls == [(i + 1, POSITIONS) for i in range(POSITIONS)] * 2
    assert len(pieces) == 24  # each token of text as it came (the starts of images count), each image whole
    written = iter(pieces)
    for part in parts:
        if isinstance(part, ImagePart):
            assert torch.equal(next(written).codes, part.codes)
        else:
            assert part.text == "".join(next(written) for _ in part.text)
    assert next(written, None) is None
    assert sum(isinstance(part, TextPart) for part in parts) >= 2


def test_an_answer_ends_at_its_mark():
    model = chatty_model(image_bias=-100.0)
    settings = {"max_new_tokens": 60, "max_images": 0, "text_sampling": Sampling()}
    for seed in range(5):
        whole = "".join(stream(model, TOKENIZER, "x", seed=seed, **settings))
        assert len(whole) == 60
        for stop in ("ab", "aab", "cac", whole[:2], whole[-3:], "abcabcabcabc"):
            pieces = list(stream(model, TOKENIZER, "x", seed=seed, stop=stop, **settings))
            assert "".join(pieces) == whole.partition(stop)[0]
    assert not model.training and model.train().training
    list(stream(model, TOKENIZER, "x", stop="a", **settings))
    assert model.training  # left as it was, also where the mark broke it off


@pytest.mark.parametrize("write", [generate, generate_text, generate_images])
def test_tags_without_images_and_images_of_another_size_are_named(model, write):
    def prompted(prompt):
        return write(model, TOKENIZER, prompt if write is generate else [prompt])

    with pytest.raises(ValueError, match="the text has 2 <image> tags but 0 images; give one image for each"):
        prompted("mix <image> and <image>")
    document = Document([ImagePart(random_codes()), ImagePart(random_codes(positions=5))])
    with pytest.raises(ValueError, match=r"codes of image 1 have shape \(5, 2, 3\), expected \(4, 2, 3\)"):
        prompted(document)


def test_the_model_is_left_as_it_was(model):
    model.train()
    generate_images(model, TOKENIZER, ["a"], temperature=0)
    assert model.training
    model.eval()
    generate_text(model, TOKENIZER, ["a"], max_new_tokens=2)
    assert not model.training


def test_progress_is_told(model):
    calls = []
    generate_images(model, TOKENIZER, ["a"], progress=lambda done, total: calls.append((done, total)))
    assert calls == [(i + 1, POSITIONS) for i in range(POSITIONS)]


def test_document_likelihoods_equal_single_forwards(model):
    documents = tokenized(
        caption("cat"), generation("dog", 1), plain("some words"), generation("x", 2), plain("")
    )
    torch.set_default_dtype(torch.bfloat16)  # as programs that run other models in bf16 do
    try:
        scores = document_nll(model, documents, context_length=40)
    finally:
        torch.set_default_dtype(torch.float32)
    assert [score.key for score in scores] == [document.key for document in documents]
    for score, document in zip(scores, documents, strict=True):
        output = model(**pack_documents([document]).model_inputs())
        assert score.text_nll == pytest.approx(output.text_nll.item(), rel=1e-4)
        torch.testing.assert_close(score.visual_nll, output.visual_nll.detach(), rtol=1e-4, atol=1e-4)
        assert (score.text_count, score.visual_count) == (output.text_count, output.visual_count)


def test_empty_requests_are_named(model):
    with pytest.raises(ValueError, match="no prompts to generate images for"):
        generate_images(model, TOKENIZER, [])
    with pytest.raises(ValueError, match="no prompts to continue"):
        generate_text(model, TOKENIZER, [])
    for write in (generate_images, generate_text):
        with pytest.raises(ValueError, match="prompts is a single str; expected a list of prompts"):
            write(model, TOKENIZER, "a cat")


def test_an_overfitted_model_says_and_draws_what_it_was_shown():
    words = ["red", "a cat", "moon"]
    codes = [random_codes(torch.Generator().manual_seed(100 + i)) for i in range(len(words))]
    question = TextPart("Say: ", loss=False)
    shown = [
        Document([TextPart(w, loss=False), ImagePart(c, loss=True)])
        for w, c in zip(words, codes, strict=True)
    ]
    shown += [Document([ImagePart(c), question, TextPart(w)]) for w, c in zip(words, codes, strict=True)]
    batch = pack_documents(tokenized(*shown)).model_inputs()
    model = tiny_model(seed=1).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(90):
        output = model(**batch)
        loss = output.text_nll / output.text_count + output.visual_nll.sum() / output.visual_count
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    drawn = generate_images(model, TOKENIZER, words, temperature=0)
    assert torch.equal(drawn, torch.stack(codes))
    sampled = generate_images(model, TOKENIZER, words, guidance_scale=2.0, top_p=0.9, seed=0)
    assert torch.equal(sampled, torch.stack(codes))
    prompts = [Document([ImagePart(c), question]) for c in codes]
    assert generate_text(model, TOKENIZER, prompts) == words


# Sampling


def test_greedy_and_narrow_sampling_agree():
    logits = torch.randn(20, CODES)
    noise = torch.rand(20)
    best = logits.argmax(-1)
    for sampling in (Sampling(0), Sampling(1.0, top_k=1), Sampling(1.0, top_p=1e-9), Sampling(1e-4)):
        assert torch.equal(sampling.choose(logits, noise), best), sampling


@pytest.mark.parametrize(
    "sampling, kept",
    [
        (Sampling(), [0.1, 0.4, 0.2, 0.3]),
        (Sampling(top_k=2), [0, 0.4, 0, 0.3]),
        (Sampling(top_p=0.65), [0, 0.4, 0, 0.3]),
        (Sampling(top_p=0.75), [0, 0.4, 0.2, 0.3]),
        (Sampling(top_k=3, top_p=0.75), [0, 0.4, 0, 0.3]),  # of what top_k has left
        (Sampling(temperature=0.5), [0.01, 0.16, 0.04, 0.09]),
    ],
)
def test_frequencies_follow_the_kept_probabilities(sampling, kept):
    draws = 4000
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log().expand(draws, -1)
    chosen = sampling.choose(logits, row_noise(1, 1, (draws,), torch.device("cpu"))[0])
    counts = chosen.bincount(minlength=4).tolist()
    expected = [draws * p / sum(kept) for p in kept]
    assert all(c == 0 for c, e in zip(counts, expected, strict=True) if e == 0)
    assert all(abs(c - e) < 5 * e**0.5 for c, e in zip(counts, expected, strict=True) if e)


def test_noise_at_the_borders_stays_on_possible_classes():
    logits = torch.tensor([[float("-inf"), 0.0, 0.0, float("-inf")]]).expand(2, -1)
    noise = torch.tensor([0.0, 1.0 - 1e-16], dtype=torch.float64)
    for sampling in (Sampling(), Sampling(top_k=3), Sampling(top_p=0.99)):
        assert set(sampling.choose(logits, noise).tolist()) == {1, 2}


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"temperature": -1}, "temperature=-1; expected 0"),
        ({"top_k": -2}, "top_k=-2; expected 0"),
        ({"top_p": 0}, "top_p=0; expected more than 0"),
        ({"top_p": 1.5}, "top_p=1.5"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**settings)


def test_prompts_longer_than_the_decoder_takes_are_named(model):
    most = model.decoder_config.max_position_embeddings
    room = 1 + model.config.positions_per_image
    fits = "a" * (most - room - 1)  # behind the token that begins a document
    assert generate_images(model, TOKENIZER, [fits]).shape[1] == room - 1
    with pytest.raises(ValueError, match=f"has {most - room + 1} tokens; expected at most {most - room}"):
        generate_images(model, TOKENIZER, ["a", f"{fits}a"])
    assert len(generate_text(model, TOKENIZER, [f"{fits}a"], max_new_tokens=1)) == 1
    with pytest.raises(ValueError, match=f"has {most} tokens; expected at most {most - 1}: the model takes"):
        generate_text(model, TOKENIZER, ["a" * (most - 1)])


def test_seeds_have_to_match_the_prompts(model):
    with pytest.raises(ValueError, match="got 2 seeds for 1 rows"):
        generate_images(model, TOKENIZER, ["a"], seed=[1, 2])
