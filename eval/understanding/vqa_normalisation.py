"""Normal forms of short answers: of the VQA evaluation, and of LLaVA's submission processor.

Both follow the public scripts to the letter, oddities included, since scores depend on them: a pattern that
was to keep decimal points does not, at most 32 points are deleted, contractions with capitals never match.
"""

import re
from collections.abc import Sequence
from functools import lru_cache

PUNCTUATION = (*';/[]"{}()=+\\_-><@`,?!',)
COMMA_IN_NUMBER = re.compile(r"\d,\d")
PERIOD = re.compile(r"(?!<=\d)(\.)(?!\d)")
MOST_PERIODS = 32
REMEMBERED = 2**16  # texts: short answers recur, and VQAv2 has two million of people
NUMBERS = {
    word: str(number)
    for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
} | {"none": "0"}
ARTICLES = {"a", "an", "the"}

# Found without their apostrophe.
_PLAIN = (
    "ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll "
    "how's isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't "
    "should've shouldn't somebody'll somebody's someone'd someone'll someone's something'd something'll "
    "that's there'd there're there's they'd they'll they're they've wasn't we've weren't what'll what're "
    "what's what've when's where'd where's where've who'd who'll who's who've why'll why're why's won't "
    "would've wouldn't y'all you'd you'll you're you've"
)
# Found without either apostrophe.
_DOUBLE = (
    "couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've "
    "something'd've there'd've they'd've we'd've who'd've wouldn't've you'd've"
)


def _contractions() -> dict[str, str]:
    table = {word.replace("'", ""): word for word in _PLAIN.split()}
    for word in _DOUBLE.split():
        first, middle, last = word.split("'")
        table[f"{first}{middle}'{last}"] = table[f"{first}'{middle}{last}"] = word
    return table | {
        "twas": "'twas",
        "ow's'at": "'ow's'at",
        "'ows'at": "'ow's'at",
        "'ow'sat": "'ow's'at",
        "somebody'd": "somebodyd",
        "yall'll": "y'all'll",
        "y'allll": "y'all'll",
        "yall'd've": "y'all'd've",
        "y'alld've": "y'all'd've",
        "y'all'dve": "y'all'd've",
    }


CONTRACTIONS = _contractions()


def stripped(text: str) -> str:
    """The text on one line, without white space around."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def without_punctuation(text: str) -> str:
    """Punctuation deleted if it stands beside a space or a number has a comma, else made a space."""
    found = text
    in_number = COMMA_IN_NUMBER.search(text) is not None
    for mark in PUNCTUATION:
        deleted = in_number or f"{mark} " in text or f" {mark}" in text
        found = found.replace(mark, "" if deleted else " ")
    return PERIOD.sub("", found, count=MOST_PERIODS)


def without_articles(text: str) -> str:
    """Lower case, numbers up to ten as digits, no articles, apostrophes where contractions lack them."""
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


@lru_cache(REMEMBERED)
def normalised(text: str) -> str:
    """The normal form of an answer in the VQA evaluation, where the ten answers of people differ."""
    return without_articles(without_punctuation(stripped(text)))


@lru_cache(REMEMBERED)
def as_submitted(text: str) -> str:
    """The answer as LLaVA's scripts submit it, and as M4C's evaluator compares answers of TextVQA."""
    lowered = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return without_articles(without_punctuation(stripped(lowered)))


def vqa_accuracy(answer: str, people: Sequence[str]) -> float:
    """The VQA accuracy of an answer against those of people (ten of them), in [0, 1] (arXiv 1505.00468).

    The mean over people of min(1, agreeing others / 3). Where people agree to the letter, answers are
    compared as they stand.
    """
    given, known = stripped(answer), [stripped(one) for one in people]
    if len(set(known)) > 1:
        given, known = normalised(answer), [normalised(one) for one in people]
    return mean_agreement(given, known)


def mean_agreement(answer: str, people: Sequence[str]) -> float:
    """Mean over people of min(1, others that gave the answer / 3)."""
    matches = [one == answer for one in people]
    total = sum(matches)
    return sum(min(1.0, (total - own) / 3) for own in matches) / len(people)
