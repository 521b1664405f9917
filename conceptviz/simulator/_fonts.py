"""Text for the simulator's pictures: which font has which character, shaping, bidi order, wrapping and fitting.

The fonts of the extra `simulator` come first, then those of the machine, then a small box with the code point:
every string can be drawn. Pillow shapes and orders text itself only where the FriBidi library is installed, which a
fresh machine does not have; the few rules written here make Arabic, Hebrew and Hindi readable without it.
"""

# ruff: noqa: RUF001  # other scripts' punctuation

from __future__ import annotations

import io
import os
import re
import struct
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

from PIL import ImageDraw, ImageFont, features

LINE = 1.34  # line height in em: room for Thai and Devanagari marks
_BUNDLED = {
    "manimgx_fonts": (
        "NotoSans[wght].ttf", "NotoSansArabic[wght].ttf", "NotoSansHebrew[wght].ttf", "NotoSansDevanagari[wght].ttf",
        "NotoSansThai[wght].ttf", "NotoSansBengali[wght].ttf", "NotoSansTamil[wght].ttf", "NotoSansTelugu[wght].ttf",
        "NotoSansGujarati[wght].ttf", "NotoSansGurmukhi[wght].ttf", "NotoSansKannada[wght].ttf",
        "NotoSansMalayalam[wght].ttf", "NotoSansGeorgian[wght].ttf", "NotoSansArmenian[wght].ttf",
        "NotoSansEthiopic[wght].ttf", "NotoSansKhmer[wght].ttf", "NotoSansLao[wght].ttf", "NotoSansMyanmar[wght].ttf",
        "NotoSansSinhala[wght].ttf", "NotoSansSymbols[wght].ttf", "NotoEmoji[wght].ttf",
    ),
    "noto_cjk_sans_otc": ("NotoSansCJK-Regular.ttc",),
}  # fmt: skip
_IGNORABLE = re.compile("[\u200c\u200d\u034f\ufe00-\ufe0f]")
_INK_TABLES = {b"glyf", b"CFF ", b"CFF2"}  # a font of bitmaps alone cannot be scaled


@dataclass(frozen=True)
class Face:
    """One face of one font file; `path` None is the font inside Pillow."""

    path: Path | None
    index: int = 0

    @property
    def code_points(self) -> frozenset[int]:
        """The characters this face has a glyph for; none for a file that is no usable font."""
        return _code_points(self.path)


@cache
def _code_points(path: Path | None) -> frozenset[int]:
    try:
        with _pillow_font() if path is None else path.open("rb") as file:
            return _read_cmap(file)
    except (OSError, struct.error):
        return frozenset()


def _pillow_font() -> BinaryIO:
    font = ImageFont.load_default(16)
    return io.BytesIO(getattr(font, "font_bytes", b""))


def _read_cmap(file: BinaryIO) -> frozenset[int]:
    """Read the characters of the first face in a TrueType, OpenType or collection file."""

    def at(offset: int, layout: str) -> tuple[Any, ...]:
        file.seek(offset)
        return struct.unpack(">" + layout, file.read(struct.calcsize(">" + layout)))

    file.seek(0)
    start = at(12, "I")[0] if file.read(4) == b"ttcf" else 0
    tables: dict[bytes, int] = {}
    for number in range(at(start + 4, "H")[0]):
        tag, _, offset = at(start + 12 + 16 * number, "4sII")
        tables[tag] = offset
    if not _INK_TABLES & tables.keys() or b"cmap" not in tables:
        return frozenset()
    cmap, found = tables[b"cmap"], set[int]()
    for number in range(at(cmap + 2, "H")[0]):
        platform, _, offset = at(cmap + 4 + 8 * number, "HHI")
        table = cmap + offset
        layout = at(table, "H")[0]
        if platform not in {0, 3}:
            continue
        if layout == 12:
            groups = at(table + 16, f"{3 * min(at(table + 12, 'I')[0], 100_000)}I")
            for first, last in zip(groups[::3], groups[1::3], strict=True):
                found.update(range(first, min(last, 0x10FFFF) + 1))
        elif layout == 4:
            count = at(table + 6, "H")[0] // 2
            ends, firsts, deltas, offsets = (
                at(table + 14 + 2 * count * i + 2 * (i > 0), f"{count}H") for i in range(4)
            )
            for i in range(count):
                for code in range(firsts[i], min(ends[i], 0xFFFE) + 1):
                    place = table + 16 + 6 * count + 2 * i + offsets[i] + 2 * (code - firsts[i])
                    if at(place, "H")[0] if offsets[i] else (code + deltas[i]) & 0xFFFF:
                        found.add(code)
    return frozenset(found)


@cache
def bundled_faces() -> tuple[Face, ...]:
    """Return the faces that the extra `simulator` installs, as far as they are installed."""
    faces = []
    for package, names in _BUNDLED.items():
        spec = find_spec(package)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            faces += [Face(path) for path in (Path(folder, name) for name in names) if path.is_file()]
    return tuple(faces)


@cache
def system_faces() -> tuple[Face, ...]:
    """Return the upright faces in the well-known font folders of this machine, at most 1,500."""
    home = Path(os.path.expanduser("~"))  # noqa: PTH111  # Path.home() raises where there is no home
    folders = {
        "win32": [
            Path(os.environ.get("WINDIR", "C:/Windows"), "Fonts"),
            home / "AppData/Local/Microsoft/Windows/Fonts",
        ],
        "darwin": [Path("/System/Library/Fonts"), Path("/Library/Fonts"), home / "Library/Fonts"],
    }.get(sys.platform, [Path("/usr/share/fonts"), Path("/usr/local/share/fonts"), home / ".local/share/fonts"])
    found = sorted(
        Path(parent, name)
        for folder in folders
        for parent, _, names in os.walk(folder)
        for name in names
        if name.lower().endswith((".ttf", ".otf", ".ttc"))
        and not re.search("italic|oblique|mono|bold", name, re.IGNORECASE)
    )
    return tuple(Face(path) for path in found[:1500])


@cache
def _arabic_forms() -> dict[str, dict[str, str]]:
    """Map each Arabic letter (and lam-alef pair) to its shapes, which Unicode also has as characters."""
    forms: dict[str, dict[str, str]] = {}
    for code in (*range(0xFB50, 0xFE00), *range(0xFE70, 0xFF00)):
        shape, *letters = unicodedata.decomposition(chr(code)).split() or [""]
        text = "".join(chr(int(letter, 16)) for letter in letters)
        if shape[1:-1] in {"isolated", "initial", "medial", "final"} and (len(text) == 1 or text[:1] == "\u0644"):
            forms.setdefault(text, {}).setdefault(shape[1:-1], chr(code))
    return forms


def _join_arabic(text: str) -> str:
    """Replace Arabic letters by their joined shapes, in reading order."""
    forms, out, previous_joins = _arabic_forms(), list[str](), False
    position = 0
    while position < len(text):
        pair = text[position : position + 2]
        letter = pair if len(pair) == 2 and pair in forms and pair[1] in "\u0622\u0623\u0625\u0627" else pair[0]
        position += len(letter)
        if unicodedata.combining(letter[0]):
            out.append(letter)
            continue
        shapes = forms.get(letter, {})
        rest = next((c for c in text[position:] if not unicodedata.combining(c)), "")
        joins_next = "initial" in shapes and ("final" in forms.get(rest, {}) or rest in {"\u0640", "\u200d"})
        joined = previous_joins and "final" in shapes
        shape = ("medial" if joins_next else "final") if joined else ("initial" if joins_next else "isolated")
        out.append(shapes.get(shape, letter))
        previous_joins = joins_next or letter in {"\u0640", "\u200d"}
    return "".join(out)


# The short i of the northern Indian scripts is written before the consonants it is spoken after.
_SHORT_I = re.compile(
    "|".join(
        f"(?:[{chr(b + 0x15)}-{chr(b + 0x39)}]{chr(b + 0x3C)}?{chr(b + 0x4D)})*[{chr(b + 0x15)}-{chr(b + 0x39)}]"
        f"{chr(b + 0x3C)}?{chr(b + 0x3F)}"
        for b in (0x900, 0x980, 0xA00, 0xA80)
    )
)
_MIRROR = str.maketrans("()[]{}<>«»", ")(][}{><»«")


def clusters(text: str) -> list[str]:
    """Split text into letters with their marks: nothing inside one may be torn apart or turned round."""
    out: list[str] = []
    for c in text:
        glue = unicodedata.category(c)[0] == "M" or c in "\u200c\u200d\u0e33\u0eb3"
        conjunct = out and out[-1][-1] in "\u094d\u09cd\u0a4d\u0acd" and unicodedata.category(c) == "Lo"
        if out and (glue or conjunct or out[-1][-1] == "\u200d"):
            out[-1] += c
        else:
            out.append(c)
    return out


def _levels(text: str) -> list[int]:
    """Return the embedding level of each character: the Unicode bidi rules without explicit marks."""
    kinds: list[str] = []
    for c in text:
        kind = unicodedata.bidirectional(c)
        kinds.append(
            "R" if kind in {"R", "AL"} else "L" if kind == "L" else "N" if kind in {"EN", "AN"}
            else (kinds[-1] if kind == "NSM" and kinds else "")
        )  # fmt: skip
    for i in range(1, len(text) - 1):  # the point in 3.5
        if kinds[i - 1] == kinds[i + 1] == "N" and unicodedata.bidirectional(text[i]) in {"CS", "ES"}:
            kinds[i] = "N"
    if "R" not in kinds:
        return [0] * len(text)
    base = 1 if next(kind for kind in kinds if kind in {"L", "R"}) == "R" else 0
    level_of, strong = {"L": 2 * base, "R": 1}, "R" if base else "L"
    levels, directions = list[int](), list[str]()  # of the characters so far, spaces taking part only below
    for kind in kinds:
        strong = kind if kind in {"L", "R"} else strong
        # Numbers run to the right even inside text that runs to the left, and count as that towards spaces.
        directions.append(strong if kind == "N" else kind)
        levels.append(2 if kind == "N" and strong == "R" else level_of[strong])
    outside = before = "R" if base else "L"
    for i, direction in enumerate(directions):
        if direction:
            before = direction
        else:
            after = next((later for later in directions[i:] if later), outside)
            levels[i] = level_of[before] if before == after else base
    return levels


@dataclass(frozen=True)
class Run:
    """A piece of one line in one font and one direction; `face` None is drawn as boxed code points."""

    text: str
    face: Face | None
    level: int


def _turned(runs: list[Run], level: int) -> list[Run]:
    """Turn round every stretch of runs at or above an embedding level."""
    stretches = [(inside, list(stretch)) for inside, stretch in groupby(runs, lambda run: run.level >= level)]
    return [run for inside, stretch in stretches for run in (reversed(stretch) if inside else stretch)]


class Fonts:
    """The fonts for one picture.

    One instance serves one thread: a FreeType face may not be used by two at once.

    Args:
        sample: text of the picture, which tells Chinese, Japanese and Korean shapes of the same characters apart.
        shaping: True lets Pillow shape text (needs FriBidi), None does so where it can.
        faces: instead of the installed ones.
    """

    def __init__(self, sample: str = "", *, shaping: bool | None = None, faces: Sequence[Face] | None = None) -> None:
        self._shaping = bool(features.check("raqm")) if shaping is None else shaping
        # The members of the Noto collection: 0 Japanese, 1 Korean, 2 simplified Chinese, which share their characters.
        han = 0 if re.search("[\u3040-\u30ff]", sample) else 1 if re.search("[\uac00-\ud7a3]", sample) else 2
        self._faces = faces if faces is not None else (
            *(Face(f.path, han) if f.path and f.path.suffix == ".ttc" else f for f in bundled_faces()), Face(None),
        )  # fmt: skip
        self._system = faces is None
        self._face_of: dict[str, Face | None] = {}
        self._loaded: dict[tuple[Face, int, bool], ImageFont.FreeTypeFont] = {}
        self._widths: dict[tuple[str, int, bool], float] = {}

    def face_for(self, character: str) -> Face | None:
        """Return the first face with a glyph for `character`, None if there is none."""
        if character not in self._face_of:
            code = ord(character)
            found = next((face for face in self._faces if code in face.code_points), None)
            if found is None and self._system:
                found = next((face for face in system_faces() if code in face.code_points), None)
            self._face_of[character] = found
        return self._face_of[character]

    def _load(self, face: Face, size: int, bold: bool) -> ImageFont.FreeTypeFont:
        key = (face, size, bold)
        if key not in self._loaded:
            engine = ImageFont.Layout.RAQM if self._shaping else ImageFont.Layout.BASIC
            if face.path is None:
                font = ImageFont.truetype(_pillow_font(), size, layout_engine=engine)
            else:
                font = ImageFont.truetype(str(face.path), size, face.index, layout_engine=engine)
                if "[wght]" in face.path.name:
                    font.set_variation_by_axes([650 if bold else 450])
            self._loaded[key] = font
        return self._loaded[key]

    def runs(self, text: str) -> list[Run]:
        """Split one line into runs, in the order in which they stand on the page from left to right."""
        if not self._shaping:
            text = _SHORT_I.sub(lambda match: match[0][-1] + match[0][:-1], _IGNORABLE.sub("", _join_arabic(text)))
        runs: list[Run] = []
        for c, level in zip(text, _levels(text), strict=True):
            last = runs[-1] if runs else None
            face = last.face if last else None
            if _IGNORABLE.match(c):
                if face is None:
                    continue
            elif unicodedata.category(c)[0] != "M" or face is None or ord(c) not in face.code_points:
                face = self.face_for(c)
            if last and last.face == face and last.level == level:
                runs[-1] = Run(last.text + c, face, level)
            else:
                runs.append(Run(c, face, level))
        for level in range(max((run.level for run in runs), default=0), 0, -1):
            runs = _turned(runs, level)
        if self._shaping:
            return runs
        return [
            Run("".join(reversed(clusters(run.text))).translate(_MIRROR), run.face, run.level) if run.level % 2 else run
            for run in runs
        ]

    def _run_width(self, run: Run, size: int, bold: bool) -> float:
        if run.face is None:
            return size * 1.05 * len(run.text)
        return self._load(run.face, size, bold).getlength(run.text, direction=self._direction(run))

    def _direction(self, run: Run) -> str | None:
        return ("rtl" if run.level % 2 else "ltr") if self._shaping else None

    def width(self, text: str, size: int, *, bold: bool = False) -> float:
        """Return the width of one line in pixels at a font size in pixels."""
        key = (text, size, bold)
        if key not in self._widths:  # measured at each size anew: hinted widths do not scale
            self._widths[key] = sum(self._run_width(run, size, bold) for run in self.runs(text))
        return self._widths[key]

    def draw(
        self, draw: ImageDraw.ImageDraw, xy: tuple[float, float], text: str, size: int, fill: str, *, bold: bool = False
    ) -> None:
        """Draw one line with its left end and baseline at `xy`."""
        x, y = xy
        for run in self.runs(text):
            if run.face is None:
                for i, c in enumerate(run.text):
                    self._draw_code_point(draw, x + i * size * 1.05, y, c, size, fill)
            else:
                font = self._load(run.face, size, bold)
                thicker = size / 40 if bold and font.path and "[wght]" not in str(font.path) else 0
                draw.text(
                    (x, y), run.text, fill, font, "ls", direction=self._direction(run), stroke_width=round(thicker)
                )
            x += self._run_width(run, size, bold)

    def _draw_code_point(self, draw: ImageDraw.ImageDraw, x: float, y: float, c: str, size: int, fill: str) -> None:
        box = (x + size * 0.06, y - size * 0.82, x + size * 0.99, y + size * 0.16)
        draw.rounded_rectangle(box, size * 0.1, outline=fill, width=max(1, size // 22))
        code = f"{ord(c):04X}"
        font = self._load(Face(None), max(6, round(size * (0.42 if len(code) == 4 else 0.3))), False)
        half = (len(code) + 1) // 2
        for row, part in enumerate((code[:half], code[half:])):
            draw.text(((box[0] + box[2]) / 2, y - size * (0.56 - 0.44 * row)), part, fill, font, "mm")

    def wrap(self, text: str, width: float, size: int, *, bold: bool = False) -> list[str]:
        """Break text into lines no wider than `width` pixels; a word is torn only if it is wider by itself."""
        lines, line, used = list[str](), "", 0.0
        for token in self._tokens(text, width, size, bold):
            more = self.width(token, size, bold=bold)
            if line and used + self.width(token.rstrip(), size, bold=bold) > width:
                lines.append(line.rstrip())
                line, used = "", 0.0
            line, used = line + token, used + more
        return [*lines, line.rstrip()] if line.strip() else lines

    def _tokens(self, text: str, width: float, size: int, bold: bool) -> Iterator[str]:
        for token in _breakable(text):
            if self.width(token.rstrip(), size, bold=bold) <= width:
                yield token
            else:
                yield from clusters(token)

    def fit(
        self, text: str, box: tuple[float, float], sizes: tuple[float, float], *, bold: bool = False
    ) -> tuple[int, list[str]]:
        """Find the largest size, between the two of `sizes` in pixels, at which text fits a box of (width, height).

        At the smallest size words may be torn, and what is too long ends in an ellipsis.

        Returns:
            The size in whole pixels, and the lines.
        """
        (width, height), (smallest, largest) = box, map(round, sizes)
        width /= 1.03  # a line is a little wider than the sum of its words where letters join
        size = largest
        while size > smallest:
            if self._widest(text, size, bold) <= width:
                lines = self.wrap(text, width, size, bold=bold)
                if len(lines) * LINE * size <= height:
                    return size, self._balance(text, lines, width, size, bold)
            size = min(size - 1, round(size * 0.94))
        size = smallest
        lines = self.wrap(text, width, size, bold=bold)
        room = max(1, int(height / (LINE * size)))
        if len(lines) > room:
            last = list(_breakable(lines[room - 1]))
            if len(last) < 2:
                last = clusters(lines[room - 1])
            while last and self.width("".join(last).rstrip() + "…", size, bold=bold) > width:
                last.pop()
            lines = [*lines[: room - 1], "".join(last).rstrip(" ,;:.") + "…"]
        return size, lines

    def _widest(self, text: str, size: int, bold: bool) -> float:
        return max((self.width(token.rstrip(), size, bold=bold) for token in _breakable(text)), default=0)

    def _balance(self, text: str, lines: list[str], width: float, size: int, bold: bool) -> list[str]:
        """Return the same number of lines, made as even as that allows."""
        widest = self._widest(text, size, bold)
        for share in (0.6, 0.7, 0.8, 0.9) if len(lines) > 1 else ():
            narrower = self.wrap(text, max(width * share, widest), size, bold=bold)
            if len(narrower) == len(lines):
                return narrower
        return lines


_CJK = "\u2e80-\u2fff\u3040-\u30ff\u3100-\u312f\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_NO_START = "、。，．！？：；）」』】》〉〕”’…ーぁぃぅぇぉっゃゅょァィゥェォッャュョ・"
_BREAKABLE = re.compile(rf"[（「『【《〈〔“‘]*[{_CJK}][{_NO_START}]*\s*|[^\s{_CJK}]+\s*|\s+")


@lru_cache(maxsize=4096)
def _breakable(text: str) -> tuple[str, ...]:
    """Split text where a line may break: after spaces, and between Chinese or Japanese characters."""
    return tuple(_BREAKABLE.findall(text))
