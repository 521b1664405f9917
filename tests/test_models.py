"""The values: the local checks that keep a hopeless request from being sent, and what values show of themselves."""

from __future__ import annotations

import copy
import io
import pickle
from collections import UserString
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest

from conceptviz import (
    Credits,
    EditRequest,
    GenerateRequest,
    Image,
    InvalidRequestError,
    Polling,
    Result,
    Retries,
    Submission,
    TaskState,
    Unchecked,
)
from conceptviz._requests import estimate, price

URL = "https://r2.conceptviz.app/images/0123456789abcdef0123456789abcdef/vaW29_MJ1wbnyFU4bl_pd/0-d61105cc2ac528d2.png"
IMAGE = Image(URL, "the water cycle", 0, "ab" * 32, {"url": URL, "prompt": "the water cycle"}, "task")
RECEIPT = Submission("task", "pending", "cv-2", "2k", "16:9", 2, 79, ("the water cycle",), {"taskId": "task"})
VALUES = [
    GenerateRequest(["a", "b"], model="cv-1", quality="4k", aspect_ratio="1:1"),
    EditRequest("a", [Path("x.png"), b"\x89PNG", "https://example.com/a.png"]),
    RECEIPT,
    IMAGE,
    TaskState("task", "completed", (IMAGE,), raw={"status": "completed"}),
    TaskState("task", "failed", (), "Sorry", "GENERATION_FAILED", True, {"status": "failed"}),
    Result("task", (IMAGE,), RECEIPT, ("b",)),
    Polling(),
    Retries(),
]


def refused(*args: Any, **kwargs: Any) -> str:
    """The message with which a GenerateRequest is refused."""
    with pytest.raises(InvalidRequestError) as caught:
        GenerateRequest(*args, **kwargs)
    assert caught.value.credits is Credits.NOT_SPENT
    assert "Nothing was sent" in str(caught.value)
    return str(caught.value)


def test_a_str_is_one_prompt() -> None:
    """A str is never a sequence of characters."""
    assert GenerateRequest("abcd").prompts == ("abcd",)
    assert GenerateRequest("abcdefgh").prompts == ("abcdefgh",)
    assert "must be a str, not UserString" in refused(UserString("abc"))


@pytest.mark.parametrize("prompts", [["a"], ("a", "b"), ["a", "b", "c", "d"], ["same", "same"]])
def test_one_to_four_prompts(prompts: Any) -> None:
    """Kept as a tuple, so that a list that changes later changes nothing."""
    assert GenerateRequest(prompts).prompts == tuple(prompts)


@pytest.mark.parametrize(("prompts", "count"), [([], 0), (["a"] * 5, 5), (("a",) * 100, 100)])
def test_another_number_of_prompts_is_refused(prompts: Any, count: int) -> None:
    """Source: "Error Codes", PROMPT_REQUIRED and TOO_MANY_PROMPTS."""
    assert f"{count} prompts were given: one request takes one to 4" in refused(prompts)


@pytest.mark.parametrize(
    ("prompts", "kind"),
    [
        (None, "NoneType"),
        (5, "int"),
        (b"abc", "bytes"),
        (bytearray(b"abc"), "bytearray"),
        ({"a", "b"}, "set"),
        ({"a": 1}, "dict"),
        (iter(["a"]), "list_iterator"),
        ((p for p in "ab"), "generator"),
        (Path("x"), type(Path()).__name__),
    ],
)
def test_what_is_no_prompt_is_refused(prompts: Any, kind: str) -> None:
    """A set has no order to match images with, and a generator would be empty the second time."""
    assert f"not {kind}" in refused(prompts)


@pytest.mark.parametrize("blank", ["", " ", "\n\t ", "\u00a0\u2003"])
def test_a_blank_prompt_is_refused(blank: str) -> None:
    assert "The prompt is blank" in refused(blank)
    assert "Prompt 2 is blank" in refused(["a", blank])
    with pytest.raises(InvalidRequestError, match="The edit prompt is blank"):
        EditRequest(blank, b"x")


def test_half_a_character_is_refused() -> None:
    """M72: UTF-8 cannot carry it, and the HTTP library's error would come after the budget."""
    assert "lone surrogate) at position 2" in refused("ab\ud800c")
    assert "Prompt 2 holds half" in refused(["a", "\udfff"])
    with pytest.raises(InvalidRequestError, match="The edit prompt holds half"):
        EditRequest("\ud800", b"x")
    assert "aspect_ratio holds half" in refused("a", aspect_ratio="\ud800")


@pytest.mark.parametrize("prompt", ["nul\0", "x" * 10**6, "\u202eright to left", "🙂\U0001f9ec", "a\r\nb"])
def test_every_other_text_is_a_prompt(prompt: str) -> None:
    """M72: the service judges it."""
    assert GenerateRequest(prompt).prompts == (prompt,)


@pytest.mark.parametrize("prompts", [["a", 5], ["a", None], ["a", b"b"], [["a"]]])
def test_a_prompt_that_is_no_str_is_refused(prompts: Any) -> None:
    assert "must be a str, not" in refused(prompts)


@pytest.mark.parametrize("setting", ["model", "quality", "aspect_ratio"])
@pytest.mark.parametrize("value", [5, b"2k", ["2k"], "", " "])
def test_a_setting_is_a_str(setting: str, value: object) -> None:
    """And says what leaving it out would do."""
    message = refused("a", **{setting: value})
    assert setting in message
    assert ("leave it out, and the service chooses" if isinstance(value, str) else "must be a str") in message


def test_cv_2_has_no_4k() -> None:
    """The message names the row of the table, the model that has it, and the way out."""
    for model in ({}, {"model": "cv-2"}):
        message = refused("a", quality="4k", **model)
        assert "The model cv-2 has no quality '4k'" in message
        assert 'lists cv-2 with 2k under "Limits" (cv-1 has 4k)' in message
        assert "quality=conceptviz.Unchecked('4k')" in message
    assert 'lists cv-1 with 2k and 4k under "Limits". Nothing' in refused("a", model="cv-1", quality="8k")
    with pytest.raises(InvalidRequestError, match="cv-2 has no quality"):
        EditRequest("a", b"x", quality="4k")


@pytest.mark.parametrize(
    "settings",
    [
        {"quality": "2k"},
        {"model": "cv-1", "quality": "2k"},
        {"model": "cv-1", "quality": "4k"},
        {"quality": Unchecked("4k")},
        {"model": Unchecked("cv-2"), "quality": "4k"},
        {"model": "cv-3", "quality": "16k"},
        {"aspect_ratio": "21:9"},
    ],
)
def test_what_the_table_allows_or_does_not_know_is_accepted(settings: dict[str, Any]) -> None:
    """The service adds models and ratios without telling its clients."""
    for request in (GenerateRequest("a", **settings), EditRequest("a", b"x", **settings)):
        assert {name: getattr(request, name) for name in settings} == settings


def test_unchecked_is_the_text_itself() -> None:
    assert Unchecked("4k") == "4k"
    assert pickle.loads(pickle.dumps(Unchecked("4k"))) == "4k"
    assert not hasattr(Unchecked("4k"), "__dict__")


@pytest.mark.parametrize(
    "image", [Path("a.png"), b"x", bytearray(b"x"), memoryview(b"x"), "https://example.com/a.png", io.BytesIO(b"x")]
)
def test_one_image_needs_no_list(image: Any) -> None:
    """Bytes and text are never taken apart."""
    assert EditRequest("a", image).images == (image,)


@pytest.mark.parametrize("count", [1, 4])
def test_one_to_four_images(count: int) -> None:
    """From any iterable, which is read once."""
    images = [b"x"] * count
    assert EditRequest("a", images).images == tuple(images)
    assert EditRequest("a", iter(images)).images == tuple(images)


def endless() -> Iterator[bytes]:
    while True:
        yield b"x"


@pytest.mark.parametrize(("images", "said"), [([], "No"), ([b"x"] * 5, "More than 4"), (endless(), "More than 4")])
def test_another_number_of_images_is_refused(images: Any, said: str) -> None:
    """Source: "Error Codes", IMAGE_REQUIRED and TOO_MANY_IMAGES."""
    with pytest.raises(InvalidRequestError, match=f"{said} images were given: one edit takes one to 4"):
        EditRequest("a", images)


@pytest.mark.parametrize("images", [None, 5, object()])
def test_what_is_no_image_is_refused(images: Any) -> None:
    with pytest.raises(InvalidRequestError, match=f"not {type(images).__name__}"):
        EditRequest("a", images)


def test_an_edit_is_one_prompt_for_one_image() -> None:
    """However many images go in."""
    request = EditRequest("a", [b"x", b"y"], model="cv-1")
    assert request.prompts == ("a",)
    assert request.expected_credits == 1
    with pytest.raises(InvalidRequestError, match="must be a str"):
        EditRequest(["a"], b"x")  # type: ignore[arg-type]  # what is tested


@pytest.mark.parametrize(
    ("model", "quality", "each"),
    [
        (None, None, 2),
        ("cv-2", None, 2),
        ("cv-2", "2k", 2),
        (None, "2k", 2),
        ("cv-1", None, 1),
        ("cv-1", "2k", 1),
        ("cv-1", "4k", 2),
        ("cv-2", "4k", None),
        ("cv-9", None, None),
        ("cv-1", "8k", None),
    ],
)
def test_prices(model: str | None, quality: str | None, each: int | None) -> None:
    """Source: "Credit Cost"."""
    assert price(3, model=model, quality=quality) == (None if each is None else 3 * each)
    if each is None:
        with pytest.raises(InvalidRequestError, match="no price for model"):
            estimate(3, model=model, quality=quality)
    else:
        assert estimate(3, model=model, quality=quality) == 3 * each
        assert GenerateRequest(["a", "b"], model=model, quality=quality).expected_credits == 2 * each
    assert GenerateRequest("a", model="cv-9").expected_credits is None


def test_estimate_counts_prompts() -> None:
    """Any number of them: it is about a plan, not about one request."""
    assert estimate("the water cycle") == 2
    assert estimate(["a"] * 24) == 48
    assert estimate(0) == 0


@pytest.mark.parametrize("count", [True, -1, 1.5, None, b"abc", bytearray(b"abc"), {"a"}])
def test_estimate_refuses_what_is_no_number(count: Any) -> None:
    with pytest.raises(InvalidRequestError):
        estimate(count)


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_values_are_values(value: Any) -> None:
    """Frozen, hashable, equal to their copies, and fit to cross to another process."""
    name = attrs.fields(type(value))[0].name
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        setattr(value, name, None)
    for twin in (pickle.loads(pickle.dumps(value)), copy.copy(value), copy.deepcopy(value)):
        assert twin == value
        assert hash(twin) == hash(value)
        assert type(twin) is type(value)
        assert attrs.asdict(twin) == attrs.asdict(value)


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_raw_answers_are_not_shown(value: Any) -> None:
    """Nor do they make two values differ."""
    assert "raw" not in repr(value)
    if hasattr(value, "raw"):
        assert attrs.evolve(value, raw={"other": 1}) == value


def test_an_image_url_is_shown_without_what_identifies_the_account() -> None:
    """What is shown still tells one image from another."""
    for shown in (repr(IMAGE), str(IMAGE), repr(TaskState("t", "completed", (IMAGE,))), repr(Result("t", (IMAGE,)))):
        assert "0123456789abcdef0123456789abcdef" not in shown
        assert "'https://r2.conceptviz.app/.../0-d61105cc2ac528d2.png'" in shown
    assert "secret" not in repr(Image("https://user:secret@h/a/b.png?token=secret#secret"))
    assert len(repr(Image("https://h/" + "x" * 10_000))) < 300


@pytest.mark.parametrize("url", ["data:image/png;base64,secret", "javascript:secret", "secret", "http://[secret", ""])
def test_what_is_no_web_address_is_not_shown_at_all(url: str) -> None:
    assert "secret" not in repr(Image(url))
    assert "url='...'" in repr(Image(url))


def test_an_edit_shows_its_images_number_alone() -> None:
    """They may be megabytes."""
    assert "images=<2 images>" in repr(EditRequest("a", [b"secret", "data:secret"]))
    assert "secret" not in repr(EditRequest("a", [b"secret", "data:secret"]))


@pytest.mark.parametrize("url", ["https://h/a.png", "http://127.0.0.1:8000/a.png", "http://localhost/a.png"])
def test_a_notebook_shows_an_image(url: str) -> None:
    html = Image(url, "cycle")._repr_html_()
    assert f'<img src="{url}" alt="cycle"' in html
    assert "<figcaption>cycle</figcaption>" in html


@pytest.mark.parametrize(
    "url",
    [
        "javascript:alert(1)",
        "javascript://localhost/%0aalert(1)",
        "data:text/html,x",
        "http://h/a.png",
        "file:///etc/passwd",
        "//h/a.png",
        "http://[x",
        "",
    ],
)
def test_a_notebook_shows_nothing_else(url: str) -> None:
    """The caption stays."""
    assert Image(url, "cycle")._repr_html_() == "<figure><figcaption>cycle</figcaption></figure>"


def test_a_notebook_is_not_written_into() -> None:
    """A prompt and a URL are text, wherever they stand."""
    hostile = "\"'><script>alert(1)</script>&"
    html = Image("https://h/" + hostile, hostile)._repr_html_()
    assert "<script" not in html
    assert "'" not in html
    assert html.count('"') == 6
    html = Result("t", (IMAGE,), None, (hostile,))._repr_html_()
    assert "<script" not in html
    assert "No image came back for: &quot;&#x27;&gt;&lt;script&gt;" in html
    assert IMAGE._repr_html_() in html


def test_the_one_image_of_a_result() -> None:
    """Of several none is "the" image."""
    assert Result("t", (IMAGE,)).image is IMAGE
    for images in ((), (IMAGE, IMAGE)):
        with pytest.raises(ValueError, match=f"has {len(images)} images: use .images"):
            _ = Result("t", images).image


@pytest.mark.parametrize(
    ("status", "ended"), [("completed", True), ("failed", True), ("processing", False), ("done", False), ("", False)]
)
def test_two_words_end_a_task(status: str, ended: bool) -> None:
    """Source: "Step 2: Poll for Results"."""
    assert TaskState("t", status).is_terminal is ended


def test_the_defaults_are_the_documented_spacing() -> None:
    """Source: "Limits", Poll interval; attempts and bounds as reliability 3.1 and 3.4 have them."""
    polling = Polling()
    assert (polling.min_interval, polling.max_interval, polling.first_look, polling.timeout) == (3.0, 5.0, 3.0, 600.0)
    assert Retries().attempts == 3


NUMBERS = [(Polling, name) for name in ("min_interval", "max_interval", "first_look", "timeout")] + [
    (Retries, name) for name in ("base_delay", "max_delay", "max_retry_after")
]


@pytest.mark.parametrize(("cls", "name"), NUMBERS)
@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), True, "3", None])
def test_a_time_is_a_number_above_zero(cls: type[Any], name: str, value: object) -> None:
    with pytest.raises(InvalidRequestError, match=f"{name} must be a number above 0, not {value!r}"):
        cls(**{name: value})


@pytest.mark.parametrize(("cls", "name"), [(Polling, "max_failures"), (Retries, "attempts")])
@pytest.mark.parametrize("value", [0, -1, 1.0, True, "3", None])
def test_a_count_is_a_whole_number(cls: type[Any], name: str, value: object) -> None:
    with pytest.raises(InvalidRequestError, match=f"{name} must be a whole number of at least 1, not {value!r}"):
        cls(**{name: value})
    assert getattr(cls(**{name: 1}), name) == 1


def test_intervals_are_in_order() -> None:
    with pytest.raises(InvalidRequestError, match=r"min_interval \(6\) is longer than max_interval \(5.0\)"):
        Polling(min_interval=6)
    assert Polling(min_interval=4, max_interval=4).max_interval == 4


@pytest.mark.parametrize(
    "value", [(0, 90), (-1, 90), (90, 30), (30,), (1, 2, 3), [30, 90], 30, None, (30, None), ("30", "90"), (True, 90)]
)
def test_the_typical_time_is_two_numbers_in_order(value: Any) -> None:
    with pytest.raises(InvalidRequestError, match="typical must be two numbers above 0 in their order"):
        Polling(typical=value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_typical_time_is_finite(value: float) -> None:
    for pair in ((1.0, value), (value, 1.0), (value, value)):
        with pytest.raises(InvalidRequestError, match="typical must be two numbers"):
            Polling(typical=pair)


def test_the_typical_time_is_the_documented_one() -> None:
    """Source: "Limits", Generation time."""
    assert Polling().typical == (30.0, 90.0)
    assert Polling(typical=(1, 3)).typical == (1, 3)
    assert Polling(typical=(2.5, 2.5)).typical == (2.5, 2.5)
