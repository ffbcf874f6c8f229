"""Option letters out of free text, as the scorers of multiple-choice benchmarks take them."""

import re
from collections.abc import Mapping

REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
API_FAILURE = "Failed to obtain answer via API"
SEPARATORS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
LAST_TOKENS = 4  # a letter earlier in a sentence may be an article
SAID = re.compile(r"answer\s+is\s+\**([A-D])", re.IGNORECASE)  # of a word, too: that is the script's rule
NO_OPTION = "Z"
LMMS_LETTERS = "ABCDE"
LMMS_MARKS = (
    *(("", mark) for mark in (".", ",", ":", ")", ").")),
    *(("(", mark) for mark in (")", ").")),
    *((":", mark) for mark in ("", ",", ".", ")", ").")),
)
SCIENCE_QA = re.compile(r"The answer is ([A-Z]).")


def infer_letter(text: str, options: Mapping[str, str]) -> str | None:
    """The option that a text means, without a judge: VLMEvalKit's exact matching, which MMBench is scored by.

    The one letter among the last four tokens, if no other option's letter is a token; none where no letter
    is a token but Z is; else the letter A to D, in any case, that follows `answer is`; else the one option
    whose words are in the text, unless the text is more than twice as long as all options together.

    Args:
        text: an answer.
        options: words by letter.

    Returns:
        a letter of `options`, or None.
    """
    if API_FAILURE not in text:
        if any(refusal in text for refusal in REFUSALS):
            return None
        tokens = text.translate(SEPARATORS).split()
        named = [letter for letter in options if letter in tokens]
        if len(named) == 1 and tokens.index(named[0]) >= len(tokens) - LAST_TOKENS:
            return named[0]
        if not named and NO_OPTION in tokens:
            return None
        said = SAID.search(text)
        if said and said[1].upper() in options:
            return said[1].upper()
    if len(text.lower()) > 2 * sum(len(words) for words in options.values()):
        return None
    return letter_by_words(text, options)


def letter_by_words(text: str, options: Mapping[str, str]) -> str | None:
    """The one option whose words are in the text, in any case; None for several or none."""
    lowered = text.lower()
    named = [letter for letter, words in options.items() if words.lower() in lowered]
    return named[0] if len(named) == 1 else None


def lmms_letter(text: str, options: Mapping[str, str]) -> str | None:
    """The option that a text means by the rule of lmms-eval's MMBench: letters with a mark, then words."""
    if API_FAILURE not in text:
        tokens = text.split()
        found = _lone(tokens, "", "")
        if found and not ("A" in tokens and len(tokens) > 3):  # an article
            return found
        for before, after in LMMS_MARKS:
            if found := _lone(tokens, before, after):
                return found
    return letter_by_words(text, options)


def _lone(tokens: list[str], before: str, after: str) -> str | None:
    named = [letter for letter in LMMS_LETTERS if f"{before}{letter}{after}" in tokens]
    return named[0] if len(named) == 1 else None


def first_letter(text: str) -> str:
    """The first character, as lmms-eval scores SEED-Bench; it counts in any case."""
    return text.strip()[:1]


def science_qa_letter(text: str) -> str | None:
    """The letter by LLaVA's script for ScienceQA: alone, before `. `, or in `The answer is X.`."""
    if text in tuple("ABCDE"):
        return text
    if len(text) >= 3 and text[0] in "ABCDE" and text[1:3] == ". ":
        return text[0]
    found = SCIENCE_QA.findall(text)
    return found[0] if len(found) == 1 else None
