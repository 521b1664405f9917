"""Never run: read by mypy and pyright. What a caller's editor infers is part of the public surface."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

from typing_extensions import assert_type

from conceptviz import AsyncConceptViz, AsyncTask, ConceptViz, Image, Result, Submission, Task, TaskState


async def awaited(cv: AsyncConceptViz) -> None:
    async with cv as entered:
        assert_type(entered, AsyncConceptViz)
    task = await cv.submit("a")
    assert_type(task, AsyncTask)
    assert_type(task.submission, Submission | None)
    assert_type(await task.status(), TaskState)
    assert_type(task.watch(), AsyncIterator[TaskState])
    result = await cv.generate(["a", "b"], model="cv-3", quality="2k", aspect_ratio="21:9", timeout=3)
    assert_type(result, Result)
    assert_type(await cv.edit("a", [Path("a.png"), b"", "https://example.com/a.png"]), Result)
    assert_type(await cv.edit("a", Path("a.png")), Result)
    assert_type(await cv.save(result, "folder"), list[Path])
    assert_type(await cv.save(result.image, Path("folder"), overwrite=True), Path)
    assert_type(await cv.read(result.image), bytes)
    assert_type(cv.estimate(3, model="cv-1"), int)
    assert_type(cv.credits_remaining, int | None)


def blocking(cv: ConceptViz, image: Image) -> None:
    with cv as entered:
        assert_type(entered, ConceptViz)
    task = cv.submit_edit("a", [image.raw["content"]])
    assert_type(task, Task)
    assert_type(task.wait(timeout=1.5), Result)
    assert_type(task.watch(), Iterator[TaskState])
    assert_type(cv.save(cv.generate("a"), "folder"), list[Path])
    assert_type(cv.save(image, "folder"), Path)
    assert_type(cv.read(image), bytes)


def refused(cv: ConceptViz) -> None:
    cv.submit(3)  # type: ignore[arg-type]  # a prompt is text
    cv.submit("a", model=2)  # type: ignore[arg-type]  # so is a model
    cv.generate("a", "b")  # type: ignore[call-arg]  # settings are named
