"""`dualtoken overfit`: a few pairs, learned by heart by the real trainer, then asked for both ways."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from data_pipeline.shards.code_shards import (
    MANIFEST,
    CodeSample,
    DatasetManifest,
    ShardWriter,
    iterate_shard,
    require_same_codes,
)
from data_pipeline.whole_folder import whole_folder
from dualtoken.unified_model.config import WITH_FEATURES
from eval.inputs import (
    draw_prompts,
    load_codes,
    load_dual_tokenizer,
    load_unified_model,
)
from eval.overfit import Reproduction, reproduce, write_results
from eval.results import read_json
from launchers import processes
from launchers.errors import UserError
from launchers.use import drawing_progress

RECIPE = "quickstart_mllm"
STEPS_FOR_ONE_PAIR = 120  # of the quickstart's recipe; more pairs take the recipe's own
SHARD = "shard-000000.tar"


def overfit(
    pairs: int,
    steps: int | None,
    recipe: str,
    settings: Sequence[str],
    codes: Path,
    visual_tokenizer: Path,
    text_tokenizer: Path,
    output: Path,
    ranks: int,
    seed: int,
    say: Callable[[str], None],
) -> Reproduction:
    """Train on a few pairs until they are known by heart, and ask for them.

    A training that is finished is not repeated, one that was stopped goes on; the results are taken anew.

    Args:
        pairs: how many pairs of one image and a caption to draw from `codes`.
        steps: optimizer steps; by default `STEPS_FOR_ONE_PAIR`, or the recipe's for several pairs.
        recipe: of the unified model.
        settings: words `key=value` that change the recipe; they win over those set here.
        codes: dual-code data set.
        visual_tokenizer: exported visual tokenizer that made it.
        text_tokenizer: folder of the text tokenizer.
        output: folder for pairs, training and results.
        ranks: processes at most; never more than pairs.
        seed: of the draw of the pairs.
        say: called with each line for the user.

    Raises:
        UserError: something is missing, or the pairs did not come back: both texts and codes exactly for one
            pair; for several, better than by chance.
    """
    tokenizer = load_dual_tokenizer(visual_tokenizer)
    if not (text_tokenizer / "tokenizer_config.json").is_file():
        raise UserError(
            f"no text tokenizer in {text_tokenizer}: `dualtoken sample-data` makes a small one, or give "
            "--text-tokenizer"
        )
    manifest, samples = draw_pairs(codes, pairs, seed)
    require_same_codes(codes, manifest.fingerprint, tokenizer.fingerprint(), visual_tokenizer)
    write_pairs(samples, manifest, output / "codes")
    ranks = min(ranks, pairs)
    words = training_words(recipe, steps, settings, samples, text_tokenizer, visual_tokenizer, output, ranks)
    run = output / "training"
    train(words, ranks, say)
    done = read_json(run / "done.json")
    if done is None:
        raise UserError(f"the training in {run} failed; see above, then start the same command again")
    model, words_of_model = load_unified_model(run / "export")
    require_same_codes(codes, manifest.fingerprint, model.config.tokenizer_fingerprint)
    result = reproduce(model, words_of_model, tokenizer, samples, drawing_progress())
    kept = {"recipe": recipe, "steps": done["steps"], "words": words, "seconds": done["wall_seconds"]}
    write_results(result, tokenizer, samples, kept, output)
    for line in outcome(result):
        say(line)
    say(f"written: {output / 'overfit.html'}, {output / 'overfit.json'}")
    if complaint := shortfall(result, done["steps"]):
        raise UserError(complaint)
    return result


def one_caption_each(samples: Sequence[CodeSample]) -> list[CodeSample]:
    """The pairs with one caption each, languages taking turns: one right answer for each question."""
    chosen = []
    for sample, row in zip(samples, draw_prompts(samples), strict=True):
        parts = [{"image": 0, "loss": False}, {"text": row["prompt"]}]
        chosen.append(replace(sample, parts=parts, captions={row["language"]: row["prompt"]}))
    return chosen


def draw_pairs(codes: Path, pairs: int, seed: int) -> tuple[DatasetManifest, list[CodeSample]]:
    """Draw pairs of one image and a caption from a dual-code data set.

    Raises:
        UserError: there is no data set, or it holds fewer pairs.
    """
    if not (codes / MANIFEST).is_file():
        raise UserError(
            f"no dual-code data set in {codes}: `dualtoken pretokenize` makes one, or give --codes"
        )
    samples = one_caption_each(load_codes(codes, pairs, seed))
    if len(samples) < pairs:
        raise UserError(f"{codes} holds {len(samples)} pairs, not {pairs}: give fewer --pairs")
    return DatasetManifest.load(codes), samples


def write_pairs(samples: Sequence[CodeSample], source: DatasetManifest, folder: Path) -> None:
    """Write pairs as a dual-code data set of its own, indexed for the trainer; they may be there already.

    Raises:
        UserError: the folder holds other pairs, which a training there has begun with.
    """
    from data_pipeline.streams import prepare_dataset

    if folder.exists():
        there = DatasetManifest.load(folder)
        known = [(sample.key, sample.captions) for sample in iterate_shard(folder / SHARD)]
        if there.fingerprint != source.fingerprint or known != [(s.key, s.captions) for s in samples]:
            raise UserError(f"{folder.parent} was begun with other pairs: give another --out or remove it")
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    manifest = DatasetManifest(
        source.fingerprint,
        source.codebook_size,
        source.num_quantizers,
        source.positions,
        source.image_size,
        num_codebooks=source.num_codebooks,
        features=source.features,
    )
    with whole_folder(folder) as temporary:
        with ShardWriter(temporary / SHARD, manifest.geometry, features=source.features) as writer:
            for sample in samples:
                writer.write(sample)
        assert writer.entry is not None
        manifest.add(SHARD, replace(writer.entry, samples_in=writer.entry.samples))
        manifest.save(temporary)
        prepare_dataset(temporary)


def training_words(
    recipe: str,
    steps: int | None,
    settings: Sequence[str],
    samples: Sequence[CodeSample],
    text_tokenizer: Path,
    visual_tokenizer: Path,
    output: Path,
    ranks: int,
) -> list[str]:
    """Words for the trainer: the recipe on these pairs alone, always prompted, nothing validated.

    Every code counts alike: a picture has come back when its last code has.
    """
    from pretrain.config import load_job_config

    blend = [
        {"path": str(output / "codes"), "view": view, "weight": weight}
        for view, weight in (("generate", 0.75), ("caption", 0.25))
    ]
    words = [
        f"recipe={recipe}",
        f"run_dir={output / 'training'}",
        f"model.visual_tokenizer={visual_tokenizer}",
        f"model.text_tokenizer={text_tokenizer}",
        f"data.blend={json.dumps(blend)}",
        "data.prompt_dropout=0",
        "losses.pixel=1",
        "losses.semantic=1",
        "validation_data=null",
        "validate_every=0",
        "wandb.mode=disabled",
    ]
    config = load_job_config([*words, *settings], ranks)
    if config.job != "mllm":
        raise UserError(
            f"recipe {recipe} is of the job {config.job}; expected one of the unified model (mllm)"
        )
    one = len(samples) == 1
    steps = steps or (STEPS_FOR_ONE_PAIR if one else config.steps)
    words += [f"steps={steps}", f"optimizer.warmup_steps={steps // 10}"]
    if config.model.heads.get("visual_input") not in WITH_FEATURES:
        # A pack has no use for more room than all the documents take.
        room = sum(_lengths(samples, text_tokenizer))
        words.append(f"data.context_length={min(room, config.data.context_length)}")
    if one:  # all packs are alike, so one of them is the whole batch
        words.append(f"global_batch_size={config.micro_batch_size * ranks}")
    words += settings
    load_job_config(words, ranks)  # a mistake is told once, before any process starts
    return words


def train(words: Sequence[str], ranks: int, say: Callable[[str], None]) -> None:
    """Run the training to its end, or say that it is finished.

    Raises:
        UserError: it ended with an error.
    """
    from pretrain.config import load_job_config
    from pretrain.trainer import finished_before

    if line := finished_before(load_job_config(words, ranks)):
        say(line)
        return
    if code := processes.run(processes.training_command(words, ranks), ranks).returncode:
        raise UserError(f"the training ended with exit code {code}; see above, then start this again")


def _lengths(samples: Sequence[CodeSample], text_tokenizer: Path) -> Iterator[int]:
    """Tokens of each pair's two documents."""
    from transformers import AutoTokenizer

    from data_pipeline.streams.views import caption_document, generation_document, image_parts
    from dualtoken.unified_model.sequence import SpecialTokens, tokenize_document

    tokenizer = AutoTokenizer.from_pretrained(text_tokenizer)
    special = SpecialTokens.from_tokenizer(tokenizer)
    for sample in samples:
        ((language, caption),) = sample.captions.items()
        for document in (
            caption_document(image_parts(sample)[0], language, caption),
            generation_document(sample.codes[0], caption),
        ):
            yield len(tokenize_document(document, tokenizer, special))


def outcome(result: Reproduction) -> list[str]:
    """Both outcomes in words."""
    count = len(result.pairs)
    if count == 1:
        (pair,) = result.pairs
        text = "exactly" if pair.text_exact else f"as {pair.written!r}"
        image = "exactly" if pair.image_exact else f"with {pair.codes_right:.1%} of its codes"
        return [
            f"text from image: {pair.caption!r} came back {text}",
            f"image from text: came back {image}",
        ]
    recall = result.recall
    return [
        f"texts from images: {result.share('text_exact'):.1%} of {count} exactly",
        f"images from texts: {result.share('image_exact'):.1%} of {count} exactly, "
        f"{result.codes_right:.1%} of all codes",
        f"drawn pictures ranked by semantic features: R@1 {recall['recall']:.1%} "
        f"(chance {recall['chance']:.1%})",
    ]


def shortfall(result: Reproduction, steps: int) -> str | None:
    """What the model failed to do, None if it did what it had to."""
    if len(result.pairs) == 1 and not result.exact:
        (pair,) = result.pairs
        lost = [name for name, ok in (("text", pair.text_exact), ("image", pair.image_exact)) if not ok]
        return (
            f"{' and '.join(lost)} not reproduced exactly after {steps} steps: give more --steps; if that "
            "does not help, something is wrong with the model, the codes or the recipe"
        )
    # Of two pairs luck finds both in a quarter of cases, and more than both there is not.
    if len(result.pairs) > 1 and not result.beats_chance and result.recall["recall"] < 1:
        return (
            f"after {steps} steps the pictures match their prompts no better than by chance "
            f"(R@1 {result.recall['recall']:.1%}, chance {result.recall['chance']:.1%}): give more --steps"
        )
    return None
