"""The constants against the API page: its tables are typed out here a second time, as they are published."""

from __future__ import annotations

import re
from typing import get_args

import pytest

from conceptviz import _spec

ERROR_TABLE = """
400 INVALID_BODY
400 IMAGE_REQUIRED
400 INVALID_IMAGE
400 PROMPT_REQUIRED
400 TOO_MANY_IMAGES
400 TOO_MANY_PROMPTS
400 UNSUPPORTED_MODEL
401 UNAUTHORIZED
401 INVALID_API_KEY
402 INSUFFICIENT_CREDITS
403 PLAN_REQUIRED
403 QUALITY_NOT_ALLOWED
403 PLAN_LIMIT_EXCEEDED
404 TASK_NOT_FOUND
429 MODERATION_RATE_LIMITED
400 INPUT_MODERATION_BLOCKED
500 CREDIT_CONSUMPTION_FAILED
500 GENERATION_FAILED
"""


def test_error_codes() -> None:
    """Source: "Error Codes"."""
    rows = [line.split() for line in ERROR_TABLE.strip().splitlines()]
    assert len(rows) == 18
    assert {code: int(status) for status, code in rows} == _spec.ERROR_CODES
    assert _spec.GENERATION_FAILED in _spec.ERROR_CODES


def test_endpoints() -> None:
    """Source: "Base URL" and the three endpoints."""
    assert _spec.DEFAULT_BASE_URL == "https://conceptviz.app/api/v1"
    assert _spec.DEFAULT_BASE_URL + _spec.GENERATE_PATH == "https://conceptviz.app/api/v1/generate"
    assert _spec.DEFAULT_BASE_URL + _spec.EDIT_PATH == "https://conceptviz.app/api/v1/edit"
    assert _spec.DEFAULT_BASE_URL + _spec.TASK_PATH + "x" == "https://conceptviz.app/api/v1/task/x"
    assert "cvk_your_api_key_here".startswith(_spec.API_KEY_PREFIX)


def test_credit_cost() -> None:
    """Source: "Credit Cost"."""
    assert dict(_spec.CREDITS_PER_IMAGE) == {("cv-2", "2k"): 2, ("cv-1", "2k"): 1, ("cv-1", "4k"): 2}


def test_limits() -> None:
    """Source: "Limits", and "Edit Images" for the 20 MB."""
    assert (_spec.MAX_PROMPTS, _spec.MAX_IMAGES) == (4, 4)
    assert _spec.POLL_INTERVAL == (3.0, 5.0)
    assert _spec.GENERATION_SECONDS == (30.0, 90.0)
    assert (_spec.IMAGE_BYTES_WARN, _spec.IMAGE_BYTES_LIMIT) == (20_000_000, 20_971_520)
    assert dict(_spec.QUALITIES) == {"cv-2": ("2k",), "cv-1": ("2k", "4k")}


def test_the_tables_agree_with_each_other() -> None:
    """Each listed quality has a price, and the defaults are a row."""
    assert {(model, q) for model, qualities in _spec.QUALITIES.items() for q in qualities} == set(
        _spec.CREDITS_PER_IMAGE
    )
    assert (_spec.DEFAULT_MODEL, _spec.DEFAULT_QUALITY) == ("cv-2", "2k")
    assert set(_spec.TERMINAL_STATUSES) == {"completed", "failed"}
    assert set(_spec.RUNNING_STATUSES) == {"pending", "processing"}


def test_the_words_an_editor_offers() -> None:
    """Source: "Step 1: Submit Generation Request": each documented word, and any other str."""
    names = ("Model", "Quality", "AspectRatio")
    offered = {name: [get_args(arg) or arg for arg in get_args(getattr(_spec, name))] for name in names}
    assert offered == {
        "Model": [("cv-2", "cv-1"), str],
        "Quality": [("2k", "4k"), str],
        "AspectRatio": [("16:9", "1:1", "4:3", "9:16", "a4-portrait"), str],
    }


@pytest.mark.parametrize("name", ["QUALITIES", "CREDITS_PER_IMAGE", "ERROR_CODES"])
def test_a_table_cannot_be_written_to(name: str) -> None:
    with pytest.raises(TypeError):
        getattr(_spec, name)["x"] = 1


def test_task_ids() -> None:
    """The page's own, and those seen in the field."""
    for task_id in ("vaW29_MJ1wbnyFU4bl_pd", "-FWrB9pZHm0wxf6t2rNq_"):
        assert re.fullmatch(_spec.TASK_ID_CHARACTERS, task_id)
