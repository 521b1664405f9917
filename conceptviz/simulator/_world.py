"""The API reference made executable: requests in, answers out, and a book of credits.

What the service does is in this file, and nothing else is: no socket, no thread, no clock, no randomness of
its own (the time and a `random.Random` are given), no httpx, nothing of the client. The page's tables are in
`_page`.
"""

import heapq
import json
import string
from collections import deque
from collections.abc import Mapping
from random import Random
from typing import Any
from urllib.parse import parse_qs, unquote

import attrs

from ._body import Body, Upload
from ._page import (
    API_PREFIX,
    DURATION,
    ERRORS,
    IMAGE_PREFIX,
    MAX_KEYS,
    PLANS,
    Order,
    RefusedError,
    is_blocked,
    read_edit,
    read_generate,
    refuse,
)
from ._pictures import Picture

# The window of the moderation limit, in seconds of simulated time. The page says "a short period".
MODERATION_WINDOW = 60.0

# Of the time a task takes, the part it is "pending" before it is "processing".
PENDING_PART = 0.1
# Of the time a task with `[sim:unknown-status]` takes, the part at whose end it is "processing" after all.
UNKNOWN_PART = 0.5
# `[sim:slow]` takes this many times as long.
SLOW_FACTOR = 10
# Two of the 24 answers in the field notes were PNG files.
PNG_PART = 2 / 24

_FRONT_PAGE = b"ConceptViz simulator. The API is under /api/v1; pictures are simulated, credits are not real.\n"

_READERS = {f"{API_PREFIX}/generate": read_generate, f"{API_PREFIX}/edit": read_edit}
_TASK_PATH = f"{API_PREFIX}/task/"

_ID_ALPHABET = string.ascii_letters + string.digits + "_-"
_NAME_ALPHABET = string.ascii_letters + string.digits


@attrs.define
class Ledger:
    """The service's own book of one account, in credits.

    At any moment `credits == credits at the start - charged + refunded`.

    Attributes:
        credits: What is left to spend.
        charged: Everything ever consumed, refunded or not.
        refunded: Everything given back for failed generations.
        submissions: How many POSTs consumed credits.
    """

    credits: int
    charged: int = 0
    refunded: int = 0
    submissions: int = 0

    def charge(self, amount: int) -> None:
        """Consume credits for one accepted POST."""
        self.credits -= amount
        self.charged += amount
        self.submissions += 1

    def refund(self, amount: int) -> None:
        """Give back what a failed generation consumed."""
        self.credits += amount
        self.refunded += amount


@attrs.define
class Account:
    """One customer: keys, plan and credits."""

    account_id: str
    plan: str
    ledger: Ledger
    keys: dict[str, bool] = attrs.field(factory=dict, repr=False)
    moderated: deque[float] = attrs.field(factory=deque, repr=False)

    @property
    def api_key(self) -> str:
        """The first key."""
        return next(iter(self.keys))


@attrs.frozen
class Request:
    """One HTTP request, as far as the service looks at it.

    Attributes:
        method: The HTTP method.
        path: The path as sent, still percent-encoded, so that an encoded slash in a task id stays one.
        query: The query string without its question mark.
        authorization: The Authorization header, or None.
        body: What a POST carried, or None when it could not be read.
        image_origin: Scheme and host under which this caller can fetch images.
    """

    method: str
    path: str
    query: str = ""
    authorization: str | None = attrs.field(default=None, repr=False)
    body: Body | None = attrs.field(default=None, repr=False)
    image_origin: str = ""

    @property
    def kind(self) -> str:
        """What is asked for: "submit", "poll", "image" or "other"."""
        if self.method == "POST" and self.path in _READERS:
            return "submit"
        if self.method == "GET" and self.path.startswith(_TASK_PATH):
            return "poll"
        if self.method == "GET" and self.path.startswith(f"{IMAGE_PREFIX}/"):
            return "image"
        return "other"

    @property
    def prompts(self) -> tuple[str, ...]:
        """Every text a POST carried as a prompt, valid or not."""
        fields = {} if self.body is None else self.body.fields
        many = fields.get("prompts")
        texts = [fields.get("prompt"), *(many if isinstance(many, list) else ())]
        return tuple(text for text in texts if isinstance(text, str))


@attrs.frozen
class Reply:
    """One HTTP answer.

    Attributes:
        status: The HTTP status.
        body: All of the body.
        headers: Names in lower case; Content-Length is added where the answer is sent.
        cut: After how many bytes of the body the connection breaks; None: not at all.
    """

    status: int
    body: bytes = attrs.field(default=b"", repr=False)
    headers: Mapping[str, str] = attrs.field(factory=dict)
    cut: int | None = None

    @classmethod
    def json(cls, content: Any, status: int = 200, **headers: str) -> "Reply":
        """An answer in JSON."""
        body = json.dumps(content, separators=(",", ":")).encode()
        return cls(status, body, {"content-type": "application/json", **headers})


@attrs.define
class _Task:
    account: Account
    task_id: str
    cost: int
    started: float
    ends: float
    fails: bool
    unknown_status: bool
    url_expires: bool
    pictures: tuple[Picture, ...]
    looks: int = 0

    def status(self, now: float) -> str:
        """The word for a task that has not ended."""
        part = (now - self.started) / (self.ends - self.started)
        if part < PENDING_PART:
            return "pending"
        return "enhancing" if self.unknown_status and part < UNKNOWN_PART else "processing"


class World:
    """The whole service: accounts, tasks and pictures.

    Args:
        rng: Where durations, ids, keys and file formats come from.
        speed: How many seconds of simulated time pass in one second of `now`.
        moderation_limit: How many moderated requests an account may make in 60 simulated seconds; None: any
            number.
        observed_fields: Whether images carry `imageHash` and `storageKey`, which the page does not show and
            the service was seen to send.
    """

    def __init__(
        self, *, rng: Random, speed: float, moderation_limit: int | None = None, observed_fields: bool = True
    ) -> None:
        self._rng = rng
        self._speed = speed
        self._moderation_limit = moderation_limit
        self._observed_fields = observed_fields
        self._accounts: dict[str, Account] = {}
        self._tasks: dict[str, _Task] = {}
        self._files: dict[str, tuple[_Task, Picture]] = {}
        self._failing: list[tuple[float, str]] = []

    def open_account(self, credits: int, plan: str) -> Account:
        """A new account with one key."""
        account = Account(self._random_text(_NAME_ALPHABET, 32), plan, Ledger(credits))
        self.add_key(account)
        return account

    def add_key(self, account: Account) -> str:
        """One more key for an account.

        Raises:
            ValueError: It has five already ("Max API keys per account").
        """
        if len(account.keys) == MAX_KEYS:
            raise ValueError(f"An account has at most {MAX_KEYS} API keys.")
        key = "cvk_" + self._random_text(_NAME_ALPHABET, 32)
        account.keys[key] = True
        self._accounts[key] = account
        return key

    def answer(self, request: Request, now: float) -> Reply | tuple[Picture, ...]:
        """Carry out one request.

        Args:
            request: What came in.
            now: Seconds on a clock that never goes back.

        Returns:
            The answer; or the pictures to draw before the same request can be answered: a `completed` answer
            names the hash of each file.
        """
        self._settle(now)
        try:
            return self._route(request, now)
        except RefusedError as refused:
            status, text = ERRORS[refused.code]
            return Reply.json({"error": text, "code": refused.code, **refused.more}, status)

    def _settle(self, now: float) -> None:
        """Refund the tasks that have failed by now. Heading: Credit Cost, "automatically refunded"."""
        while self._failing and self._failing[0][0] <= now:
            task = self._tasks[heapq.heappop(self._failing)[1]]
            task.account.ledger.refund(task.cost)

    def _route(self, request: Request, now: float) -> Reply | tuple[Picture, ...]:
        match request.kind:
            case "submit":
                return self._submit(request, now)
            case "poll":
                return self._poll(request, now)
            case "image":
                return self._file(request)
        if request.method == "GET" and request.path == "/":
            return Reply(200, _FRONT_PAGE, {"content-type": "text/plain"})
        for method in ("GET", "POST"):
            if attrs.evolve(request, method=method).kind != "other":
                return Reply.json({"error": f"Use {method}", "code": "METHOD_NOT_ALLOWED"}, 405, allow=method)
        return Reply.json({"error": "No such route", "code": "NOT_FOUND"}, 404)

    def _authenticate(self, request: Request) -> Account:
        """Heading: Authentication."""
        scheme, _, key = (request.authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            refuse("UNAUTHORIZED")
        account = self._accounts.get(key.strip())
        if account is None or not account.keys[key.strip()]:
            refuse("INVALID_API_KEY")
        if not PLANS[account.plan].has_api:
            refuse("PLAN_REQUIRED")
        return account

    def _submit(self, request: Request, now: float) -> Reply:
        """Headings: Submit Generation Request, Edit Images."""
        account = self._authenticate(request)
        if request.body is None:
            refuse("INVALID_BODY")
        order = _READERS[request.path](request.body)
        plan, ledger = PLANS[account.plan], account.ledger
        if len(order.prompts) > plan.max_prompts:
            refuse("PLAN_LIMIT_EXCEEDED")
        if order.quality not in plan.qualities:
            refuse("QUALITY_NOT_ALLOWED")
        self._moderate(account, order, now)
        if ledger.credits < order.cost:
            refuse("INSUFFICIENT_CREDITS", credits_remaining=ledger.credits)
        if order.asks_for("credit-error"):
            refuse("CREDIT_CONSUMPTION_FAILED")
        ledger.charge(order.cost)
        if order.asks_for("server-error"):
            ledger.refund(order.cost)
            refuse("GENERATION_FAILED")
        task = self._start(account, order, now)
        return Reply.json(
            {
                "taskId": task.task_id,
                "status": "pending",
                "model": order.model,
                "quality": order.quality,
                "aspect_ratio": order.aspect_ratio,
                "credits_used": order.cost,
                "credits_remaining": ledger.credits,
                "poll_url": f"{API_PREFIX}/task/{task.task_id}",
            }
        )

    def _moderate(self, account: Account, order: Order, now: float) -> None:
        """Heading: JSON Request Body, "Image inputs are moderated"; prompts too, by the error table."""
        recent = account.moderated
        while recent and recent[0] <= now - MODERATION_WINDOW / self._speed:
            recent.popleft()
        limited = self._moderation_limit is not None and len(recent) >= self._moderation_limit
        if limited or order.asks_for("rate-limited"):
            refuse("MODERATION_RATE_LIMITED")
        if self._moderation_limit is not None:
            recent.append(now)
        if order.asks_for("blocked") or any(is_blocked(image) for image in order.images):
            refuse("INPUT_MODERATION_BLOCKED")

    def _start(self, account: Account, order: Order, now: float) -> _Task:
        prompts = order.prompts
        if order.asks_for("partial"):
            # At least one picture comes back: a completed task with none would be a failure by another name.
            prompts = tuple(prompt for prompt in prompts if "[sim:partial]" not in prompt) or prompts[:1]
        duration = self._rng.uniform(*DURATION) * (SLOW_FACTOR if order.asks_for("slow") else 1)
        task = _Task(
            account=account,
            task_id=self._random_text(_ID_ALPHABET, 21),
            cost=order.cost,
            started=now,
            ends=now + duration / self._speed,
            fails=order.asks_for("failed"),
            unknown_status=order.asks_for("unknown-status"),
            url_expires=order.asks_for("expired-url"),
            pictures=tuple(
                Picture(
                    prompt=prompt,
                    model=order.model,
                    quality=order.quality,
                    aspect_ratio=order.aspect_ratio,
                    seed=self._rng.getrandbits(32),
                    format="png" if self._rng.random() < PNG_PART else "jpeg",
                    inputs=tuple(image.data if isinstance(image, Upload) else b"" for image in order.images),
                )
                for prompt in prompts
            ),
        )
        self._tasks[task.task_id] = task
        if task.fails:
            heapq.heappush(self._failing, (task.ends, task.task_id))
        return task

    def _poll(self, request: Request, now: float) -> Reply | tuple[Picture, ...]:
        """Heading: Poll for Results."""
        account = self._authenticate(request)
        task = self._tasks.get(unquote(request.path.removeprefix(_TASK_PATH)))
        if task is None or task.account is not account:
            refuse("TASK_NOT_FOUND")
        if now < task.ends:
            return Reply.json({"status": task.status(now)})
        if task.fails:
            return Reply.json(
                {
                    "status": "failed",
                    "error": "Image generation failed. Please try again later.",
                    "code": "GENERATION_FAILED",
                    "credits_refunded": True,
                }
            )
        undrawn = tuple(picture for picture in task.pictures if picture.data is None)
        if undrawn:
            return undrawn
        task.looks += 1
        images = [self._describe(task, index, request.image_origin) for index in range(len(task.pictures))]
        return Reply.json({"status": "completed", "images": images})

    def _describe(self, task: _Task, index: int, origin: str) -> dict[str, str]:
        """An image object. Its address names account, task, index and hash, as was seen in the field."""
        picture = task.pictures[index]
        name = f"{index}-{picture.sha256[:16]}.{picture.extension}"
        key = f"{IMAGE_PREFIX}/{task.account.account_id}/{task.task_id}/{name}".removeprefix("/")
        self._files[f"/{key}"] = (task, picture)
        image = {"url": f"{origin}/{key}", "prompt": picture.prompt}
        if task.url_expires:
            image["url"] += f"?look={task.looks}"
        if self._observed_fields:
            image |= {"imageHash": picture.sha256, "storageKey": key}
        return image

    def _file(self, request: Request) -> Reply:
        """The image host. A public object store refuses an Authorization header it does not know."""
        if request.authorization is not None:
            return Reply(400, b"The image host takes no Authorization header.", {"content-type": "text/plain"})
        task, picture = self._files.get(request.path, (None, None))
        if task is None or picture is None or picture.data is None:
            return Reply(404, b"No such object.", {"content-type": "text/plain"})
        if task.url_expires and parse_qs(request.query).get("look", ["1"]) == ["1"]:
            return Reply(403, b"This URL has expired.", {"content-type": "text/plain"})
        return Reply(200, picture.data, {"content-type": f"image/{picture.format}"})

    def _random_text(self, alphabet: str, length: int) -> str:
        return "".join(self._rng.choices(alphabet, k=length))
