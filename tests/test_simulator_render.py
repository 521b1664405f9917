"""The simulator's pictures: what a prompt becomes, where it is drawn, in which script, and as which bytes."""

# ruff: noqa: RUF001  # prompts in many scripts

from __future__ import annotations

import io
import math
import struct
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, features

from conceptviz.simulator import _fonts, _render
from conceptviz.simulator._concepts import MAX_CONCEPTS, MAX_LABEL, MAX_TITLE, Kind, clean, clip, extract
from conceptviz.simulator._fonts import Face, Fonts, bundled_faces, clusters
from conceptviz.simulator._layout import Arrow, Layout, Point, Rect, plan
from conceptviz.simulator._render import pixel_size, render

WATER = "water cycle diagram showing evaporation, condensation, and precipitation"
LONG = (
    'Create a detailed infographic titled "The Nitrogen Cycle" in a clean, flat style with a white background.\n\n'
    "Include the following stages:\n"
    + "\n".join(
        f"{number}. {name}: “{text}” — with arrows, labels and a caption that says what happens there and why."
        for number, (name, text) in enumerate(
            {
                "Nitrogen fixation": "lightning and bacteria turn N₂ into ammonia",
                "Nitrification": "bacteria oxidise ammonium to nitrate",
                "Assimilation": "roots absorb nitrate",
                "Consumption of plants by herbivores and of herbivores by carnivores": "deer eat plants",
                "Denitrification": "nitrate becomes N₂ again",
            }.items(),
            start=1,
        )
    )
    + "\n" + "The audience is first-year students; keep all text legible in print. " * 12
)  # fmt: skip
SCRIPTS = {
    "latin": "Évaporation, Łódź, ượng",
    "cyrillic": "Круговорот воды, їжак",
    "greek": "Ο κύκλος του νερού, εξάτμιση",
    "chinese": "水循环图：蒸发、凝结、降水",
    "traditional chinese": "水循環圖：蒸發、凝結、降水",
    "japanese": "光合成のプロセス：水の分解、酸素の放出",
    "korean": "물의 순환: 증발, 응결, 강수",
    "arabic": "دورة الماء: التبخر، التكاثف، الهطول",
    "persian": "چرخهٔ آب: تبخیر، میعان، بارش",
    "hebrew": "מחזור המים: אידוי, עיבוי, משקעים",
    "hindi": "जल चक्र: वाष्पीकरण, संघनन, वर्षा",
    "thai": "วัฏจักรน้ำ: การระเหย, การควบแน่น",
    "bengali": "জলচক্র: বাষ্পীভবন",
    "tamil": "நீர் சுழற்சி: ஆவியாதல்",
    "emoji": "🚀 💧 🌧",
    "symbols": "≥ ∑ ∞ → CO₂",
}
RATIOS = ("16:9", "1:1", "4:3", "9:16", "a4-portrait", "1:4", "4:1")


def draw(prompt: str = WATER, **options: Any) -> bytes:
    arguments = {"model": "cv-2", "quality": "2k", "aspect_ratio": "16:9", "seed": 1, **options}
    return render(prompt, **arguments)


def opened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def solid(colour: str, size: tuple[int, int] = (400, 300), name: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, colour).save(out, name)
    return out.getvalue()


@pytest.mark.parametrize(
    ("quality", "ratio", "size"),
    [
        ("2k", "16:9", (2752, 1536)),  # as seen from the real service
        ("4k", "16:9", (5504, 3072)),
        ("2k", "9:16", (1536, 2752)),
        ("2k", "1:1", (2048, 2048)),
        ("4k", "1:1", (4096, 4096)),
        ("2k", "4:3", (2368, 1792)),
        ("2k", "a4-portrait", (1728, 2464)),
        ("2k", "A4-landscape", (2464, 1728)),
        ("2k", "1.5:1", (2528, 1696)),
        ("2k", "100:1", (4096, 1024)),
        ("2k", "1:999", (1024, 4096)),
        ("2k", "0:1", (2752, 1536)),
        ("2k", "banana", (2752, 1536)),
        ("", "", (2752, 1536)),
    ],
)
def test_pixel_size(quality: str, ratio: str, size: tuple[int, int]) -> None:
    assert pixel_size(quality, ratio) == size


@given(st.integers(1, 999_999), st.integers(1, 999_999))
def test_every_ratio_has_about_the_same_number_of_pixels(across: int, down: int) -> None:
    width, height = pixel_size("2k", f"{across}:{down}")
    wanted = min(max(across / down, 0.25), 4)
    assert width % 32 == height % 32 == 0
    assert 2048**2 <= width * height <= 2048**2 * 1.06
    assert width / height == pytest.approx(wanted, rel=0.04)


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize(
    ("form", "magic", "trailer"),
    [("jpeg", b"\xff\xd8\xff", b"\xff\xd9"), ("png", b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82")],
)
def test_the_file_is_complete_and_has_the_promised_size(form: str, magic: bytes, trailer: bytes, ratio: str) -> None:
    """A picture of the right format, ending exactly where the format says it ends."""
    data = draw(aspect_ratio=ratio, format=form)
    assert data.startswith(magic)
    assert data.endswith(trailer)
    image = opened(data)
    assert (image.format, image.size, image.mode) == (form.upper(), pixel_size("2k", ratio), "RGB")


def test_4k_has_twice_the_sides() -> None:
    assert opened(draw(quality="4k")).size == (5504, 3072)


def test_the_same_arguments_give_the_same_bytes() -> None:
    """Also when many threads draw at once, as the server does."""
    pictures = {prompt: draw(prompt, seed=3) for prompt in (WATER, SCRIPTS["chinese"], SCRIPTS["arabic"])}
    start = threading.Barrier(3)

    def again(prompt: str) -> tuple[str, bytes]:
        start.wait(10)
        return prompt, draw(prompt, seed=3)

    with ThreadPoolExecutor(3) as pool:
        assert dict(pool.map(again, pictures)) == pictures


def test_prompt_seed_and_settings_show_in_the_picture() -> None:
    base = draw()
    for other in (draw("the rock cycle"), draw(seed=2), draw(model="cv-1"), draw(inputs=[b""])):
        assert other != base


@pytest.mark.parametrize(
    ("prompt", "title", "labels", "kind"),
    [
        (WATER, "Water cycle", ["Evaporation", "Condensation", "Precipitation"], "cycle"),
        ("A -> B -> C", "A · B · C", ["A", "B", "C"], "flow"),
        ("Compiler: source → tokens → AST", "Compiler", ["Source", "Tokens", "AST"], "flow"),
        ("egg -> larva -> moth -> egg", "Egg · Larva · Moth", ["Egg", "Larva", "Moth"], "cycle"),
        ("Baking bread:\n1. Mix\n2. Knead\n3. Bake", "Baking bread", ["Mix", "Knead", "Bake"], "flow"),
        ("Parts of a cell\n- Nucleus: holds DNA\n* the membrane", "Parts of a cell", ["Nucleus", "Membrane"], "hub"),
        ("How to brew tea 1) boil 2) steep 3) pour", "How to brew tea", ["Boil", "Steep", "Pour"], "flow"),
        ("How light travels from the sun to the earth", "How light travels", ["Sun", "Earth"], "flow"),
        ("data from browser to database via gateway", None, ["Browser", "Gateway", "Database"], "flow"),
        ("ML pipeline: cleaning; training; release", "ML pipeline", ["Cleaning", "Training", "Release"], "flow"),
        ("TCP vs UDP", "TCP vs UDP", ["TCP", "UDP"], "hub"),
        ("difference between mitosis and meiosis", None, ["Mitosis", "Meiosis"], "hub"),
        ("supply and demand", "Supply and demand", ["Supply", "Demand"], "hub"),
        ("Show me how a bill becomes a law", "How a bill becomes a law", ["Bill", "Law"], "flow"),
        (
            "Convert this sketch into a polished system diagram",
            "Convert this sketch into a polished system diagram",
            ["This sketch", "Polished system diagram"],
            "flow",
        ),
        (
            "Create an infographic about the heart with left atrium and right atrium, pastel colors, white background",
            "Heart",
            ["Left atrium", "Right atrium"],
            "hub",
        ),
        ("Immune response. The virus enters. Cells warn others.", "Immune response", None, "hub"),
        ("水循环图，展示蒸发、凝结和降水", "水循环图", ["蒸发", "凝结", "降水"], "cycle"),
        ("光合成のプロセス：光、水、酸素", "光合成のプロセス", ["光", "水", "酸素"], "flow"),
        ("دورة الماء: التبخر، التكاثف، الهطول", "دورة الماء", ["التبخر", "التكاثف", "الهطول"], "cycle"),
        ("जल चक्र: वाष्पीकरण, संघनन और वर्षा", "जल चक्र", ["वाष्पीकरण", "संघनन", "वर्षा"], "cycle"),
        ("Круговорот воды: испарение и осадки", "Круговорот воды", ["Испарение", "Осадки"], "cycle"),
        ("pH scale: pH, mRNA, acid", "pH scale", ["pH", "mRNA", "Acid"], "hub"),
    ],
)
def test_concepts(prompt: str, title: str | None, labels: list[str] | None, kind: str) -> None:
    found = extract(prompt)
    assert not found.generic
    assert title is None or found.title == title
    assert labels is None or list(found.labels) == labels
    assert found.kind == kind


@pytest.mark.parametrize(
    ("prompt", "title", "kind", "first"),
    [
        ("the water cycle", "Water cycle", "cycle", "Stage 1"),
        ("photosynthesis process diagram", "Photosynthesis", "flow", "Stage 1"),
        ("Draw the solar system", "Solar system", "hub", "What it is"),
        ("细胞", "细胞", "hub", "1"),
        ("", "(empty prompt)", "hub", "What it is"),
        ("\ud800\u202e\x00", "(empty prompt)", "hub", "What it is"),
    ],
)
def test_a_bare_subject_gets_neutral_boxes(prompt: str, title: str, kind: str, first: str) -> None:
    found = extract(prompt)
    assert (found.title, found.kind, found.labels[0], found.generic) == (title, kind, first, True)


def test_a_long_prompt_is_summarised() -> None:
    found = extract(LONG)
    assert found.title == "Nitrogen Cycle"
    assert found.kind == "cycle"
    assert found.labels[:3] == ("Nitrogen fixation", "Nitrification", "Assimilation")
    assert found.labels[3].endswith("…")


def test_more_concepts_than_boxes_are_counted() -> None:
    found = extract("elements: " + ", ".join(f"element {i}" for i in range(30)))
    assert len(found.labels) == MAX_CONCEPTS
    assert found.labels[-1] == "+ 19"


anything = st.text(st.characters(codec=None), max_size=400)


@given(anything)
def test_every_string_has_concepts(prompt: str) -> None:
    found = extract(prompt)
    assert found.title.strip()
    assert len(found.title) <= MAX_TITLE
    assert 1 <= len(found.labels) <= MAX_CONCEPTS
    assert all(label.strip() and len(label) <= MAX_LABEL for label in found.labels)
    clean(prompt).encode()  # no surrogate is left


@given(st.text(max_size=80), st.integers(2, 60))
def test_clip(text: str, limit: int) -> None:
    assert len(clip(text, limit)) <= limit
    assert clip(text, len(text)) == text


@pytest.mark.parametrize(
    "piece", ["from a to ", "a and ", "-> ", ",", "- ", 'titled "', "the ", "(", " ", "\n", "x", "क्"]
)
def test_hostile_repetition_is_read_in_no_time(piece: str) -> None:
    """Ten megabytes of it; the suite's time limit is the assertion."""
    extract(piece * (10_000_000 // len(piece)))


kinds: st.SearchStrategy[Kind] = st.sampled_from(["cycle", "flow", "hub"])


@st.composite
def areas(draw_: st.DrawFn) -> tuple[Rect, float]:
    """Areas as a picture has them: a ratio of 1:4 to 4:1, less the margins, perhaps less an edit's inputs."""
    width, height = pixel_size("2k", f"{draw_(st.floats(0.25, 4)):.3f}:1")
    em = min(width, height) * 0.024
    left = draw_(st.sampled_from([0.0, 0.3])) * width if width > height else 0
    return Rect(left + 2 * em, 7 * em, width - 2 * em, height - 7 * em), em


def distance(box: Rect, point: Point) -> float:
    """From a point outside or inside to the border of a box."""
    dx, dy = max(box.left - point.x, point.x - box.right), max(box.top - point.y, point.y - box.bottom)
    return abs(max(dx, dy)) if min(dx, dy) <= 0 else math.hypot(dx, dy)


@settings(max_examples=150, deadline=None)
@given(kinds, st.integers(1, MAX_CONCEPTS), areas(), st.integers(1, MAX_LABEL))
def test_layout_keeps_its_promises(kind: Kind, count: int, where: tuple[Rect, float], letters: int) -> None:
    """Boxes inside and apart, large enough for text; arrows from border to border, through no box."""
    area, em = where
    layout = plan(kind, count, area, em, letters)
    solid_boxes = [*layout.boxes, *([layout.hub] if layout.hub else [])]
    assert len(layout.boxes) == count
    for box in solid_boxes:
        assert area.grown(1).left <= box.left < box.right <= area.grown(1).right
        assert area.grown(1).top <= box.top < box.bottom <= area.grown(1).bottom
        assert box.width > 6 * em
        assert box.height > 1.34 * em + 0.5 * em  # one line and its margins
    for one, other in combinations(solid_boxes, 2):
        assert not one.overlaps(other)
    for arrow in layout.arrows:
        ends = [layout.hub if number < 0 else layout.boxes[number] for number in (arrow.source, arrow.target)]
        for joined, end in zip(ends, (arrow.points[0], arrow.points[-1]), strict=True):
            assert joined is not None
            assert distance(joined, end) < 1.3 * em
        for a, b in zip(arrow.points, arrow.points[1:], strict=False):
            for step in range(21):
                point = Point(a.x + (b.x - a.x) * step / 20, a.y + (b.y - a.y) * step / 20)
                assert not any(box.grown(-1).holds(point) for box in solid_boxes)


@given(kinds, st.integers(1, MAX_CONCEPTS), areas())
@settings(max_examples=60, deadline=None)
def test_layout_joins_what_belongs_together(kind: Kind, count: int, where: tuple[Rect, float]) -> None:
    joined = [(arrow.source, arrow.target) for arrow in plan(kind, count, *where).arrows]
    expected = {
        "cycle": [(i, (i + 1) % count) for i in range(count)] if count > 1 else [],
        "flow": [(i, i + 1) for i in range(count - 1)],
        "hub": [(-1, i) for i in range(count)],
    }[kind]
    assert joined == expected


def test_a_layout_says_when_it_is_not_clean() -> None:
    left, right = Rect(0, 0, 10, 10), Rect(30, 0, 40, 10)
    through = Arrow((Point(10, 5), Point(50, 5)), 0, 2)
    assert Layout((left, right), ()).is_clean(5)
    assert not Layout((left, right), ()).is_clean(25)
    assert not Layout((left, right, Rect(50, 0, 60, 10)), (through,)).is_clean(2)
    assert not Layout((left, right), (Arrow((Point(10, 5), Point(10.5, 5)), 0, 1),)).is_clean(2)


class Recorder:
    """What `_Picture` wrote: every block of lines with the box it was meant to be in."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.texts: list[str] = []
        self.faults: list[str] = []
        original = _render._Picture._lines

        def spy(picture: Any, lines: Sequence[str], box: Rect, size: int, fill: str, **options: Any) -> None:
            bold = options.get("bold", False)
            self.texts.append(" ".join(lines))
            if size < 0.0235 * min(picture.image.size):  # capitals are 0.71 of it: 1.67 % of the short side
                self.faults.append(f"{lines} at {size} px")
            if any(picture.fonts.width(line, size, bold=bold) > box.width + 1.5 for line in lines):
                self.faults.append(f"{lines} wider than {box}")
            if len(lines) * _fonts.LINE * size > box.height + 2:
                self.faults.append(f"{lines} higher than {box}")
            original(picture, lines, box, size, fill, **options)

        monkeypatch.setattr(_render._Picture, "_lines", spy)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    return Recorder(monkeypatch)


@pytest.mark.parametrize("ratio", ["16:9", "1:1", "9:16", "1:4", "4:1"])
@pytest.mark.parametrize(
    "prompt", [LONG, "x" * 5000, SCRIPTS["japanese"], "parts: " + ", ".join(map("part {}".format, range(12)))]
)
@pytest.mark.parametrize("inputs", [(), (b"", b"", b"")])
def test_all_text_is_legible_and_stays_in_its_place(
    recorder: Recorder, prompt: str, ratio: str, inputs: tuple[bytes, ...]
) -> None:
    _render._Picture(prompt, pixel_size("2k", ratio), seed=1).compose("cv-2 · 2k · " + ratio, inputs)
    assert recorder.faults == []


def test_the_picture_says_what_it_is_and_that_it_is_simulated(recorder: Recorder) -> None:
    draw(WATER, model="cv-1", quality="4k", aspect_ratio="4:3")
    written = "\n".join(recorder.texts)
    for text in (
        "Water cycle", "Evaporation", "Condensation", "Precipitation", WATER,
        "SIMULATED", "simulated by conceptviz - not a real generation", "cv-1 · 4k · 4:3",
    ):  # fmt: skip
        assert text in written


def test_the_mark_lies_across_the_corner() -> None:
    image = opened(draw(format="png"))
    band = [image.getpixel((image.width - 1 - i, 0)) for i in range(400)]
    assert (247, 201, 72) in band


def magenta(image: Image.Image) -> int:
    return sum(count for count, colour in image.getcolors(2**24) or [] if colour == (255, 0, 255))


def test_an_edit_shows_its_inputs(recorder: Recorder) -> None:
    """Each image, as large as its place allows, with the whole instruction as the title."""
    prompt = "Make the arrows thicker"
    one = opened(draw(prompt, inputs=[solid("#ff00ff")], format="png"))
    two = opened(draw(prompt, inputs=[solid("#ff00ff"), solid("#00ff00")], format="png"))
    assert magenta(one) > one.width * one.height / 50
    assert 0 < magenta(two) <= magenta(one)
    assert "2 input images" in recorder.texts
    assert prompt in recorder.texts


def test_an_edit_draws_the_concepts_of_its_instruction(recorder: Recorder) -> None:
    draw("Add labels for the nucleus, the membrane and the vacuole", inputs=[b""])
    assert {"Nucleus", "Membrane", "Vacuole", "Edited image", "Input image", "Result"} <= set(recorder.texts)


@pytest.mark.parametrize("name", ["JPEG", "WEBP", "GIF"])
def test_an_input_may_have_any_web_format(recorder: Recorder, name: str) -> None:
    draw("x", inputs=[solid("#ff00ff", name=name)])
    assert "image at URL" not in recorder.texts


@pytest.mark.parametrize(
    "data",
    [lambda: b"", lambda: b"<html>", lambda: solid("red")[:60], lambda: solid("red", (9000, 8000))],
    ids=["known by URL only", "not a picture", "cut short", "too large to decode for a thumbnail"],
)
def test_an_input_that_cannot_be_shown_gets_a_card(recorder: Recorder, data: Callable[[], bytes]) -> None:
    draw("x", inputs=[data()])
    assert "image at URL" in recorder.texts


def test_a_transparent_input_lies_on_white() -> None:
    out = io.BytesIO()
    Image.new("RGBA", (80, 60), (0, 0, 0, 0)).save(out, "PNG")
    thumbnail = _render._decode(out.getvalue(), (400, 300))
    assert thumbnail is not None
    assert thumbnail.getpixel((5, 5)) == (255, 255, 255)
    assert thumbnail.size == (400, 300)


@settings(max_examples=15, deadline=None)
@given(anything, st.text(max_size=20), st.integers(), st.lists(st.binary(max_size=40), max_size=5))
def test_no_argument_breaks_it(prompt: str, word: str, seed: int, inputs: list[bytes]) -> None:
    data = render(prompt, model=word, quality=word, aspect_ratio=word, seed=seed, inputs=inputs)
    assert opened(data).size == (2752, 1536) or word


def test_a_huge_prompt_and_odd_settings() -> None:
    assert opened(draw("word " * 2_000_000, model="\ud800" * 999, aspect_ratio="3:\ud800")).size == (2752, 1536)


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_bundled_fonts_cover(script: str) -> None:
    """With nothing but the packages of the extra: no font of this machine, no boxed code points."""
    fonts = Fonts(SCRIPTS[script], faces=bundled_faces(), shaping=False)
    runs = fonts.runs(SCRIPTS[script])
    assert [run.text for run in runs if run.face is None] == []


def test_chinese_japanese_and_korean_get_their_own_shapes() -> None:
    def member(sample: str) -> int | None:
        face = Fonts(sample).face_for("骨")
        return face.index if face else None

    assert [member(SCRIPTS[name]) for name in ("japanese", "korean", "chinese")] == [0, 1, 2]


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("abc (1)", "abc (1)"),
        ("שלום", "םולש"),
        ("abc שלום 12", "abc 12 םולש"),
        ("שלום abc", "abc םולש"),
        ("(א) 3.5", "3.5 (א)"),
        ("שלום abc 12 שלום", "םולש abc 12 םולש"),
        ("ماء", "\ufe80\ufe8e\ufee3"),  # meem initial, alef final, hamza alone; seen from the left
        ("ببب", "\ufe90\ufe92\ufe91"),
        ("لا", "\ufefb"),  # one letter of its own
        ("بَب", "\ufe90\ufe91\u064e"),  # marks stay with their letter and do not break the joining
        ("कि", "िक"),
        ("क्रि", "िक्र"),
        ("", ""),
    ],
)
def test_order_and_joining_without_a_shaping_library(text: str, seen: str) -> None:
    runs = Fonts(shaping=False).runs(text)
    assert "".join(run.text for run in runs) == seen


def test_letters_keep_their_marks() -> None:
    assert clusters("e\u0301a") == ["e\u0301", "a"]
    assert clusters("क्षि") == ["क्षि"]
    assert clusters("น้ำ") == ["น้ำ"]


@pytest.mark.parametrize(
    "shaping", [False, pytest.param(True, marks=pytest.mark.skipif(not features.check("raqm"), reason="no FriBidi"))]
)
@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_leaves_ink_within_its_measure(script: str, shaping: bool) -> None:
    text = SCRIPTS[script]
    fonts = Fonts(text, shaping=shaping)
    image = Image.new("L", (3000, 200))
    fonts.draw(ImageDraw.Draw(image), (100, 120), text, 60, "white")
    box = image.getbbox()
    assert box is not None
    assert box[0] >= 100 - 6
    assert box[2] <= 100 + fonts.width(text, 60) * 1.03 + 6
    assert box[2] - box[0] > 0.8 * fonts.width(text, 60) - 6


def test_a_character_no_font_has_is_drawn_as_its_code_point() -> None:
    """The last resort still tells one character from another."""

    def ink(text: str) -> bytes:
        image = Image.new("L", (100, 80))
        Fonts(faces=[]).draw(ImageDraw.Draw(image), (10, 60), text, 60, "white")
        assert image.getbbox()
        return image.tobytes()

    assert len({ink("水"), ink("火"), ink("\U0001f680")}) == 3


def test_without_any_installed_font_latin_is_still_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_fonts, "bundled_faces", tuple)
    monkeypatch.setattr(_fonts, "system_faces", tuple)
    assert Fonts().face_for("A") == Face(None)
    assert Fonts().face_for("水") is None
    assert opened(draw(SCRIPTS["chinese"])).size == (2752, 1536)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / ".local/share/fonts/deep"
    folder.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path))
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="the folder is Linux's")
def test_fonts_of_the_machine_help_out(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = next(face.path for face in bundled_faces() if face.path and "Hebrew" in face.path.name)
    (home / "Own.ttf").write_bytes(source.read_bytes())
    (home / "Own-Italic.ttf").write_bytes(source.read_bytes())
    (home / "Aaa.ttf").write_bytes(b"not a font")
    found = _fonts.system_faces.__wrapped__()
    assert Face(home / "Own.ttf") in found
    assert Face(home / "Own-Italic.ttf") not in found
    monkeypatch.setattr(_fonts, "bundled_faces", tuple)
    monkeypatch.setattr(_fonts, "system_faces", lambda: (Face(home / "Aaa.ttf"), Face(home / "Own.ttf")))
    assert Fonts().face_for("ש") == Face(home / "Own.ttf")


def test_the_character_map_agrees_with_freetype() -> None:
    """Our reader of `cmap` and the glyphs that are really drawn: no character promised is drawn as a missing one."""
    for face in bundled_faces():
        fonts = Fonts(faces=[face], shaping=False)
        font = fonts._load(face, 20, False)

        def ink(character: str, font: Any = font) -> bytes:
            image = Image.new("L", (60, 60))
            ImageDraw.Draw(image).text((20, 10), character, "white", font)
            return image.tobytes()

        missing = ink("\U0010fffd")
        codes = sorted(code for code in face.code_points if chr(code).isalpha())
        for code in codes[:: max(1, len(codes) // 25)]:
            assert ink(chr(code)) != missing, (face, hex(code))
        assert 0x10FFFD not in face.code_points


@given(st.binary(max_size=300))
def test_a_broken_font_file_has_no_characters(data: bytes) -> None:
    for head in (b"", b"ttcf\0\1\0\0\0\0\0\1\0\0\0\x10", b"\0\1\0\0\0\2" + b"\0" * 6):
        try:
            found = _fonts._read_cmap(io.BytesIO(head + data))
        except struct.error:
            continue
        assert isinstance(found, frozenset)


def test_lines_break_where_they_may() -> None:
    fonts = Fonts()
    assert fonts.wrap("alpha beta gamma", fonts.width("alpha beta", 20) + 1, 20) == ["alpha beta", "gamma"]
    assert fonts.wrap("水循环，图", fonts.width("水循环", 20) + 1, 20) == [
        "水循",
        "环，图",
    ]  # no line begins with a comma
    assert "".join(fonts.wrap("x" * 50, 100, 20)) == "x" * 50
    assert fonts.wrap("", 100, 20) == []


@settings(deadline=None, max_examples=40)
@given(st.text(st.sampled_from("ab 水क्षिשע,"), min_size=1, max_size=60), st.floats(60, 500), st.floats(30, 200))
def test_fitted_text_fits(text: str, width: float, height: float) -> None:
    fonts = Fonts()
    size, lines = fonts.fit(text, (width, height), (20, 48))
    assert 20 <= size <= 48
    assert len(lines) * _fonts.LINE * size <= max(height, _fonts.LINE * 20) + len(lines)
    assert all(fonts.width(line, size) <= max(width, 2.2 * size) for line in lines)
