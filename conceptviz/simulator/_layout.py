"""Where the boxes and arrows of a picture go: pure geometry, in pixels, knowing neither text nor colours.

What every layout keeps, whatever its area and number of boxes: boxes lie inside the area and do not touch each
other; an arrow begins and ends at the border of a box and crosses none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ._concepts import Kind


class Point(NamedTuple):
    """A place in pixels from the top left corner."""

    x: float
    y: float


class Rect(NamedTuple):
    """An upright rectangle in pixels."""

    left: float
    top: float
    right: float
    bottom: float

    @property
    def width(self) -> float:
        """Right minus left."""
        return self.right - self.left

    @property
    def height(self) -> float:
        """Bottom minus top."""
        return self.bottom - self.top

    @property
    def center(self) -> Point:
        """The middle."""
        return Point((self.left + self.right) / 2, (self.top + self.bottom) / 2)

    def grown(self, by: float) -> Rect:
        """Return the rectangle with every side moved outwards by `by`, inwards if negative."""
        return Rect(self.left - by, self.top - by, self.right + by, self.bottom + by)

    def holds(self, point: Point) -> bool:
        """Tell whether a point lies strictly inside."""
        return self.left < point.x < self.right and self.top < point.y < self.bottom

    def overlaps(self, other: Rect) -> bool:
        """Tell whether two rectangles share area."""
        return (
            self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom
        )

    def crosses(self, a: Point, b: Point) -> bool:
        """Tell whether the straight line from `a` to `b` passes through the inside."""
        start, end = 0.0, 1.0
        for origin, delta, low, high in (
            (a.x, b.x - a.x, self.left, self.right),
            (a.y, b.y - a.y, self.top, self.bottom),
        ):
            if abs(delta) < 1e-9:
                if not low < origin < high:
                    return False
                continue
            near, far = sorted(((low - origin) / delta, (high - origin) / delta))
            start, end = max(start, near), min(end, far)
        return start + 1e-9 < end


@dataclass(frozen=True)
class Arrow:
    """A line through `points`, with its head at the last one; `source` and `target` are box numbers, -1 the hub."""

    points: tuple[Point, ...]
    source: int
    target: int

    @property
    def length(self) -> float:
        """The way along the line in pixels."""
        return sum(math.dist(a, b) for a, b in zip(self.points, self.points[1:], strict=False))


@dataclass(frozen=True)
class Layout:
    """The boxes in reading order, the arrows between them, and the middle: the hub, or the free inside of a ring."""

    boxes: tuple[Rect, ...]
    arrows: tuple[Arrow, ...]
    hub: Rect | None = None

    def is_clean(self, margin: float) -> bool:
        """Tell whether nothing is nearer than `margin` to what it should not touch."""
        solid = [*self.boxes, *([self.hub] if self.hub else [])]
        if any(a.grown(margin).overlaps(b) for i, a in enumerate(solid) for b in solid[:i]):
            return False
        for arrow in self.arrows:
            ends = {arrow.source % len(solid), arrow.target % len(solid)} if self.hub else {arrow.source, arrow.target}
            if arrow.length < 1.5 * margin:
                return False
            for number, box in enumerate(solid):
                # An arrow touches the boxes it joins at their borders, so for those the box itself counts.
                near = box.grown(-0.5) if number in ends else box.grown(margin / 2)
                if any(near.crosses(a, b) for a, b in zip(arrow.points, arrow.points[1:], strict=False)):
                    return False
        return True


@dataclass(frozen=True)
class _Scale:
    """What a comfortable box is: in pixels, the smallest font size and the width its text asks for."""

    em: float
    width: float

    def quality(self, layout: Layout) -> float:
        """Return how large a text the smallest box takes, as a multiple of a comfortable one, at most 2.2."""
        return min(2.2, *(min(box.width / self.width, box.height / (4.2 * self.em)) for box in layout.boxes))

    def best(self, layouts: Iterable[Layout]) -> tuple[float, Layout | None]:
        """Return the clean layout of the highest quality, the first of about equal ones."""
        best: tuple[float, Layout | None] = (0.0, None)
        for layout in layouts:
            quality = self.quality(layout)
            if quality > best[0] * 1.02 and layout.is_clean(self.em * 0.9):
                best = (quality, layout)
        return best


def _box(center: Point, width: float, height: float) -> Rect:
    return Rect(center.x - width / 2, center.y - height / 2, center.x + width / 2, center.y + height / 2)


def _straight(a: Rect, b: Rect, source: int, target: int, gap: float) -> Arrow:
    """Join two boxes along the line between their middles, from border to border with a little air."""

    def border(box: Rect, towards: Point) -> Point:
        c = box.center
        dx, dy = towards.x - c.x, towards.y - c.y
        box = box.grown(gap)
        t = min(box.width / 2 / abs(dx) if dx else math.inf, box.height / 2 / abs(dy) if dy else math.inf)
        return Point(c.x + dx * t, c.y + dy * t)

    return Arrow((border(a, b.center), border(b, a.center)), source, target)


def _grid(area: Rect, columns: int, rows: int, em: float) -> Callable[[int, int], Rect]:
    """Return a function from column and row to the box there: cells with room for arrows in between."""
    gap_x, gap_y = max(3.4 * em, area.width * 0.045), max(3.2 * em, area.height * 0.05)
    width = min((area.width - gap_x * (columns - 1)) / columns, 22 * em)
    height = min((area.height - gap_y * (rows - 1)) / rows, 11 * em, width * 0.8)
    gap_x = min((area.width - width * columns) / max(columns - 1, 1), 9 * em)
    gap_y = min((area.height - height * rows) / max(rows - 1, 1), 7 * em)
    left = area.center.x - (width * columns + gap_x * (columns - 1)) / 2
    top = area.center.y - (height * rows + gap_y * (rows - 1)) / 2

    def cell(column: int, row: int) -> Rect:
        x, y = left + column * (width + gap_x), top + row * (height + gap_y)
        return Rect(x, y, x + width, y + height)

    return cell


def _snake(count: int, area: Rect, em: float) -> Iterable[Layout]:
    """Rows that turn at their ends, for each number of columns."""
    for columns in range(1, count + 1):
        cell = _grid(area, columns, -(-count // columns), em)
        boxes = []
        for number in range(count):
            row, column = divmod(number, columns)
            boxes.append(cell(columns - 1 - column if row % 2 else column, row))
        arrows = [_straight(boxes[i], boxes[i + 1], i, i + 1, em * 0.25) for i in range(count - 1)]
        yield Layout(tuple(boxes), tuple(arrows))


def _loop(count: int, area: Rect, em: float) -> Iterable[Layout]:
    """The border of a grid, clockwise from the top left: a ring for areas too flat or too full for an ellipse."""
    places = count + count % 2
    for columns in range(2, places // 2 + 1):
        rows = places // 2 + 2 - columns
        cell = _grid(area, columns, rows, em)
        way = [
            *((column, 0) for column in range(columns)),
            *((columns - 1, row) for row in range(1, rows)),
            *((column, rows - 1) for column in range(columns - 2, -1, -1)),
            *((0, row) for row in range(rows - 2, 0, -1)),
        ]
        boxes = [cell(*place) for place in way[:count]]
        arrows = [_straight(boxes[i], boxes[(i + 1) % count], i, (i + 1) % count, em * 0.25) for i in range(count)]
        yield Layout(tuple(boxes), tuple(arrows))


def _ellipse(
    area: Rect, size: tuple[float, float], turns: Sequence[float]
) -> tuple[Callable[[float], Point], list[Rect]]:
    """Return the way round an ellipse inside `area` and boxes centred on it, at `turns` of a full turn from the top."""
    width, height = size
    radius_x, radius_y = (area.width - width) / 2, (area.height - height) / 2
    radius_x, radius_y = min(radius_x, 2.4 * radius_y), min(radius_y, 2 * radius_x)
    c = area.center

    def at(turn: float) -> Point:
        return Point(c.x + radius_x * math.sin(math.tau * turn), c.y - radius_y * math.cos(math.tau * turn))

    return at, [_box(at(turn), width, height) for turn in turns]


def _sizes(em: float) -> Iterable[tuple[float, float]]:
    for scale in (2.2, 2.0, 1.8, 1.6, 1.45, 1.3, 1.15, 1.0, 0.9, 0.8):
        for shape in (1.3, 1.0):
            yield 11 * em * scale * shape, 4.4 * em * scale / shape**0.3


def _ring(count: int, area: Rect, em: float) -> Iterable[Layout]:
    """Boxes on an ellipse, joined by arcs of it; the free inside is the hub."""
    start = 0.75 if count == 2 and area.width > area.height else 0.0
    turns = [start + i / count for i in range(count)]
    for size in _sizes(em):
        at, boxes = _ellipse(area, size, turns)
        if area.width < 1.6 * size[0] or area.height < 2.4 * size[1]:
            continue
        arrows = []
        for i, turn in enumerate(turns):
            path = [at(turn + step / 60 / count) for step in range(61)]
            a, b = boxes[i].grown(em * 0.25), boxes[(i + 1) % count].grown(em * 0.25)
            free = [point for point in path if not a.holds(point) and not b.holds(point)]
            arrows.append(Arrow(tuple(free), i, (i + 1) % count))
        hub = _box(area.center, min(13 * em, area.width * 0.3), min(5 * em, area.height * 0.22))
        yield Layout(tuple(boxes), tuple(arrows), hub)


def _spokes(count: int, area: Rect, em: float) -> Iterable[Layout]:
    """A hub in the middle and boxes on an ellipse around it."""
    hub = _box(area.center, min(18 * em, area.width * 0.36), min(6.4 * em, area.height * 0.3))
    for size in _sizes(em):
        for start in (0.0, 0.5 / count, 0.25):
            _, boxes = _ellipse(area, size, [start + i / count for i in range(count)])
            arrows = [_straight(hub, box, -1, i, em * 0.25) for i, box in enumerate(boxes)]
            yield Layout(tuple(boxes), tuple(arrows), hub)


def _flip(layout: Layout) -> Layout:
    """Swap x and y."""

    def rect(r: Rect) -> Rect:
        return Rect(r.top, r.left, r.bottom, r.right)

    arrows = (Arrow(tuple(Point(p.y, p.x) for p in a.points), a.source, a.target) for a in layout.arrows)
    return Layout(tuple(map(rect, layout.boxes)), tuple(arrows), rect(layout.hub) if layout.hub else None)


def _tree(count: int, area: Rect, em: float, hub_height: float) -> Layout:
    """A hub on top, a stem down from it, and boxes on both sides of the stem: fits whatever the area."""
    rows, gap = -(-count // 2), em * 1.2
    hub_width = min(area.width, 26 * em)
    hub = Rect(area.center.x - hub_width / 2, area.top, area.center.x + hub_width / 2, area.top + hub_height)
    stem = area.center.x
    reach = 3.2 * em
    height = min((area.bottom - hub.bottom - gap * rows) / rows, 11 * em)
    width = min(area.width / 2 - reach, 24 * em)
    boxes, arrows = [], []
    for number in range(count):
        row, side = divmod(number, 2)
        top = hub.bottom + gap + row * (height + gap)
        inner = stem + reach if side else stem - reach
        box = Rect(inner, top, inner + width, top + height) if side else Rect(inner - width, top, inner, top + height)
        boxes.append(box)
        air = -em * 0.25 if side else em * 0.25
        way = (Point(stem, hub.bottom), Point(stem, box.center.y), Point(inner + air, box.center.y))
        arrows.append(Arrow(way, -1, number))
    return Layout(tuple(boxes), tuple(arrows), hub)


def plan(kind: Kind, count: int, area: Rect, em: float, letters: int = 16) -> Layout:
    """Place `count` boxes (1 to 12) and their arrows in `area`.

    Args:
        kind: a ring, a chain, or a hub with spokes.
        count: how many boxes, the hub not counted.
        area: where they may be, at least 20 em wide and high for a result that holds text.
        em: the smallest font size in pixels; boxes are made for it.
        letters: of the longest text in a box; long ones ask for wide boxes.
    """
    scale = _Scale(em, min(max(11.0, 0.4 * letters), 18.0) * em)
    layout: Layout | None = None
    if kind == "cycle" and count > 1:
        quality, layout = scale.best(_ring(count, area, em))
        if quality < 1 and count >= 4:
            flat, loop = scale.best(_loop(count, area, em))
            layout = loop if flat > quality else layout
    elif kind == "hub":
        quality, layout = scale.best(_spokes(count, area, em))
        if quality < 1:
            turned = Rect(area.top, area.left, area.bottom, area.right)
            flat, tree = scale.best((_tree(count, area, em, 4.4 * em), _flip(_tree(count, turned, em, 12 * em))))
            layout = tree if flat > quality else layout
    # A chain fits everywhere, so it also stands in for the others where they do not.
    return layout or scale.best(_snake(count, area, em))[1] or max(_snake(count, area, em), key=scale.quality)
