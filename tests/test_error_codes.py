"""All 18 error codes of the API page, each provoked at the simulator by its documented cause.

What the SDK itself would refuse is sent past its checks, as a newer service or an older SDK might see it.
"""

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from attrs import evolve
from helpers import QUICK, QUICK_POLLING, assert_no_key, png

from conceptviz import (
    APIStatusError,
    AsyncConceptViz,
    AuthenticationError,
    BadRequestError,
    ConceptVizError,
    Credits,
    EditRequest,
    GenerateRequest,
    GenerationFailedError,
    InsufficientCreditsError,
    InvalidImageError,
    ModerationBlockedError,
    PlanError,
    PlanLimitExceededError,
    RateLimitedError,
    ServerError,
    TaskNotFoundError,
    _spec,
)
from conceptviz._calls import ApiCall, ImageFile, build_edit, build_generate
from conceptviz.simulator import Simulator, render_tiny

pytestmark = pytest.mark.anyio

Ask = Callable[[AsyncConceptViz, Simulator], Awaitable[object]]


def generate(*prompts: str, **settings: Any) -> Ask:
    return lambda cv, _: cv.generate(prompts or "a", **settings)


def edit(*images: Any) -> Ask:
    return lambda cv, _: cv.edit("a", images)


def send(call: ApiCall) -> Ask:
    """Send a POST that no method of the SDK would make."""
    return lambda cv, _: cv._submit(call, GenerateRequest("a"))


def send_edit(count: int) -> Ask:
    images: list[ImageFile | str] = ["https://example.com/a.png"] * count
    return send(build_edit(EditRequest("a", b"x"), images, boundary="x"))


def send_json(path: str, body: bytes) -> Ask:
    return send(ApiCall("POST", path, "application/json", (body,)))


async def without_a_header(cv: AsyncConceptViz, _: Simulator) -> object:
    carrier: Any = cv._core.transport._line.get().submits
    real = carrier._request

    def request(*args: Any) -> Any:
        made = real(*args)
        del made.headers["authorization"]
        return made

    carrier._request = request
    return await cv.submit("a")


async def with_a_disabled_key(cv: AsyncConceptViz, simulator: Simulator) -> object:
    task = await cv.submit("a")
    simulator.disable_key()
    return await task.status()


async def with_anothers_task(cv: AsyncConceptViz, simulator: Simulator) -> object:
    other = simulator.add_account().api_key
    async with AsyncConceptViz(other, transport=simulator.transport(), polling=QUICK_POLLING) as cv2:
        task = await cv2.submit("a")
    return await cv.task(task.id).wait()


MANY = evolve(GenerateRequest("a"))
object.__setattr__(MANY, "prompts", tuple("abcde"))
POOR = {"credits": 1}

CASES: list[tuple[str, type[ConceptVizError], int | None, dict[str, Any], Ask]] = [
    ("INVALID_BODY", BadRequestError, 400, {}, send_json("/generate", b'{"prompt":')),
    ("IMAGE_REQUIRED", BadRequestError, 400, {}, send_json("/edit", b'{"prompt":"a"}')),
    ("INVALID_IMAGE", InvalidImageError, 400, {}, send_json("/edit", b'{"prompt":"a","images":["nonsense"]}')),
    ("PROMPT_REQUIRED", BadRequestError, 400, {}, send_json("/generate", b"{}")),
    ("TOO_MANY_IMAGES", BadRequestError, 400, {}, send_edit(5)),
    ("TOO_MANY_PROMPTS", BadRequestError, 400, {}, send(build_generate(MANY))),
    ("UNSUPPORTED_MODEL", BadRequestError, 400, {}, generate(model="cv-9")),
    ("UNAUTHORIZED", AuthenticationError, 401, {}, without_a_header),
    ("INVALID_API_KEY", AuthenticationError, 401, {}, with_a_disabled_key),
    ("INSUFFICIENT_CREDITS", InsufficientCreditsError, 402, POOR, generate()),
    ("PLAN_REQUIRED", PlanError, 403, {"plan": "free"}, generate()),
    ("QUALITY_NOT_ALLOWED", PlanError, 403, {"plan": "pro-single"}, generate(model="cv-1", quality="4k")),
    ("PLAN_LIMIT_EXCEEDED", PlanLimitExceededError, 403, {"plan": "pro-single"}, generate("a", "b")),
    ("TASK_NOT_FOUND", TaskNotFoundError, 404, {}, with_anothers_task),
    ("MODERATION_RATE_LIMITED", RateLimitedError, 429, {"moderation_limit": 1}, lambda cv, _: _twice(cv)),
    ("INPUT_MODERATION_BLOCKED", ModerationBlockedError, 400, {}, generate("x [sim:blocked]")),
    ("CREDIT_CONSUMPTION_FAILED", ServerError, 500, {}, generate("x [sim:credit-error]")),
    ("GENERATION_FAILED", GenerationFailedError, None, {}, generate("x [sim:server-error]")),
    # The same codes by their other causes, and through the other endpoint.
    ("INVALID_BODY", BadRequestError, 400, {}, send_json("/edit", b"[]")),
    ("INVALID_API_KEY", AuthenticationError, 401, {}, lambda cv, sim: _after(sim.disable_key, cv.submit, "a")),
    ("INPUT_MODERATION_BLOCKED", ModerationBlockedError, 400, {}, edit(png() + b"[sim:blocked]")),
    ("INSUFFICIENT_CREDITS", InsufficientCreditsError, 402, POOR, edit(png())),
    ("TASK_NOT_FOUND", TaskNotFoundError, 404, {}, lambda cv, _: cv.task("no-such-task").status()),
    ("GENERATION_FAILED", GenerationFailedError, None, {"speed": 10_000}, generate("x [sim:failed]")),
]


async def _twice(cv: AsyncConceptViz) -> None:
    await cv.submit("a")
    await cv.submit("b")


async def _after(first: Callable[[], None], then: Callable[[str], Awaitable[object]], prompt: str) -> None:
    first()
    await then(prompt)


@pytest.mark.parametrize(("code", "cls", "status", "options", "ask"), CASES, ids=[str(case[0]) for case in CASES])
async def test_each_code_arrives_as_its_class(
    code: str, cls: type[ConceptVizError], status: int | None, options: dict[str, Any], ask: Ask
) -> None:
    simulator = Simulator(render=render_tiny, seed=1, **options)
    before = simulator.ledger.credits
    async with AsyncConceptViz(
        simulator.api_key, transport=simulator.transport(), retries=QUICK, polling=QUICK_POLLING
    ) as cv:
        with pytest.raises(ConceptVizError) as caught:
            await ask(cv, simulator)
    error = caught.value
    assert type(error) is cls
    assert isinstance(error, APIStatusError | GenerationFailedError)
    assert error.code == code
    assert error.message
    if isinstance(error, APIStatusError):
        assert error.status_code == status == _spec.ERROR_CODES[code]
    assert_no_key(error, simulator.api_key)
    # The server's own book is the oracle for what the error says of the money.
    ledger = simulator.ledger
    if error.credits is Credits.NOT_SPENT and error.task_id is None and code != "MODERATION_RATE_LIMITED":
        assert (ledger.credits, ledger.submissions) == (before, 0)
    if error.credits is Credits.REFUNDED:
        assert ledger.credits == before
        assert ledger.charged == ledger.refunded > 0
    if isinstance(error, InsufficientCreditsError):
        assert error.credits_remaining == cv.credits_remaining == before


def test_every_code_of_the_page_is_here() -> None:
    assert {code for code, *_ in CASES} == set(_spec.ERROR_CODES)
    assert len(_spec.ERROR_CODES) == 18


@pytest.mark.parametrize("code", [*_spec.ERROR_CODES, "BRAND_NEW_CODE"])
@pytest.mark.parametrize("status", [400, 402, 403, 500])
async def test_a_code_counts_before_its_status(code: str, status: int) -> None:
    """A known code with another status still raises the code's class; a new one keeps its text."""
    simulator = Simulator(render=render_tiny)
    simulator.faults.add("submit", status=status, body={"error": "said so", "code": code}, times=None)
    async with AsyncConceptViz(simulator.api_key, transport=simulator.transport(), retries=QUICK) as cv:
        with pytest.raises(ConceptVizError) as caught:
            await cv.submit("a")
    known = {code: cls for code, cls, *_ in CASES}
    if code in known:
        assert type(caught.value) is known[code]
    elif status < 500:
        assert type(caught.value) is {400: BadRequestError, 402: InsufficientCreditsError, 403: PlanError}[status]
    assert code in str(caught.value)
