"""Which image belongs to which prompt: M46, and what must hold whatever comes back."""

from __future__ import annotations

from collections import Counter

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conceptviz import Image
from conceptviz._matching import match_images


def image(prompt: str = "", n: int | None = None, *, mark: str = "0") -> Image:
    """An image with the prompt that the service gave it, and an index in its URL."""
    name = f"{mark}.png" if n is None else f"{n}-ab{mark}.png"
    return Image(f"https://h/images/account/task/{name}", prompt, sha256=mark)


def matched(images: list[Image], prompts: list[str]) -> list[tuple[int | None, str, str | None]]:
    """Index, prompt and mark of each image, in the order of the result."""
    return [(i.index, i.prompt, i.sha256) for i in match_images(images, prompts)]


def test_shuffled_images_find_their_prompts() -> None:
    """The URL's index does not matter where the text speaks."""
    images = [image("c", 0, mark="2"), image("a", 1, mark="0"), image("b", 2, mark="1")]
    assert matched(images, ["a", "b", "c"]) == [(0, "a", "0"), (1, "b", "1"), (2, "c", "2")]


def test_three_of_four() -> None:
    images = [image("d", 0, mark="3"), image("a", 1, mark="0"), image("b", 2, mark="1")]
    assert matched(images, ["a", "b", "c", "d"]) == [(0, "a", "0"), (1, "b", "1"), (3, "d", "3")]


def test_five_of_four() -> None:
    """The one too many comes last and has no index."""
    images = [image("x", mark="9"), *(image(p, mark=p) for p in "dcba")]
    assert matched(images, list("abcd")) == [
        (0, "a", "a"),
        (1, "b", "b"),
        (2, "c", "c"),
        (3, "d", "d"),
        (None, "x", "9"),
    ]


def test_a_second_image_of_one_prompt_is_not_the_first_of_another() -> None:
    """Even if its URL has that prompt's index: the text says otherwise."""
    images = [image("a", 0, mark="0"), image("a", 1, mark="1")]
    assert matched(images, ["a", "b"]) == [(0, "a", "0"), (None, "a", "1")]
    images = [image("a", 0, mark="0"), image(" a ", 1, mark="1")]
    assert matched(images, ["a", "b"]) == [(0, "a", "0"), (None, " a ", "1")]


def test_repeated_prompts_share_their_images() -> None:
    """As a multiset; which of two equal prompts an image is of, the URL tells."""
    images = [image("a", 2, mark="2"), image("b", 1, mark="1"), image("a", 0, mark="0")]
    assert matched(images, ["a", "b", "a"]) == [(0, "a", "0"), (1, "b", "1"), (2, "a", "2")]
    images = [image("a", mark="x"), image("a", mark="y")]
    assert matched(images, ["a", "b", "a"]) == [(0, "a", "x"), (2, "a", "y")]


def test_spacing_and_composition_do_not_matter() -> None:
    """But an exact text comes before a similar one; the prompt that was sent is kept."""
    images = [image("cafe\u0301  au\nlait ", mark="0"), image("b", mark="1")]
    assert matched(images, ["b", "caf\u00e9 au lait"]) == [(0, "b", "1"), (1, "caf\u00e9 au lait", "0")]
    images = [image("a  b", mark="1"), image("a b", mark="0")]
    assert matched(images, ["a b", "a  b"]) == [(0, "a b", "0"), (1, "a  b", "1")]


def test_rewritten_prompts_go_by_the_index_in_the_url() -> None:
    images = [image("A detailed diagram of b", 1, mark="1"), image("A detailed diagram of a", 0, mark="0")]
    assert matched(images, ["a", "b"]) == [(0, "a", "0"), (1, "b", "1")]


def test_rewritten_prompts_without_an_index_are_not_guessed_at() -> None:
    """Never by position when the texts disagree."""
    images = [image("other one", mark="0"), image("other two", mark="1")]
    assert matched(images, ["a", "b"]) == [(None, "other one", "0"), (None, "other two", "1")]


def test_an_index_that_is_taken_or_has_no_prompt_matches_nothing() -> None:
    images = [image("a", mark="0"), image("other", 0, mark="1"), image("another", 7, mark="2")]
    assert matched(images, ["a", "b"]) == [(0, "a", "0"), (None, "other", "1"), (None, "another", "2")]


def test_without_any_text_a_full_answer_goes_by_position() -> None:
    """There is nothing then that could disagree."""
    images = [image(mark="0"), image(mark="1")]
    assert matched(images, ["a", "b"]) == [(0, "a", "0"), (1, "b", "1")]
    assert matched(images[:1], ["a", "b"]) == [(None, "", "0")]
    images = [image(mark="0", n=1), image(mark="1", n=0)]
    assert matched(images, ["a", "b"]) == [(0, "a", "1"), (1, "b", "0")]


def test_one_prompt_has_all_the_images() -> None:
    """Numbered from 0, whatever its text came back as, in the order of their URLs."""
    assert matched([image("rewritten", 3, mark="e")], ["a"]) == [(0, "a", "e")]
    assert matched([image("", 5, mark="f"), image("", 2, mark="e")], ["a"]) == [(0, "a", "e"), (1, "a", "f")]
    assert matched([image("", 3, mark="f"), image("", mark="e")], ["a"]) == [(0, "a", "f"), (1, "a", "e")]


def test_a_task_picked_up_by_its_id_goes_by_its_urls() -> None:
    """So that a file has the same name in whatever process it is saved; the texts are the service's."""
    images = [image("c", 2, mark="2"), image("a", 0, mark="0")]
    assert matched(images, []) == [(0, "a", "0"), (2, "c", "2")]
    images = [image("c", mark="2"), image("a", 0, mark="0")]
    assert matched(images, []) == [(0, "c", "2"), (1, "a", "0")]
    images = [image("c", 1, mark="2"), image("a", 1, mark="0")]
    assert matched(images, []) == [(0, "c", "2"), (1, "a", "0")]


def test_nothing_for_nothing() -> None:
    assert match_images([], ["a", "b"]) == match_images([], ["a"]) == match_images([], []) == ()


@pytest.mark.parametrize(
    "url", ["https://h/t/12-ab.png", "https://h/t/0-xy.png", "https://h/t/0-ab", "https://[x/0-ab.png", "", "0-ab.png"]
)
def test_an_index_is_only_read_where_it_stands(url: str) -> None:
    assert match_images([Image(url, "other"), image("a")], ["a", "b"])[1].index is None


def test_a_query_does_not_hide_the_index() -> None:
    images = [Image("https://h/t/1-ab.png?sig=0-ab.png", "other"), image("a")]
    assert [i.index for i in match_images(images, ["a", "b"])] == [0, 1]


TEXTS = st.sampled_from(["a", "b", "c", "a ", " a", "e\u0301", "\u00e9", "other", ""])
IMAGES = st.lists(
    st.builds(image, TEXTS, st.none() | st.integers(0, 9), mark=st.sampled_from("0123456789")), max_size=7
)
PROMPTS = st.lists(TEXTS.filter(bool), max_size=4)


@settings(max_examples=300, derandomize=True, deadline=None)
@given(IMAGES, PROMPTS)
def test_whatever_comes_back(images: list[Image], prompts: list[str]) -> None:
    """No image is lost or made up, no index given twice, none out of range, and an exact text is never overruled."""
    result = match_images(images, prompts)

    def bare(items: object) -> Counter[Image]:
        return Counter(attrs.evolve(i, index=None, prompt="") for i in items)  # type: ignore[attr-defined]  # images

    assert bare(result) == bare(images)
    indices = [i.index for i in result if i.index is not None]
    assert indices == sorted(set(indices))
    # Those without an index come last.
    assert all(i.index is None for i in result[len(indices) :])
    if prompts:
        assert all(i.prompt == prompts[min(i.index, len(prompts) - 1)] for i in result if i.index is not None)
    if len(prompts) > 1:
        assert all(index < len(prompts) for index in indices)
        available, wanted = Counter(i.prompt for i in images), Counter(prompts)
        given_to = Counter(prompts[n] for n in indices)
        for text, count in wanted.items():
            assert given_to[text] >= min(available[text], count)
    else:
        assert len(indices) == len(images)
