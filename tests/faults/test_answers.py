"""Answers that are not what they seem: to somebody else's request, or with two ids for one task."""

import httpx
import pytest

from conceptviz import AsyncConceptViz, AuthenticationError, Polling, SubmissionUnknownError

from .caller import KEY
from .server import Server
from .steps import Answer, Script, Step, refusal

pytestmark = pytest.mark.anyio

POLLING = Polling(min_interval=0.002, max_interval=0.004, first_look=0.002)
TWO_IDS = b'{"taskId": "another", "taskId": "@task@"}'


def client_of(
    server: Server, timeout: float = 2.0, transport: httpx.AsyncBaseTransport | None = None
) -> AsyncConceptViz:
    return AsyncConceptViz(KEY, base_url=server.base_url, timeout=timeout, polling=POLLING, transport=transport)


def another(body: bytes, status: bytes = b"200 OK") -> bytes:
    return b"HTTP/1.1 %b\r\nContent-Length: %d\r\n\r\n%b" % (status, len(body), body)


FAILURE = another(b'{"status": "failed"}')
IMAGES = another(b'{"status": "completed", "images": [{"url": "https://h/x.png", "prompt": "a"}]}')
REFUSAL = another(refusal(401, "INVALID_API_KEY").body or b"", b"401 Unauthorized")
RUNNING = b'{"status": "processing"}'


@pytest.mark.parametrize("surplus", [FAILURE, IMAGES, REFUSAL], ids=["failure", "images", "refusal"])
async def test_an_answer_too_many_to_a_look_does_not_end_the_wait(surplus: bytes) -> None:
    """M35: a connection over which more came than was asked for is not used again."""
    look = Step(answer=Answer(body=RUNNING, after=surplus))
    for transport in (None, httpx.AsyncHTTPTransport(verify=False)):
        with Server(Script(looks=(look,))) as server:
            async with client_of(server, transport=transport) as client:
                result = await client.generate("a")
                assert result.image.url == f"{server.origin}/images/{result.task_id}/0.png"


async def test_an_answer_too_many_to_a_submit_is_nobodys() -> None:
    """M35: a submit has a connection of its own."""
    with Server(Script(posts=(Step(answer=Answer(after=FAILURE)),))) as server:
        async with client_of(server) as client:
            tasks = [await client.submit("a") for _ in range(2)]
            assert [(await task.wait()).task_id for task in tasks] == [p.task_id for p in server.ledger.accepted]


async def test_the_end_of_a_task_is_asked_for_at_most_twice() -> None:
    """Httpx does not say what else came: once over a kept connection of its own, and once over a new one."""
    running, refused = Step(answer=Answer(body=RUNNING)), Step(answer=refusal(401, "INVALID_API_KEY"))
    with Server(Script(looks=(running,))) as server:
        async with client_of(server, transport=httpx.AsyncHTTPTransport(verify=False)) as client:
            task = await client.submit("a")
            assert [state.status async for state in task.watch()] == ["processing", "completed"]
            assert server.ledger.looks == 3
    with Server(Script(looks=(running, refused, refused))) as server:
        async with client_of(server, transport=httpx.AsyncHTTPTransport(verify=False)) as client:
            task = await client.submit("a")
            with pytest.raises(AuthenticationError):
                await task.wait()
            assert server.ledger.looks == 3


async def test_the_end_of_a_task_is_asked_for_once() -> None:
    """Over a connection of ours, of which it is known that nothing else came."""
    running = Step(answer=Answer(body=RUNNING))
    with Server(Script(looks=(running,))) as server:
        async with client_of(server) as client:
            await client.generate("a")
            assert (server.ledger.looks, server.ledger.connections) == (2, 2)


async def test_the_first_look_over_a_new_connection_is_believed_at_once() -> None:
    with Server() as server:
        async with client_of(server) as client:
            await client.generate("a")
            assert server.ledger.looks == 1


@pytest.mark.parametrize(
    "answer",
    [
        Answer(body=TWO_IDS),
        Answer(body=b'{"task_id": "@task@", "task_id": "another"}'),
        Answer(body=b'{"taskId": "another", "task_id": "@task@", "status": "pend', framing="none"),
        Answer(body=TWO_IDS + b" " * 50, cut=len(TWO_IDS) + 15),
    ],
)
async def test_of_two_ids_neither_is_taken(answer: Answer) -> None:
    """M29: JSON readers differ in which of two counts, so nobody knows which task is paid for."""
    with Server(Script(posts=(Step(answer=answer),))) as server:
        async with client_of(server, timeout=0.4) as client:  # some of the answers have no end
            with pytest.raises(SubmissionUnknownError) as caught:
                await client.submit("a")
        (post,) = server.ledger.accepted
        assert post.task_id is not None
        assert post.task_id.encode() in caught.value.body


@pytest.mark.parametrize(
    "body",
    [
        b'{"taskId": "@task@", "taskId": "@task@"}',
        b'{"taskId": "@task@", "before": {"taskId": "another"}}',
        b'{"data": {"taskId": "@task@", "task_id": "@task@"}, "credits_used": NaN}',
    ],
)
async def test_an_id_that_is_said_twice_or_stands_where_it_should_is_taken(body: bytes) -> None:
    with Server(Script(posts=(Step(answer=Answer(body=body)),))) as server:
        async with client_of(server) as client:
            assert (await client.submit("a")).id == server.ledger.posts[0].task_id
