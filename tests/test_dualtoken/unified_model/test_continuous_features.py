"""Continuous features beside codes or in their place: layout, loss, what sees what, the tower."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from data_pipeline.streams.packing import split_document
from dualtoken.generation.decoding import append, text_steps
from dualtoken.generation.generators import generate, generate_images, open_document
from dualtoken.generation.sampling import Sampling
from dualtoken.unified_model.config import feature_fields
from dualtoken.unified_model.sequence import (
    Document,
    ImageLayout,
    ImagePart,
    TextPart,
    pack_documents,
    tokenize_document,
)
from dualtoken.unified_model.tiles import in_order, order_of_ordered
from dualtoken.unified_model.vision_tower import VisionTower, to_bytes, tower_settings
from dualtoken.visual_tokenizer.backbone import hidden_states_after
from tests.support.unified_support import (
    FEATURE_IDS,
    FEATURE_TOKENIZER,
    IDS,
    IMAGE_SIZE,
    POSITIONS,
    SEEN,
    TILES,
    TOKENIZER,
    caption,
    generation,
    in_tiles,
    plain,
    random_codes,
    random_pixels,
    seeing,
    tiny_config,
    tiny_model,
    tokenized,
    vision_model,
)
from tests.test_dualtoken.unified_model.test_tiles import naive_order
from tests.test_dualtoken.unified_model.test_unified_model import (
    assert_same_gradients,
    gradients,
    naive_losses,
)

LAYOUTS = {
    "codes_and_features": ImageLayout(codes=True, features=SEEN),
    "features": ImageLayout(codes=False, features=SEEN),
}
MODELS = {  # config fields of the models that the tests below are run with
    **{name: (name, None) for name in LAYOUTS},
    "tiles": ("codes_and_features", TILES),
    "tiles_alone": ("features", TILES),
}


def image(seed, loss=False):
    codes = random_codes(torch.Generator().manual_seed(seed))
    return ImagePart(codes, loss, random_pixels(seed))


def drawn_then_read():
    """A written image that text follows, one to read, and a written one that nothing follows."""
    parts = [TextPart("a", loss=False), image(7, True), TextPart("then"), image(8), image(9, True)]
    return Document(parts, "mixed")


def documents(layout):
    given = caption("cat", 3), generation("dog", 1), plain("some words"), drawn_then_read()
    return tokenized(*given, layout=layout)


def without_tower(model):
    """The same model for features that were computed before."""
    fields = seeing(model.config.visual_input, False, model.config.image_layout.tiles)
    other = tiny_model(sharpen=8.0, initializer_range=0.3, **fields)
    state = {n: t for n, t in model.state_dict().items() if not n.startswith("vision_tower.")}
    other.load_state_dict(state)
    return other


def precomputed(model, document):
    if document.features is None:
        return document
    features, order = model.vision_tower(document.features), document.feature_order
    if order is None:
        return replace(document, features=features)
    return replace(document, features=in_order(features, order), feature_order=order_of_ordered(order))


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    visual_input, tiles = MODELS[request.param]
    return tiny_model(sharpen=8.0, initializer_range=0.3, **seeing(visual_input, tiles=tiles))


def test_layout_written_out_position_by_position():
    """Every token, label, code and feature of UniToken's order, of images alone, among text, and of none."""
    i = FEATURE_IDS
    a, then = ord_ids("a"), ord_ids("then")
    codes, seen = [i.image_pad] * POSITIONS, [i.image_feature] * SEEN
    none = [-100]

    def labels_of(*pieces):
        return [label for ids, learned in pieces for label in (ids if learned else none * len(ids))]

    written = [i.image_gen_start, *codes, i.image_sep]
    read = {
        "codes_and_features": [i.vision_start, *codes, i.image_sep, *seen, i.vision_end],
        "features": [i.vision_start, *seen, i.vision_end],
    }
    for name, layout in LAYOUTS.items():
        document = tokenized(drawn_then_read(), layout=layout)[0]
        followed = [*written, *seen, i.image_gen_end]
        last = [*written, i.image_gen_end]  # nothing continuous where nothing follows
        ids = [i.begin_of_text, *a, *followed, *then, *read[name], *last, i.end_of_text]
        assert document.input_ids.tolist() == ids
        start = [([i.image_gen_start], True), (codes, False), ([i.image_sep], True)]
        assert document.labels.tolist() == labels_of(
            ([i.begin_of_text], False), (a, False), *start, (seen, False), ([i.image_gen_end], False),
            (then, True), (read[name], False), *start, ([i.image_gen_end], False), ([i.end_of_text], True),
        )  # fmt: skip
        with_codes = [7, 8, 9] if layout.codes else [7, 9]
        assert torch.equal(document.codes, torch.cat([image(seed).codes for seed in with_codes]))
        assert torch.equal(document.features, torch.stack([random_pixels(7), random_pixels(8)]))
        learned = {7: True, 8: False, 9: True}
        mask = [learned[seed] for seed in with_codes for _ in range(POSITIONS)]
        assert document.visual_loss_mask.tolist() == mask

        one = tokenized(caption("x", 3), layout=layout)[0]
        say, x = ord_ids("Say: "), ord_ids("x")
        assert one.input_ids.tolist() == [i.begin_of_text, *read[name], *say, *x, i.end_of_text]
        assert one.labels.tolist() == none * (1 + len(read[name]) + len(say)) + [*x, i.end_of_text]
        text = tokenized(plain("x"), layout=layout)[0]
        assert text.input_ids.tolist() == [i.begin_of_text, *x, i.end_of_text]
        assert text.features is None and len(text.codes) == 0


def ord_ids(text):
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def test_a_prompt_that_goes_on_after_a_drawn_image_has_seen_it():
    layout = LAYOUTS["codes_and_features"]
    prompt = tokenize_document(Document([image(1, True)]), TOKENIZER, FEATURE_IDS, end=False, layout=layout)
    assert prompt.input_ids.tolist()[-SEEN - 1 :] == [*[FEATURE_IDS.image_feature] * SEEN, IDS.image_gen_end]


def test_a_layout_without_features_leaves_them_alone():
    plainly = tokenized(drawn_then_read())[0]
    assert plainly.features is None and not set(plainly.input_ids.tolist()) & {262, 263}
    assert pack_documents([plainly]).features is None


def test_the_loss_is_the_sum_written_out(model):
    """Gradients included, the tower's too: the naive inputs are put together token by token."""
    layout = model.config.image_layout
    given = documents(layout)
    output = model(**pack_documents(given, 480).model_inputs())
    parts = [naive_losses(model, precomputed(model, document)) for document in given]
    text, visual = (sum(values) for values in zip(*parts, strict=True))
    torch.testing.assert_close(output.text_nll, text)
    torch.testing.assert_close(output.visual_nll, visual)
    got = gradients(model, output.text_nll + output.visual_nll.sum())
    expected = gradients(model, text + visual.sum())
    assert got.keys() == {name for name, _ in model.named_parameters()}
    noise = {name for name in got if "vision_tower" in name and "k_proj.bias" in name}  # rounding alone
    assert_same_gradients(*({n: g for n, g in each.items() if n not in noise} for each in (got, expected)))


def test_pixel_codes_beside_features_are_read_without_semantic_ones():
    """A dual encoder: laid out as codes and features, and the loss is the sum written out."""
    model = tiny_model(sharpen=8.0, initializer_range=0.3, **seeing("pixel_and_features"))
    assert model.config.image_layout == LAYOUTS["codes_and_features"]
    document = tokenized(caption("cat", 3), layout=model.config.image_layout)[0]

    def loss_of(**changed):
        with torch.no_grad():
            return float(model(**pack_documents([replace(document, **changed)]).model_inputs()).text_nll)

    expected, _ = naive_losses(model, precomputed(model, document))
    assert loss_of() == pytest.approx(float(expected.detach()), rel=1e-5)
    for book, is_read in ((0, True), (1, False)):
        codes = document.codes.clone()
        codes[:, book] = (codes[:, book] + 1) % 11
        assert (loss_of(codes=codes) != loss_of()) == is_read
    assert loss_of(features=255 - document.features) != loss_of()


def test_packed_documents_equal_single_ones(model):
    given = documents(model.config.image_layout)
    packed = model(**pack_documents(given, 490).model_inputs())
    alone = [model(**pack_documents([document]).model_inputs()) for document in given]
    torch.testing.assert_close(packed.text_nll, sum(o.text_nll for o in alone))
    torch.testing.assert_close(packed.visual_nll, sum(o.visual_nll for o in alone))


def test_features_in_the_model_equal_precomputed_ones_gradients_included(model):
    other = without_tower(model)
    given = documents(model.config.image_layout)
    inside = model(**pack_documents(given).model_inputs())
    with torch.no_grad():
        before = [precomputed(model, document) for document in given]
    brought = other(**pack_documents(before).model_inputs())
    torch.testing.assert_close(inside.text_nll, brought.text_nll)
    torch.testing.assert_close(inside.visual_nll, brought.visual_nll)
    expected = gradients(other, brought.text_nll + brought.visual_nll.sum())
    got = gradients(model, inside.text_nll + inside.visual_nll.sum())
    assert {n for n in got if n not in expected} == {
        n for n, _ in model.named_parameters() if n.startswith("vision_tower.")
    }
    assert_same_gradients({n: g for n, g in got.items() if n in expected}, expected)


@pytest.mark.parametrize("visual_input", LAYOUTS)
def test_nothing_continuous_leaks_into_the_codes_of_its_own_image(visual_input):
    """By gradient: an image's features reach what comes after them, never its own codes or separator."""
    model = tiny_model(sharpen=8.0, initializer_range=0.3, **seeing(visual_input, inside=False))
    layout = model.config.image_layout
    # Two written images, text between and after them: the features of both are in the sequence.
    parts = [image(7, True), TextPart("then"), image(9, True), TextPart("end")]
    for part in parts[::2]:
        part.features = torch.randn(SEEN, 16, generator=torch.Generator().manual_seed(1))
    document = tokenized(Document(parts), layout=layout)[0]
    document.features.requires_grad_(True)
    output = model(**pack_documents([document]).model_inputs())
    separators = (document.input_ids == FEATURE_IDS.image_sep).nonzero()[:, 0]
    words = (document.input_ids < 256).nonzero()[:, 0]

    def reached(loss):
        gradient = torch.autograd.grad(loss, document.features, retain_graph=True)[0]
        return [bool(one.abs().max() > 0) for one in gradient]

    # The heads' sums carry the gradient: mask all but one image's codes, all but one label.
    def visual(which):
        mask = document.visual_loss_mask.clone().view(2, POSITIONS)
        mask[1 - which] = False
        chosen = replace(document, visual_loss_mask=mask.flatten())
        return model(**pack_documents([chosen]).model_inputs()).visual_nll.sum()

    def text(position):
        labels = torch.full_like(document.labels, -100)
        labels[position] = document.labels[position]
        return model(**pack_documents([replace(document, labels=labels)]).model_inputs()).text_nll

    assert output.visual_count == 2 * POSITIONS
    assert reached(visual(0)) == [False, False]
    assert reached(visual(1)) == [True, False]
    assert reached(text(separators[0])) == [False, False]
    assert reached(text(separators[1])) == [True, False]
    assert reached(text(words[0])) == [True, False]
    assert reached(text(words[-1])) == [True, True]


def test_every_part_runs_whatever_the_batch_holds(model):
    model.train()
    layout = model.config.image_layout
    for given in (plain("text alone"), generation("dog")):
        output = model(**pack_documents(tokenized(given, layout=layout)).model_inputs())
        grads = gradients(model, output.text_nll + output.visual_nll.sum())
        assert grads.keys() == {name for name, _ in model.named_parameters()}
        tower = [g for n, g in grads.items() if n.startswith(("vision_tower.", "feature_adapter."))]
        assert tower and all(not g.any() for g in tower)  # nothing continuous is in either
    model.eval()


def test_the_tower_is_the_first_layers_of_a_siglip():
    whole, pixels = vision_model(), random_pixels(2)[None]
    images = pixels / 127.5 - 1
    assert to_bytes(torch.tensor([-1.1, 1.1])).tolist() == [0, 255]  # pictures as decoders paint them
    for layer in (1, 2, 3):
        tower = VisionTower.of_model(whole, layer)
        expected = hidden_states_after(whole, images, {layer})[layer]
        assert torch.equal(tower(images), expected)
        assert torch.equal(tower(pixels), expected)
        assert torch.equal(to_bytes(images), pixels)
        prints = {tower.fingerprint(), VisionTower.of_model(vision_model(13), layer).fingerprint()}
        assert len(prints) == 2 and VisionTower.of_model(vision_model(), layer).fingerprint() in prints
    assert VisionTower.of_model(whole).settings == tower_settings(whole.config, 2)


def test_saved_and_loaded(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    batch = pack_documents(documents(model.config.image_layout)).model_inputs()
    assert torch.equal(loaded(**batch).text_nll, model(**batch).text_nll)
    assert loaded.config.image_layout == model.config.image_layout
    assert loaded.config.special == FEATURE_IDS
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    assert again.vision_tower.fingerprint() == model.vision_tower.fingerprint()
    names = [set(load_file(folder / "model.safetensors")) for folder in (tmp_path, tmp_path / "again")]
    assert names[0] == names[1]


@torch.no_grad()
def test_written_text_is_that_of_the_whole_sequence(model):
    """Prompts with any number of images, packed, then token by token, as the forward pass has them."""
    prompts = [
        in_tiles(Document([image(5), TextPart("what", loss=False)]), model.config.image_layout),
        "words",
        in_tiles(
            Document([image(5), image(6, True), TextPart("and", loss=False)]), model.config.image_layout
        ),
    ]
    rows = [open_document(prompt, FEATURE_TOKENIZER, model) for prompt in prompts]
    steps = list(text_steps(model, FEATURE_TOKENIZER, rows, 4, Sampling(0.0), None))
    written = [[step[row] for step in steps if row in step] for row in range(len(rows))]
    assert len(set(map(tuple, written))) == 3
    never = sorted(FEATURE_IDS.ids() - {FEATURE_IDS.end_of_text})
    for row, tokens in zip(rows, written, strict=True):
        for place, token in enumerate(tokens):
            so_far = append(row, tokens[:place])
            embedded = model.embed(
                so_far.input_ids[None], so_far.codes, so_far.features, so_far.feature_order
            )
            hidden = model.decoder(inputs_embeds=embedded, use_cache=False).last_hidden_state[0, -1]
            logits = model.get_output_embeddings()(hidden)
            logits[never] = float("-inf")
            assert logits.argmax() == token


def test_drawing_reads_codes_and_goes_on_after_it_with_features(model):
    layout = model.config.image_layout
    prompts = [in_tiles(Document([image(5), TextPart("draw", loss=False)]), layout), "draw"]
    codes = generate_images(model, FEATURE_TOKENIZER, prompts, guidance_scale=2.0, temperature=0)
    assert codes.shape == (2, POSITIONS, 2, 3)
    with torch.no_grad():  # sure to draw
        model.llm.get_input_embeddings().weight[IDS.image_gen_start] *= 30
    with pytest.raises(ValueError, match="reads continuous features of an image before it goes on"):
        generate(model, FEATURE_TOKENIZER, "draw", max_new_tokens=4)
    seen, drawing = [], random_pixels(1)
    if layout.tiles:
        crops = layout.tiles.crops((IMAGE_SIZE, IMAGE_SIZE))
        drawing = drawing.expand(crops, -1, -1, -1)

    def see(codes):
        seen.append(codes)
        return drawing

    settings = {"max_images": 2, "max_new_tokens": 6, "seed": 1}
    parts = generate(model, FEATURE_TOKENIZER, "draw", see=see, **settings)
    with torch.no_grad():
        model.llm.get_input_embeddings().weight[IDS.image_gen_start] /= 30
    drawn = [part for part in parts if isinstance(part, ImagePart)]
    assert drawn and len(seen) == len(drawn)
    assert all(torch.equal(part.features, drawing) for part in drawn)


def test_long_documents_are_split_with_their_features(model):
    layout = model.config.image_layout
    parts = [part for seed in range(4) for part in (image(seed, seed % 2 == 1), TextPart("some words"))]
    document = tokenized(Document(parts, "long"), layout=layout)[0]
    pieces, left_out = split_document(document, 90 if layout.tiles else 45, FEATURE_IDS)
    assert left_out == 0 and len(pieces) > 2
    for piece in pieces:
        assert int((piece.input_ids == FEATURE_IDS.image_feature).sum()) == len(what_is_seen(piece))
        assert len(piece.codes) == int((piece.input_ids == FEATURE_IDS.image_pad).sum())
    together = [one for piece in pieces for one in what_is_seen(piece)]
    expected = what_is_seen(document)
    assert len(together) == len(expected) > 0
    for (crop, place), (own_crop, own_place) in zip(together, expected, strict=True):
        assert place == own_place and torch.equal(crop, own_crop)
    assert split_document(document, 11, FEATURE_IDS)[1] == 4  # no image fits
    model(**pack_documents(pieces).model_inputs())


def what_is_seen(document):
    """Crop, its pixels, and place in it at each position of a feature; of no pixels at the end of a row."""
    if document.features is None:
        assert document.feature_order is None
        return []
    if document.feature_order is None:
        return [(image, place) for image in document.features for place in range(SEEN)]
    nothing = torch.zeros(0)
    return [
        (nothing, 0) if crop < 0 else (document.features[crop], place)
        for crop, place in document.feature_order.tolist()
    ]


@pytest.mark.parametrize("visual_input", LAYOUTS)
def test_mistakes_are_named(visual_input):
    model = tiny_model(**seeing(visual_input))
    layout = model.config.image_layout
    bare = Document([ImagePart(random_codes()), TextPart("x")], "bare")
    with pytest.raises(ValueError, match="'bare': an image has no continuous features, which the mode"):
        tokenized(bare, layout=layout)
    bare.parts[0] = ImagePart(None)
    with pytest.raises(ValueError, match="'bare': an image has no codes"):
        tokenized(bare)
    bare.parts[0] = ImagePart(random_codes(), features=torch.zeros(SEEN + 1, 16))
    with pytest.raises(ValueError, match=r"shape \(10, 16\) and type torch.float32, expected floats \[9,"):
        tokenized(bare, layout=layout)
    bare.parts[0] = ImagePart(random_codes(), features=torch.zeros(SEEN, 16))
    floats = tokenized(bare, layout=layout)
    with pytest.raises(ValueError, match=r"\(1, 9, 16\), the model expects images \[images, 3, 32, 32\]"):
        model(**pack_documents(floats).model_inputs())
    with pytest.raises(ValueError, match="features of different shapes and types"):
        pack_documents([*floats, *documents(layout)])
    mixed = Document([bare.parts[0], image(1)], "two kinds")
    with pytest.raises(ValueError, match="'two kinds': images of one document have features of shapes"):
        tokenized(mixed, layout=layout)
    batch = pack_documents(documents(layout)).model_inputs()
    with pytest.raises(ValueError, match="27 positions of continuous features but features of 2 images"):
        model(**{**batch, "features": batch["features"][:2]})
    with pytest.raises(ValueError, match="the model expects none, it reads codes alone"):
        tiny_model()(
            **{**pack_documents(tokenized(caption("x"))).model_inputs(), "features": batch["features"]}
        )
    with pytest.raises(ValueError, match="this model has no vision tower; build its config"):
        tiny_model().set_vision_tower(vision_model())
    with pytest.raises(ValueError, match="has num_hidden_layers=1, the config asks for 2"):
        model.set_vision_tower(vision_model(layers=1))
    with pytest.raises(ValueError, match="features after layer 4; expected 1 to 3"):
        tower_settings(vision_model().config, 4)
    with pytest.raises(ValueError, match=r"images have shape \(1, 3, 8, 8\), the vision tower expects"):
        model.vision_tower(torch.zeros(1, 3, 8, 8))


def test_mistakes_with_tiles_are_named():
    model = tiny_model(**seeing("codes_and_features", tiles=TILES))
    layout = model.config.image_layout
    whole = Document([image(1), TextPart("x")], "one")
    with pytest.raises(ValueError, match="'one': an image has no size, which tells a model of tiles"):
        tokenize_document(whole, FEATURE_TOKENIZER, FEATURE_IDS, layout=layout)
    whole.parts[0] = replace(image(1), size=(40, 60))
    expected = r"expected floats \[33, width\] or pixels uint8 \[5, 3, size, size\] at size \(40, 60\)"
    with pytest.raises(ValueError, match=r"shape \(3, 32, 32\) and type torch.uint8, " + expected):
        tokenize_document(whole, FEATURE_TOKENIZER, FEATURE_IDS, layout=layout)
    batch = pack_documents(documents(layout)).model_inputs()
    order = batch["feature_order"]
    message = f"{len(order)} positions of continuous features but an order of {len(order) - 1}; take"
    with pytest.raises(ValueError, match=message):
        model(**{**batch, "feature_order": order[1:]})
    last = int(order[:, 0].max())
    message = f"goes up to crop {last} and place 8, but there are {last} crops with 9 places"
    with pytest.raises(ValueError, match=message):
        model(**{**batch, "features": batch["features"][:last]})
    with pytest.raises(ValueError, match=r"with no feature_order, the model has tiles=\[\[1, 2\], \[2, 1\]"):
        model(**{name: value for name, value in batch.items() if name != "feature_order"})
    plainly = tiny_model(**seeing("codes_and_features"))
    with pytest.raises(ValueError, match=r"come with a feature_order \(\d+, 2\), the model has tiles=\[\]"):
        plainly(**batch)


def test_images_in_tiles_written_out_position_by_position():
    """Base picture, then the rows of tiles, each row with its end: the tokens, and what they stand for."""
    i, layout = FEATURE_IDS, tiny_config(**seeing("codes_and_features", tiles=TILES)).image_layout
    given = in_tiles(Document([image(3), TextPart("and"), image(5)]), layout)
    sizes = [given.parts[0].size, given.parts[2].size]
    assert sizes[0] != sizes[1]
    document = tokenized(given, layout=layout)[0]
    expected, order, crops = [i.begin_of_text], [], 0
    for size, text in zip(sizes, ("and", ""), strict=True):
        seen = naive_order(size, TILES, 3)
        expected += [i.vision_start, *[i.image_pad] * POSITIONS, i.image_sep, *[i.image_feature] * len(seen)]
        expected += [i.vision_end, *ord_ids(text)]
        order += [-1 if one == "end" else (one[0] + crops, one[1]) for one in seen]
        crops += TILES.crops(size)
    assert document.input_ids.tolist() == [*expected, i.end_of_text]
    found = [-1 if crop < 0 else (crop, place) for crop, place in document.feature_order.tolist()]
    assert found == order and crops == len(document.features)
    assert torch.equal(document.features[:1], random_pixels(3)[None])


def test_a_model_saved_before_there_were_tiles_loads_as_it_was(tmp_path):
    model = tiny_model(**seeing("features"))
    model.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert content.pop("tiles") == []
    (tmp_path / "config.json").write_text(json.dumps(content), encoding="utf-8")
    assert "feature_adapter.end_of_row" not in load_file(tmp_path / "model.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.config.image_layout == ImageLayout(codes=False, features=SEEN)
    batch = pack_documents(documents(model.config.image_layout)).model_inputs()
    assert torch.equal(loaded(**batch).text_nll, model(**batch).text_nll)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"tiles": [[1, 0]]},
            r"tiles are \[\[1, 0\]\]; expected grids \[rows, columns\] of 1 or more",
        ),
        (
            {
                "tiles": [[1, 2]],
                "visual_input": "both",
                "feature_dim": None,
                "features_per_image": 0,
                "vision_config": None,
            },
            "with visual_input='both' and features_per_image=0; expected a model that reads continuous",
        ),
        (
            {"visual_input": "both"},
            "'both' with feature_dim=16, features_per_image=9 and a vision_config; ",
        ),
        ({"feature_dim": None}, "feature_dim=None, features_per_image=9"),
        (
            {"features_per_image": 4},
            "features_per_image=4, but the tower of vision_config makes 9 featur",
        ),
        (
            {"image_size": 64},
            "reads images of 32 pixels a side, the visual tokenizer of 64; expected",
        ),
        (
            {"special_tokens": vars(IDS)},
            "lacks image_sep and image_feature, which visual_input='codes_",
        ),
    ],
)
def test_wrong_configs_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**{**seeing(), **change})


def test_the_config_takes_sizes_from_a_tower():
    tower = VisionTower.of_model(vision_model())
    inside, brought = feature_fields(tower), feature_fields(tower, inside=False)
    assert inside["vision_config"]["image_size"] == IMAGE_SIZE and "vision_config" not in brought
    assert brought["feature_fingerprint"] == tower.fingerprint()
