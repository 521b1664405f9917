"""What to draw: the subject and the concepts named in a prompt, found by plain rules over its text.

No knowledge base and no language model: the same text gives the same concepts on every machine. Nothing here
knows about pixels or fonts.
"""

# ruff: noqa: RUF001  # the punctuation of other scripts is what these rules are about

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from typing import Literal

MAX_CONCEPTS = 12
MAX_LABEL = 56
MAX_TITLE = 110
_MAX_READ = 6000  # characters of a prompt that are looked at: the API's own prompts stay under 2,200

Kind = Literal["cycle", "flow", "hub"]


@dataclass(frozen=True)
class Concepts:
    """A diagram in words.

    Attributes:
        title: the subject, one line of at most `MAX_TITLE` characters.
        labels: 1 to `MAX_CONCEPTS` box texts, each at most `MAX_LABEL` characters.
        kind: how the boxes hang together.
        generic: True when the prompt names a subject only, and the boxes are neutral placeholders.
    """

    title: str
    labels: tuple[str, ...]
    kind: Kind
    generic: bool = False


_CYCLE = re.compile(
    r"\b(life)?cycl(e|es|ic|ical)\b|\b\w+zyklus\b|\bzyklus\b|\bkreislauf|kreislauf\b|\bloop|\bciclo|\bcycle|"
    r"цикл|круговорот|κύκλο|循环|循環|サイクル|순환|دورة|מחזור|चक्र|วัฏจักร",
    re.IGNORECASE,
)
_FLOW = re.compile(
    r"\b(process|flow|flows|flowchart|pipeline|steps?|stages?|sequence|timeline|workflow|procedure|phases?|"
    r"history|evolution of|journey|how (to|does|do)|ablauf|proceso|étapes|processus)\b|"
    r"流程|步骤|步驟|过程|過程|プロセス|手順|工程|과정|процесс|этап|مراحل|תהליך|प्रक्रिया|ขั้นตอน|กระบวนการ",
    re.IGNORECASE,
)
_ARROW = re.compile(r"\s*(?:-{1,3}>|={1,2}>|~>|[→⟶⇒➔➜➡⇨►▶]\ufe0f?)\s*")
_BULLET = re.compile(
    r"^\s*(?:(?P<dot>[-*•‣▪◦●·–])\s+|(?P<num>\(?\d{1,2}[.):、．]\s*(?!\d)|[①-⑳]\s*|"
    r"(?:step|stage|phase|part|panel|section)\s+\d{1,2}\s*[:.)–—-]\s*|第[一二三四五六七八九十\d]{1,3}[步章部]?[、:：]?\s*))",
    re.IGNORECASE,
)
_INLINE_NUMBER = re.compile(r"(?:^|(?<=\s))\(?\d{1,2}[.)]\s+")
_INTRODUCER = re.compile(
    r"(?:[:：]|\s[-–—]\s|——|"
    r",?\s+\b(?:that\s+(?:shows?|includes?|covers?)|which\s+(?:shows?|includes?)|showing|shows|including|includes?|"
    r"with|featuring|such as|consisting of|consists of|made of|composed of|comprising|covering|containing|"
    r"depicting|illustrating|labell?ed with|through|via|mit|avec|con|с|включая|показывающая)\b)\s*",
    re.IGNORECASE,
)
_OTHER_INTRODUCER = re.compile(
    r"(?:[，,]?\s*(?:包括|包含|显示|顯示|展示|分为|分為|含む|포함|يوضح|تشمل|يشمل|כולל|जिसमें|ประกอบด้วย|แสดง))\s*"
)
_SEPARATOR = re.compile(r"\s*[,;，、；،؛|]\s*|\s*\n\s*")
_AND = re.compile(
    r"^(?:and then|and finally|and|then|finally|or|plus|und|y|et|и|και|和|及|以及|そして|그리고|או|และ|और|एवं)\s+",
    re.IGNORECASE,
)
_INNER_AND = re.compile(r"\s+(?:and|&|und|y|et|и|και|및|และ|और)\s+", re.IGNORECASE)
_CJK_AND = re.compile(r"(?<=[\u3400-\u9fff])(?:以及|[和与與及])(?=[\u3400-\u9fff])")
_THEN = re.compile(r"\b(?:then|next|finally|afterwards|after that|subsequently)\b", re.IGNORECASE)
_SENTENCE = re.compile(r"(?<=[.!?])\s+|[。！？।؟]\s*|\n+")
_FROM_TO = re.compile(
    r"^(?P<title>.*?)\bfrom\s+(?P<a>.+?)\s+(?:in)?to\s+(?P<b>.+?)(?:\s+(?:via|through|by way of)\s+(?P<via>.+))?$",
    re.IGNORECASE | re.DOTALL,
)
_CHANGE = re.compile(
    r"^(?:(?:convert|turn|transform|replace|change|combine|merge|redraw|translate|how)\s+)?(?P<a>.+?)\s+"
    r"(?:(?:becomes?|turns? into|leads? to)|(?P<verb>into|with|as|by|to))\s+(?P<b>.+)$",
    re.IGNORECASE,
)
_CHANGE_VERB = re.compile(r"^(?:convert|turn|transform|replace|change|combine|merge|redraw|translate)\s", re.IGNORECASE)
_VERSUS = re.compile(r"\s+(?:vs\.?|versus|compared (?:to|with))\s+", re.IGNORECASE)
_BETWEEN = re.compile(
    r"\b(?:differences?|comparison|relationships?|interactions?|connections?) (?:between|of)\s+", re.IGNORECASE
)
_NOUN = (
    r"(?:diagram|infographic|flow ?chart|chart|illustration|poster|drawing|picture|image|visuali[sz]ation|mind ?map|"
    r"concept map|schematic|sketch|graphic|map|figure|overview)"
)
_VERB = (
    r"(?:please\s+)?(?:can you\s+)?(?:show (?:me|us)|(?:create|draw|generate|make|design|produce|illustrate|"
    r"visuali[sz]e|explain|depict|render|build|describe)(?:\s+(?:me|us))?)\s+"
)
_ASK = re.compile(
    rf"^(?:{_VERB})?(?:(?:a|an|the|one)\s+)?(?:(?!the\b)[\w-]+,?\s+){{0,4}}?{_NOUN}\s+(?:of|for|about|on|that explains|"
    r"explaining|showing|shows?|illustrating|depicting|how|titled|called|comparing)\s+",
    re.IGNORECASE,
)
_ASK_VERB = re.compile(rf"^{_VERB}", re.IGNORECASE)
_COMMAND = re.compile(
    r"^(?:add|include|label|highlight|annotate|mark|name|remove|delete)\s+(?:(?:the|some|clear|more)\s+)?"
    r"(?:(?:labels?|arrows?|captions?|names?|icons?)\s+(?:for|of|to|on|between)\s+)?",
    re.IGNORECASE,
)
_TAIL_NOUN = re.compile(r"(?:\s+(?:labell?ed|simple|process))?\s+" + _NOUN + r"s?$", re.IGNORECASE)
_ARTICLE = re.compile(r"^(?:the|a|an)\s+", re.IGNORECASE)
_STYLE = re.compile(
    r"\b(style|styled|backgrounds?|colou?rs?|colou?r-coded|palette|legible|labell?ed|labels|captions?|fonts?|typography|"
    r"resolution|aspect|whitespace|minimalist|pastel|vector|icons?|no text|high contrast|(?:16:9|4:3|1:1|9:16))\b",
    re.IGNORECASE,
)
_TRIM = " \t\n\"'`“”‘’«»„‹›「」『』《》【】*_#>()[]{}<.,;:!?，、。；：！？،؛।…-–—|·"
_FACETS = ("What it is", "How it works", "Main parts", "Why it matters")


def clean(prompt: str) -> str:
    """Return the readable part of a prompt, in NFC: no control characters, surrogates or direction marks."""
    text = unicodedata.normalize("NFC", prompt[:_MAX_READ].replace("\r\n", "\n").replace("\r", "\n"))
    kept = (
        " " if c in "\t\v\f\x85\u2028\u2029" or unicodedata.category(c) == "Zs" else c
        for c in text
        # The joiners shape Persian and Hindi words, every other format character is invisible plumbing.
        if c in "\n\t\v\f\x85\u200c\u200d" or unicodedata.category(c) not in {"Cc", "Cf", "Cs", "Co", "Cn"}
    )
    return re.sub(r"\n{2,}", "\n", re.sub(r" {2,}", " ", "".join(kept))).strip()


def clip(text: str, limit: int) -> str:
    """Return `text` within `limit` characters, cut at a word where there is one, with an ellipsis."""
    if len(text) <= limit:
        return text
    cut = text[: limit - 1]
    space = cut.rfind(" ")
    return (cut[:space] if space > limit // 2 else cut).rstrip(_TRIM) + "…"


def _capital(text: str) -> str:
    # Only a plain lower-case word: "pH", "mRNA" and "iPhone" know better.
    first = text.split(" ", 1)[0]
    return text[:1].upper() + text[1:] if first.islower() else text


def _label(text: str) -> str:
    text = _AND.sub("", text.strip(_TRIM)).strip(_TRIM)
    # "Evaporation: the sun warms the sea" and "Evaporation (sea to air)" are named by their head.
    head = re.split(r"[:：]\s|\s[-–—]\s|\s?[(（]|[:：]$|(?<=[^\x00-\x7f])：", text, maxsplit=1)[0].strip(_TRIM)
    if 2 <= len(head) <= MAX_LABEL or (head and not head.isascii()):
        text = head
    text = _ARTICLE.sub("", text)
    if len(text) > MAX_LABEL:
        # "There, helper T cells recognise ..." is not about "There".
        pieces = re.split(r"[,;，；]\s*", text)
        text = next((piece for piece in pieces if len(piece.split()) > 2 or len(piece) > 20), text)
    return _capital(clip(text, MAX_LABEL))


def _labels(parts: list[str]) -> tuple[str, ...]:
    found: dict[str, str] = {}
    for part in parts:
        label = _label(part)
        if label:
            found.setdefault(label.casefold(), label)
    labels = list(found.values())
    about = [label for label in labels if not _STYLE.search(label)]
    labels = about if len(about) >= 2 else labels
    if len(labels) > MAX_CONCEPTS:
        labels = [*labels[: MAX_CONCEPTS - 1], f"+ {len(labels) - MAX_CONCEPTS + 1}"]
    return tuple(labels)


def _title(text: str) -> str:
    text = re.sub(r"^\s*(?:title|topic|subject|prompt)\s*[:：]\s*", "", text, flags=re.IGNORECASE)
    text = text.split("\n", 1)[0].strip(_TRIM)
    quoted = re.search(r"\b(?:titled|called|entitled|named)\s+[\"“'«]([^\"”'»]{3,})[\"”'»]", text)
    text = quoted[1] if quoted else _ASK.sub("", text, count=1)
    text = _ASK_VERB.sub("", text).strip(_TRIM)
    text = _ARTICLE.sub("", _TAIL_NOUN.sub("", text).strip(_TRIM)) or text
    return clip(_capital(text), MAX_TITLE)


def _items(text: str) -> list[str]:
    """Split a list in running text; "a, b and c" gives three."""
    parts = [part for part in _SEPARATOR.split(text) if part.strip(_TRIM)]
    parts = [part for part in parts if not _STYLE.search(part)] or parts
    if parts:
        *head, last = parts
        two = _INNER_AND.split(last)
        if len(two) == 1 and head:
            two = _CJK_AND.split(last)
        if not (head and _AND.match(last)) and all(len(piece) >= 2 and len(piece.split()) <= 4 for piece in two):
            parts = [*head, *two]
    return parts


def _is_list(parts: list[str]) -> bool:
    return len(parts) >= 2 and all(len(part.split()) <= 9 and len(part) <= 90 for part in parts[:MAX_CONCEPTS])


def _kind(text: str, default: Kind) -> Kind:
    if _CYCLE.search(text):
        return "cycle"
    return "flow" if _FLOW.search(text) else default


def _build(title: str, parts: list[str], kind: Kind) -> Concepts | None:
    name = _title(title)
    labels = _labels([part for part in parts if _title(part) != name])
    if len(labels) < 2:
        return None
    return Concepts(name or clip(" · ".join(labels), MAX_TITLE), labels, kind)


def _from_lines(text: str) -> Concepts | None:
    lines = [line for line in text.split("\n") if line.strip(_TRIM)]
    marks = [_BULLET.match(line) for line in lines]
    parts = [line[mark.end() :] for line, mark in zip(lines, marks, strict=True) if mark]
    if len(parts) >= 2:
        before = [line for line, mark in zip(lines, marks, strict=True) if not mark]
        numbered = sum(1 for mark in marks if mark and mark["num"]) * 2 > len(parts)
        title = _INTRODUCER.split(before[0], maxsplit=1)[0] if before else ""
        return _build(title, parts, _kind(" ".join(before[:1]), "flow" if numbered else "hub"))
    if len(lines) >= 3 and all(len(line) <= 70 and not _SEPARATOR.search(line.strip(_TRIM)) for line in lines):
        return _build(lines[0], lines[1:], _kind(lines[0], "hub"))
    return None


def _from_arrows(text: str) -> Concepts | None:
    line = next((line for line in re.split(r"\n|(?<=\w[.!?])\s", text) if len(_ARROW.split(line)) > 2), "")
    line = line or next((line for line in text.split("\n") if _ARROW.search(line)), "")
    parts = [part for part in _ARROW.split(line) if part.strip(_TRIM)]
    if len(parts) < 2:
        return None
    lead = _INTRODUCER.split(parts[0], maxsplit=1)
    before = text[: text.find(line)].strip()
    title = lead[0] if len(lead) == 2 and lead[1] else before.split("\n")[0]
    parts[0] = lead[-1] or parts[0]
    closed = _label(parts[0]).casefold() == _label(parts[-1]).casefold()
    return _build(title, parts, "cycle" if closed or _CYCLE.search(title) else "flow")


def _from_inline_numbers(text: str) -> Concepts | None:
    title, *parts = _INLINE_NUMBER.split(text)
    return _build(title, parts, _kind(title, "flow")) if len(parts) >= 2 else None


def _first_sentence(text: str) -> str:
    return _SENTENCE.split(text, maxsplit=1)[0].strip(_TRIM)


def _from_pair(text: str) -> Concepts | None:
    sentence = _first_sentence(text)
    between = _BETWEEN.search(sentence)
    if between:
        return _build(sentence, _items(sentence[between.end() :]), "hub")
    sides = _VERSUS.split(sentence)
    if len(sides) >= 2 and _is_list(sides):
        return _build(sentence, [_ASK_VERB.sub("", _ASK.sub("", sides[0])), *sides[1:]], "hub")
    path = _FROM_TO.match(sentence)
    if path and len(path["b"].split()) <= 8 and len(path["a"].split()) <= 8:
        via = _items(path["via"]) if path["via"] else []
        title = path["title"] if len(path["title"].split()) >= 2 else sentence
        return _build(title, [path["a"], *via, *_items(path["b"])], _kind(path["title"], "flow"))
    sentence = _ASK_VERB.sub("", sentence)
    change = _CHANGE.match(sentence)
    if change and (not change["verb"] or _CHANGE_VERB.match(sentence)):
        return Concepts(clip(_capital(sentence), MAX_TITLE), _labels([change["a"], change["b"]]), "flow")
    return None


def _from_list(text: str) -> Concepts | None:
    sentence = _first_sentence(text)
    for pattern in (_INTRODUCER, _OTHER_INTRODUCER):
        for mark in pattern.finditer(sentence):
            before, parts = sentence[: mark.start()], _items(sentence[mark.end() :])
            if before.strip(_TRIM) and len(parts) >= 2 and _is_list(parts) and not _SEPARATOR.search(before):
                found = _build(before, parts, _kind(before, "hub"))
                if found and not all(_STYLE.search(label) for label in found.labels):
                    return found
    parts = _items(_COMMAND.sub("", sentence))
    if len(parts) >= 3 and _is_list(parts):
        first = _CYCLE.search(parts[0]) or _FLOW.search(parts[0]) or _ASK.match(parts[0])
        head = parts[0] if first else ""
        return _build(head, parts[1:] if first else parts, _kind(parts[0], "hub"))
    return None


def _from_sentences(text: str) -> Concepts | None:
    sentences = [s for s in _SENTENCE.split(text) if len(s.strip(_TRIM)) > 1]
    if len(sentences) < 2:
        return None
    first = _INTRODUCER.split(sentences[0], maxsplit=1)[0] if len(sentences[0]) > MAX_TITLE else sentences[0]
    rest = [_ASK_VERB.sub("", sentence.strip()) for sentence in sentences[1:]]
    return _build(first, rest, _kind(sentences[0], "flow" if _THEN.search(text) else "hub"))


_RULES = (_from_lines, _from_arrows, _from_inline_numbers, _from_pair, _from_list, _from_sentences)


def extract(prompt: str) -> Concepts:
    """Return the diagram that a prompt describes; every string has one, the empty string too."""
    text = clean(prompt)
    for rule in _RULES:
        found = rule(text)
        if found:
            return found
    sentence = _first_sentence(text)
    title = _title(sentence) or clip(text, MAX_TITLE) or "(empty prompt)"
    kind = _kind(sentence, "hub")
    halves = _INNER_AND.split(title)
    if len(halves) == 2 and all(len(half.split()) <= 3 for half in halves):
        return Concepts(title, _labels(halves), kind)
    if any(
        c.isalpha() and not c.isascii() for c in title
    ):  # English words beside another script would look like part of the prompt
        return Concepts(title, ("1", "2", "3", "4"), kind, generic=True)
    if kind == "hub":
        return Concepts(title, _FACETS, kind, generic=True)
    return Concepts(title, tuple(f"Stage {number}" for number in range(1, 5)), kind, generic=True)
