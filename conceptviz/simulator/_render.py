"""The simulator's pictures: a prompt drawn as a labelled diagram, plainly marked as simulated.

`render` is a pure function of its arguments and of the fonts on the machine. Which concepts are drawn is decided in
`_concepts`, where they go in `_layout`, how their text is set in `_fonts`; only this file touches pixels.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

from PIL import Image, ImageDraw, ImageFilter, ImageOps

from ._concepts import Concepts, clean, clip, extract
from ._fonts import LINE, Fonts
from ._layout import Arrow, Layout, Point, Rect, plan

_AREA = 2048 * 2048  # pixels of a 2k picture, whatever its ratio
_NAMED_RATIOS = {"a4-portrait": 1 / math.sqrt(2), "a4-landscape": math.sqrt(2)}
_EM = 0.024  # smallest font size, as a share of the short side: capitals of 1.7 %
_MARK = "simulated by conceptviz - not a real generation"
_MAX_EDIT_CONCEPTS = 8  # an edit shares its canvas with its inputs
_MAX_INPUT_PIXELS = 50_000_000
_INK, _SOFT_INK, _WHITE = "#1f2933", "#52606d", "#ffffff"


class Palette(NamedTuple):
    """Colours of one picture: title bar, page, and the boxes' fills with the line of each."""

    deep: str
    page: str
    fills: tuple[str, ...]
    lines: tuple[str, ...]


_PALETTES = tuple(
    Palette(deep, page, tuple(fills.split()), tuple(lines.split()))
    for deep, page, fills, lines in (
        ("#1d4e68", "#f5f9fb", "#d9edf5 #e2f2e4 #fdf0d5 #e9e6f7", "#2f7f9f #4b8f5b #c98a1b #6d62b5"),
        ("#2f4858", "#f8f7f3", "#fbe3d6 #dcefee #f8efcf #e4e9f2", "#cc6b3e #2a8a86 #b8921f #52709f"),
        ("#3b3a6b", "#f7f7fc", "#e5e4f9 #d8f0ee #fde4ea #fcf0d3", "#5f5bb8 #25908a #c4537a #bf8b1e"),
        ("#245046", "#f5faf7", "#dbf1e4 #dcebf7 #f6f0d2 #f9e3dc", "#35946a #3d7fb3 #a58d1d #c3644a"),
        ("#5a2f46", "#fcf7f8", "#f8e0e8 #e2e8f8 #def0e6 #fbecd6", "#b5527c #4f6fb8 #3c9069 #c68232"),
    )
)


def pixel_size(quality: str, aspect_ratio: str) -> tuple[int, int]:
    """Return (width, height) in pixels for a quality and an aspect ratio.

    At "2k" every ratio has about as many pixels, with sides that are multiples of 32; 16:9 is 2752 x 1536 as seen
    from the real service. "4k" doubles both sides.

    Args:
        quality: "2k" or "4k"; anything else counts as "2k".
        aspect_ratio: "W:H", "a4-portrait" or "a4-landscape", held between 1:4 and 4:1; anything else counts as 16:9.
    """
    name = aspect_ratio.strip().lower()
    ratio = _NAMED_RATIOS.get(name)
    numbers = re.fullmatch(r"(\d{1,6}(?:\.\d{1,6})?)\s*[:x/]\s*(\d{1,6}(?:\.\d{1,6})?)", name, re.ASCII)
    if ratio is None and numbers and float(numbers[1]) and float(numbers[2]):
        ratio = float(numbers[1]) / float(numbers[2])
    ratio = min(max(ratio or 16 / 9, 1 / 4), 4.0)
    width, height = (32 * math.ceil(math.sqrt(_AREA * r) / 32 - 1e-6) for r in (ratio, 1 / ratio))
    scale = 2 if quality.strip().lower() == "4k" else 1
    return width * scale, height * scale


def render(
    prompt: str,
    *,
    model: str,
    quality: str,
    aspect_ratio: str,
    seed: int,
    inputs: Sequence[bytes] = (),
    format: Literal["jpeg", "png"] = "jpeg",  # noqa: A002  # the name Pillow and the simulator's world use
) -> bytes:
    """Draw the diagram that a prompt describes and return it as a complete image file.

    Any string is a prompt, however long or odd; the same arguments give the same bytes.

    Args:
        prompt: what to draw, or for an edit the instruction.
        model: shown in the footer.
        quality: shown in the footer, and see `pixel_size`.
        aspect_ratio: shown in the footer, and see `pixel_size`.
        seed: with the prompt, chooses the colours.
        inputs: the images to edit, shown beside the result; empty or unreadable ones as "image at URL".
        format: "jpeg" or "png".
    """
    size = pixel_size(quality, aspect_ratio)
    picture = _Picture(prompt, size, seed)
    settings = (clip(clean(text), 24) for text in (model, quality, aspect_ratio))
    picture.compose(" · ".join(settings), inputs)
    out = io.BytesIO()
    if format == "png":
        picture.image.save(out, "PNG", compress_level=2)
    else:
        picture.image.save(out, "JPEG", quality=88)
    return out.getvalue()


class _Picture:
    """One picture being drawn, from the page up to the mark in its corner."""

    def __init__(self, prompt: str, size: tuple[int, int], seed: int) -> None:
        self.prompt = prompt
        self.concepts = extract(prompt)
        self.fonts = Fonts(self.concepts.title + " ".join(self.concepts.labels))
        digest = hashlib.sha256(f"{seed}\n{prompt}".encode("utf-8", "surrogatepass")).digest()
        self.palette = _PALETTES[digest[0] % len(_PALETTES)]
        self.tint = digest[1]
        self.image = Image.new("RGB", size, self.palette.page)
        self.draw = ImageDraw.Draw(self.image)
        self.em = min(size) * _EM
        self.samples = 4 if max(size) < 4200 else 2  # of antialiasing; large pictures need less

    def compose(self, settings: str, inputs: Sequence[bytes]) -> None:
        """Draw everything."""
        em, width = self.em, self.image.width
        concepts = self._edit_concepts() if inputs else self.concepts
        top = self._title(concepts.title)
        bottom = self._footer(settings)
        area = Rect(2 * em, top + 1.8 * em, width - 2 * em, bottom - 1.6 * em)
        if inputs:
            area = self._inputs(list(inputs[:4]), area)
        layout = plan(concepts.kind, len(concepts.labels), area, em, max(map(len, concepts.labels)))
        self._shadows([*layout.boxes, *([layout.hub] if concepts.kind == "hub" and layout.hub else [])])
        for arrow in layout.arrows:
            self._arrow(arrow)
        self._diagram(concepts, layout, "Edited image" if inputs else concepts.title)
        self._ribbon()

    def _edit_concepts(self) -> Concepts:
        title = clip(clean(self.prompt).replace("\n", " "), 160) or self.concepts.title
        if self.concepts.generic:
            return Concepts(title, ("Before", "After"), "flow", generic=True)
        return Concepts(title, self.concepts.labels[:_MAX_EDIT_CONCEPTS], self.concepts.kind)

    def _title(self, title: str) -> float:
        """Draw the title bar and return its lower edge."""
        em, width = self.em, self.image.width
        room = width - 4 * em - self._ribbon_side()
        size, lines = self.fonts.fit(title, (room, 5.2 * em), (1.35 * em, 2.5 * em), bold=True)
        bottom = len(lines) * LINE * size + 1.8 * em
        self.draw.rectangle((0, 0, width, bottom), self.palette.deep)
        share = width / len(self.palette.lines)
        for i, colour in enumerate(self.palette.lines):
            self.draw.rectangle((i * share, bottom, (i + 1) * share, bottom + 0.22 * em), colour)
        self._lines(lines, Rect(2 * em, 0, 2 * em + room, bottom), size, _WHITE, bold=True, align="left")
        return bottom + 0.22 * em

    def _footer(self, settings: str) -> float:
        """Draw the prompt, the mark and the settings, and return the upper edge of it all."""
        em, (width, height) = self.em, self.image.size
        size = round(em)
        inner = width - 4 * em
        line = LINE * em
        left, right = [_MARK], [settings]
        if self.fonts.width(_MARK, size) + self.fonts.width(settings, size) + 2 * em > inner:
            left, right = self.fonts.wrap(f"{_MARK} · {settings}", inner, size), []
        box = Rect(2 * em, height - len(left) * line - 0.5 * em, width - 2 * em, height - 0.5 * em)
        self._lines(left, box, size, _SOFT_INK, align="left")
        self._lines(right, box, size, _SOFT_INK, align="right")
        rule = box.top - 0.5 * em
        self.draw.line((2 * em, rule, width - 2 * em, rule), "#cbd2d9", max(1, round(em / 14)))
        asked = clip(clean(self.prompt).replace("\n", " "), 400)
        _, lines = self.fonts.fit(asked, (inner, 2 * line), (em, em))
        top = rule - 0.4 * em - len(lines) * line
        self._lines(lines, Rect(2 * em, top, width - 2 * em, rule - 0.4 * em), size, _SOFT_INK, align="left")
        return top

    def _lines(
        self,
        lines: Sequence[str],
        box: Rect,
        size: int,
        fill: str,
        *,
        bold: bool = False,
        align: Literal["left", "center", "right"] = "center",
        draw: ImageDraw.ImageDraw | None = None,
    ) -> None:
        """Draw lines of text in the vertical middle of a box."""
        step = LINE * size
        y = box.center.y - step * len(lines) / 2
        for number, line in enumerate(lines):
            spare = box.width - self.fonts.width(line, size, bold=bold)
            x = box.left + spare * {"left": 0.0, "center": 0.5, "right": 1.0}[align]
            baseline = y + step * (number + 0.5) + 0.36 * size
            self.fonts.draw(draw or self.draw, (x, baseline), line, size, fill, bold=bold)

    def _diagram(self, concepts: Concepts, layout: Layout, middle: str) -> None:
        em = self.em
        numbered = concepts.kind != "hub" and len(concepts.labels) > 1 and not concepts.generic
        texts = [(_inner(box, em, numbered), label) for box, label in zip(layout.boxes, concepts.labels, strict=True)]
        # One size for all boxes, the size of the fullest: a diagram with a text size per box looks accidental.
        largest = min(self.fonts.fit(text, _size(room), (em, 2.6 * em))[0] for room, text in texts)
        for number, (box, (room, text)) in enumerate(zip(layout.boxes, texts, strict=True)):
            tint = (self.tint + number) % len(self.palette.fills)
            line = self.palette.lines[tint]
            self._rounded(box, 0.8 * em, line)
            self._rounded(box.grown(-0.13 * em), 0.67 * em, self.palette.fills[tint])
            size, lines = self.fonts.fit(text, _size(room), (em, largest))
            self._lines(lines, room, size, _INK)
            if numbered:
                self._badge(Point(box.left + 1.15 * em, box.top + 1.15 * em), str(number + 1), line)
        if layout.hub and concepts.kind == "hub":
            self._rounded(layout.hub, min(layout.hub.height / 2, 1.6 * em), self.palette.deep)
            room = _inner(layout.hub, em)
            size, lines = self.fonts.fit(middle, _size(room), (em, 2 * em), bold=True)
            self._lines(lines, room, size, _WHITE, bold=True)
        elif layout.hub:
            size, lines = self.fonts.fit(middle, _size(layout.hub), (em, 2 * em), bold=True)
            self._lines(lines, layout.hub, size, self.palette.deep, bold=True)

    def _shadows(self, boxes: Sequence[Rect]) -> None:
        """Draw a soft shadow under all boxes at once, blurred on an eighth of the size, where it costs nothing."""
        shrink = max(1, round(self.em / 5))
        small = Image.new("L", (self.image.width // shrink + 1, self.image.height // shrink + 1))
        draw = ImageDraw.Draw(small)
        for box in boxes:
            x0, y0, x1, y1 = (side / shrink for side in box)
            draw.rounded_rectangle((x0 + 0.6, y0 + 1.6, x1 + 0.6, y1 + 2.0), 4, 70)
        mask = small.filter(ImageFilter.GaussianBlur(1.8)).resize(
            (small.width * shrink, small.height * shrink), Image.Resampling.BILINEAR
        )
        self.image.paste("#334e68", (0, 0), mask.crop((0, 0, *self.image.size)))

    def _rounded(self, box: Rect, radius: float, fill: str) -> None:
        """Fill a rectangle with smooth round corners."""
        x0, y0, x1, y1 = (round(side) for side in box)
        r = max(1, min(round(radius), (x1 - x0) // 2, (y1 - y0) // 2))
        mask = Image.new("L", (x1 - x0, y1 - y0), 255)
        corner = Image.new("L", (r * 4, r * 4))
        ImageDraw.Draw(corner).ellipse((0, 0, r * 8 - 1, r * 8 - 1), 255)
        corner = corner.reduce(4)
        for at in ((0, 0), (mask.width - r, 0), (0, mask.height - r), (mask.width - r, mask.height - r)):
            turned = ImageOps.mirror(corner) if at[0] else corner
            mask.paste(ImageOps.flip(turned) if at[1] else turned, at)
        self.image.paste(fill, (x0, y0), mask)

    def _smooth(
        self, points: Sequence[Point], margin: float
    ) -> tuple[Image.Image, ImageDraw.ImageDraw, tuple[int, int]]:
        """Return an enlarged mask around points, its pen, and its place: what is drawn there comes out antialiased."""
        x0, y0 = (math.floor(min(p[i] for p in points) - margin) for i in (0, 1))
        x1, y1 = (math.ceil(max(p[i] for p in points) + margin) for i in (0, 1))
        mask = Image.new("L", ((x1 - x0) * self.samples, (y1 - y0) * self.samples))
        return mask, ImageDraw.Draw(mask), (x0, y0)

    def _arrow(self, arrow: Arrow) -> None:
        head, thick = 0.95 * self.em, 0.16 * self.em
        mask, draw, (x0, y0) = self._smooth(arrow.points, head)
        *way, tip = arrow.points
        while len(way) > 1 and math.dist(way[-1], tip) < head * 0.8:
            way.pop()
        angle = math.atan2(tip.y - way[-1].y, tip.x - way[-1].x)
        neck = Point(tip.x - head * 0.7 * math.cos(angle), tip.y - head * 0.7 * math.sin(angle))
        wings = [
            Point(tip.x - head * math.cos(angle + turn), tip.y - head * math.sin(angle + turn))
            for turn in (0.45, -0.45)
        ]

        def at(points: Sequence[Point]) -> list[tuple[float, float]]:
            return [((p.x - x0) * self.samples, (p.y - y0) * self.samples) for p in points]

        draw.line(at([*way, neck]), 255, round(2 * thick * self.samples), joint="curve")
        draw.polygon(at([tip, wings[0], neck, wings[1]]), 255)
        self.image.paste(_SOFT_INK, (x0, y0), mask.reduce(self.samples))

    def _badge(self, center: Point, text: str, fill: str) -> None:
        """Draw a step number in a disc."""
        radius = 0.8 * self.em
        disc = Rect(center.x - radius, center.y - radius, center.x + radius, center.y + radius)
        self._rounded(disc, radius, fill)
        self._lines([text], disc, round(self.em), _WHITE, bold=True)

    def _inputs(self, inputs: list[bytes], area: Rect) -> Rect:
        """Draw the images to edit beside or above a frame for the result, and return the area inside that."""
        em, reach = self.em, 3.6 * self.em
        if area.width > 0.95 * area.height:
            x = area.left + min(0.27 * area.width, 26 * em)
            panel, result = Rect(area.left, area.top, x, area.bottom), Rect(x + reach, *area[1:])
            start, end = Point(x + 0.4 * em, area.center.y), Point(x + reach - 0.4 * em, area.center.y)
        else:
            y = area.top + min(0.27 * area.height, 20 * em)
            panel, result = Rect(*area[:3], y), Rect(area.left, y + reach, area.right, area.bottom)
            start, end = Point(area.center.x, y + 0.4 * em), Point(area.center.x, y + reach - 0.4 * em)
        self._arrow(Arrow((start, end), 0, 1))
        count = len(inputs)
        space = self._panel(panel, "Input image" if count == 1 else f"{count} input images", "#e4e7eb")
        gap = 0.6 * em

        def cell(columns: int) -> tuple[float, float]:
            rows = -(-count // columns)
            return (space.width - gap * (columns - 1)) / columns, (space.height - gap * (rows - 1)) / rows

        # As many columns as leave the largest thumbnails of the commonest shape.
        columns = max(range(1, count + 1), key=lambda number: min(cell(number)[0] / 16, cell(number)[1] / 9))
        width, height = cell(columns)
        for number, data in enumerate(inputs):
            row, column = divmod(number, columns)
            left, top = space.left + column * (width + gap), space.top + row * (height + gap)
            self._thumbnail(data, Rect(left, top, left + width, top + height))
        return self._panel(result, "Result", _WHITE)

    def _panel(self, box: Rect, name: str, fill: str) -> Rect:
        """Draw a frame with a name at its top and return the room below it."""
        em = self.em
        self._rounded(box, 0.8 * em, "#cbd2d9")
        self._rounded(box.grown(-0.1 * em), 0.7 * em, fill)
        inside = box.grown(-0.8 * em)
        heading = Rect(inside.left, inside.top, inside.right, inside.top + LINE * em)
        size, lines = self.fonts.fit(name, _size(heading), (em, em), bold=True)
        self._lines(lines, heading, size, _SOFT_INK, bold=True)
        return Rect(inside.left, heading.bottom + 0.4 * em, inside.right, inside.bottom)

    def _thumbnail(self, data: bytes, cell: Rect) -> None:
        """Draw one input image, or a card in its place."""
        em = self.em
        picture = _decode(data, (max(1, int(cell.width)), max(1, int(cell.height))))
        if picture is not None:
            x, y = cell.center.x - picture.width / 2, cell.center.y - picture.height / 2
            frame = Rect(x, y, x + picture.width, y + picture.height).grown(0.14 * em)
            self._rounded(frame, 1, _WHITE)
            self.image.paste(picture, (round(x), round(y)))
            return
        half = Point(min(cell.width, cell.height * 1.5) / 2, min(cell.height, cell.width * 0.75) / 2)
        middle = cell.center
        card = Rect(middle.x - half.x, middle.y - half.y, middle.x + half.x, middle.y + half.y)
        self._rounded(card, 0.5 * em, "#9aa5b1")
        self._rounded(card.grown(-0.1 * em), 0.4 * em, _WHITE)
        size, lines = self.fonts.fit("image at URL", _size(card.grown(-0.6 * em)), (em, 1.6 * em))
        self._lines(lines, card, size, _SOFT_INK)

    def _ribbon_side(self) -> float:
        """Return how far the corner mark reaches along both edges: less than where the boxes begin."""
        return 8.5 * self.em

    def _ribbon(self) -> None:
        """Lay a band with "SIMULATED" across the top right corner."""
        side, band = round(self._ribbon_side()), 1.9 * self.em
        length = side * math.sqrt(2)
        strip = Image.new("RGBA", (round(length), round(band)), "#f7c948")
        size, lines = self.fonts.fit("SIMULATED", (length * 0.66, band), (self.em, self.em * 1.1), bold=True)
        self._lines(lines, Rect(0, 0, length, band), size, _INK, bold=True, draw=ImageDraw.Draw(strip))
        turned = strip.rotate(-45, Image.Resampling.BICUBIC, expand=True)
        # The middle of the band lies where it leaves a triangle of page in the corner.
        middle = Point(self.image.width - side / 2 + band * 0.36, side / 2 - band * 0.36)
        at = (round(middle.x - turned.width / 2), round(middle.y - turned.height / 2))
        self.image.paste(turned, at, turned)


def _inner(box: Rect, em: float, numbered: bool = False) -> Rect:
    """Return where the text of a box may be: clear of its border and of the badge with its number."""
    side = (1.95 if numbered else 0.7) * em
    end = max(0.15 * em, min(0.07 * box.height, 0.6 * em))
    return Rect(box.left + side, box.top + end, box.right - side, box.bottom - end)


def _size(box: Rect) -> tuple[float, float]:
    return box.width, box.height


def _decode(data: bytes, size: tuple[int, int]) -> Image.Image | None:
    """Return an image made to fit `size`, or None for what is no picture of a sane size."""
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP", "GIF")) as image:
            if image.width * image.height > _MAX_INPUT_PIXELS:
                return None
            image.draft("RGB", size)
            ImageOps.exif_transpose(image, in_place=True)
            plain = image if image.mode in {"RGB", "RGBA", "L"} else image.convert("RGBA")
            small = ImageOps.contain(plain, size).convert("RGBA")
            flat = Image.new("RGBA", small.size, _WHITE)
            flat.alpha_composite(small)
            return flat.convert("RGB")
    except Exception:  # noqa: BLE001  # decoders raise whatever a hostile file provokes, and a placeholder tells it
        return None
