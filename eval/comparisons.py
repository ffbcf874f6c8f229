"""Each figure beside its baselines, with a verdict in words."""

import math
from dataclasses import asdict, dataclass, field

from data_pipeline.languages import LANGUAGE_NAMES

SIGNIFICANT = 0.05  # a share counts as better than chance if luck gives it more rarely than this


@dataclass(frozen=True)
class Baseline:
    """Something simpler that the figure has to beat, or (`bound`) something that it can at best come near."""

    name: str
    value: float
    bound: bool = False


def luck(hits: int, trials: int, chance: float) -> float:
    """Probability of at least that many hits when each has the same chance (binomial)."""
    if not 0 < chance < 1:
        return float(hits <= 0 or chance >= 1)

    def log_factorial(number: int) -> float:
        return math.lgamma(number + 1)

    # In logarithms: the binomial coefficients of thousands of trials are beyond any float.
    return math.fsum(
        math.exp(
            log_factorial(trials)
            - log_factorial(k)
            - log_factorial(trials - k)
            + k * math.log(chance)
            + (trials - k) * math.log1p(-chance)
        )
        for k in range(hits, trials + 1)
    )


@dataclass(frozen=True)
class Comparison:
    """A figure of a run with what it is to be read against."""

    measure: str
    value: float
    unit: str
    baselines: list[Baseline] = field(default_factory=list)
    higher_is_better: bool = True
    trials: int | None = None  # of a share: how many cases it is taken over

    def beats(self, baseline: Baseline) -> bool:
        """Whether the figure is better than a baseline; a share, beyond what luck alone would give."""
        if self.trials is not None and not baseline.bound:
            return luck(round(self.value * self.trials), self.trials, baseline.value) < SIGNIFICANT
        if self.higher_is_better:
            return self.value > baseline.value
        return self.value < baseline.value

    def failures(self) -> list[str]:
        """A sentence for each baseline that is not beaten; bounds need not be."""
        return [
            f"{self.measure}: {self.shown(self.value)} does not beat {baseline.name} "
            f"({self.shown(baseline.value)})."
            for baseline in self.baselines
            if not baseline.bound and not self.beats(baseline)
        ]

    def remarks(self) -> list[str]:
        """A sentence for each bound: how near the figure comes."""
        lines = []
        for bound in (baseline for baseline in self.baselines if baseline.bound):
            if self.beats(bound) or self.value == bound.value:
                lines.append(f"as good as {bound.name} or better")
            elif bound.value and self.higher_is_better:
                lines.append(f"keeps {100 * self.value / bound.value:.0f} % of {bound.name}")
            else:
                lines.append(f"behind {bound.name}")
        return lines

    def verdict(self) -> str:
        """What the table says in its last column."""
        tested = [baseline for baseline in self.baselines if not baseline.bound]
        lost = [baseline.name for baseline in tested if not self.beats(baseline)]
        first = f"does not beat {' and '.join(lost)}" if lost else "beats its baseline"
        if not lost and len(tested) > 1:
            first = "beats all its baselines"
        return "; ".join([first, *self.remarks()])

    def shown(self, value: float) -> str:
        """A value with its unit."""
        if self.unit == "share":
            return f"{100 * value:.1f} %"
        if self.unit == "dB":
            return f"{value:.2f} dB"
        return f"{value:.3f} {self.unit}".strip()

    def as_json(self) -> dict:
        """Everything, verdict included."""
        return {**asdict(self), "verdict": self.verdict(), "beats_all": not self.failures()}


def language_name(code: str) -> str:
    """A language's English name, or its code."""
    return LANGUAGE_NAMES.get(code, code)


def compare_reconstruction(result: dict) -> list[Comparison]:
    """Reconstruction against a flat picture and the untrained tokenizer."""
    rows = []
    for key, name, unit in (("psnr", "PSNR", "dB"), ("ssim", "SSIM", "")):
        baselines = [
            Baseline("the mean colour", result["mean_colour"][key]),
            Baseline("the untrained tokenizer", result["untrained"][key]),
        ]
        title = f"{name} of {result['pictures']} held-out pictures"
        rows.append(Comparison(title, result["tokenizer"][key], unit, baselines))
    return rows


def compare_retrieval(result: dict) -> list[Comparison]:
    """Quantized features against chance, and against the continuous teacher as the bound."""
    rows = []
    for split, words in (("held_out", "held-out"), ("seen", "seen")):
        for language, found in result[split].items():
            if language != "en" and split == "seen":
                continue  # the table stays readable; report.json has all
            for direction, arrow in (
                ("text_to_image", "picture by name"),
                ("image_to_text", "name by picture"),
            ):
                quantized = found["quantized"]
                baselines = [
                    Baseline("chance", quantized["chance"]),
                    Baseline("the continuous teacher", found["continuous"][direction], bound=True),
                ]
                title = f"R@1, {arrow} ({language_name(language)}), {quantized['pictures']} {words}"
                pictures = quantized["pictures"]
                rows.append(Comparison(title, quantized[direction], "share", baselines, trials=pictures))
    return rows


def compare_visual_likelihood(result: dict) -> list[Comparison]:
    """Negative log-likelihood of every codebook and depth against log K and the codes' frequencies.

    For seen pictures, at the first depth, also against the same without the prompt: whether prompts count.
    """
    rows = []
    for row in result["splits"]["held_out"]["visual"]:
        baselines = [
            Baseline(f"log {result['codebook_size']}", result["log_codebook_size"]),
            Baseline("code frequencies", row["unigram"]),
        ]
        title = f"Codes, {row['codebook']} depth {row['depth']}, held-out"
        rows.append(Comparison(title, row["nll"], "nats", baselines, higher_is_better=False))
    for row in result["splits"]["seen"]["visual"]:
        if row["depth"] == 1:
            baselines = [Baseline("the same without the prompt", row["without_prompt"])]
            title = f"Codes, {row['codebook']} depth 1, seen"
            rows.append(Comparison(title, row["nll"], "nats", baselines, higher_is_better=False))
    return rows


def compare_captions(result: dict) -> list[Comparison]:
    """Caption likelihood with the picture against without it and with another one."""
    rows = []
    for split, words in (("held_out", "held-out"), ("seen", "seen")):
        for language, found in result["splits"][split]["captions"].items():
            baselines = [
                Baseline("the same without the picture", found["image_removed"]),
                Baseline("the same with another picture", found["other_image"]),
            ]
            title = f"Caption tokens ({language_name(language)}), {words}"
            rows.append(Comparison(title, found["with_image"], "nats", baselines, higher_is_better=False))
    return rows


SPLITS = {"held_out": "held-out combinations", "seen": "scenes trained on"}


def compare_scenes(result: dict) -> list[Comparison]:
    """Drawn scenes, answers and captions against chance, a constant answer, and what reconstruction keeps."""
    rows = []
    for split, words in SPLITS.items():
        found = result["splits"][split]
        drawn, ceiling = found["drawn"], result["detector"][split]["reconstructed"]
        # What stands first is the figure of the table of all tasks.
        for part in sorted(drawn["shares"], key=lambda part: part != "all"):
            share = drawn["shares"][part]
            baselines = [
                Baseline("other scenes' pictures", drawn["chance"][part]),
                Baseline("true pictures after reconstruction", ceiling[part], bound=True),
            ]
            title = f"Drawn, {'everything at once' if part == 'all' else part}, {words}"
            rows.append(Comparison(title, share, "share", baselines, trials=drawn["scenes"]))
        for kind, answers in found["answers"]["kinds"].items():
            baselines = [
                Baseline("guessing", answers["chance"]),
                Baseline("the commonest answer", answers["majority"]),
            ]
            title = f"Answers, {kind}, {words}"
            rows.append(
                Comparison(title, answers["accuracy"], "share", baselines, trials=answers["questions"])
            )
        for category, figures in found["answers"]["pope"].items():
            title = f"F1 of yes, {category} absent things, {words}"
            baselines = [Baseline("always yes", figures["f1_of_always_yes"])]
            rows.append(Comparison(title, figures["f1"], "share", baselines))
        options = found["answers"]["choice_by_likelihood"]
        title = f"Options by likelihood, {words}"
        guessing = Baseline("guessing", options["chance"])
        rows.append(Comparison(title, options["accuracy"], "share", [guessing], trials=options["questions"]))
        for language, captions in found["captions"].items():
            title = f"Captions, all parts right ({language_name(language)}), {words}"
            other = Baseline("other scenes' captions", captions["chance"]["all"])
            rows.append(
                Comparison(title, captions["shares"]["all"], "share", [other], trials=captions["scenes"])
            )
    return rows


HEADINGS = {
    "scenes": "Scenes: drawn, asked about, captioned",
    "reconstruction": "Reconstruction",
    "retrieval": "Zero-shot retrieval",
    "likelihood": "Negative log-likelihood under the unified model",
}
COMPARISONS = {
    "scenes": compare_scenes,
    "reconstruction": compare_reconstruction,
    "retrieval": compare_retrieval,
    "likelihood": lambda result: [*compare_visual_likelihood(result), *compare_captions(result)],
}


def compare_all(results: dict[str, dict]) -> dict[str, list[Comparison]]:
    """Comparisons by measure, for those measures that have a result."""
    return {name: build(results[name]) for name, build in COMPARISONS.items() if name in results}
