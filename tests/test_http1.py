"""HTTP/1.1 without sockets: a request's head, and answers that are read as h11 reads them, or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise

import anyio.lowlevel
import h11
import pytest
from helpers import in_virtual_time
from hypothesis import example, given
from hypothesis import strategies as st

from conceptviz import GenerateRequest, _http1, _httpcore
from conceptviz._calls import build_generate, build_look
from conceptviz._exchange import USER_AGENT, Received
from conceptviz._http1 import AnswerReader, NotPlainError, build_head

LENGTH = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nhel\r\n2\r\nlo\r\n0\r\n\r\n"
PLAIN = {
    "length": LENGTH,
    "chunked": CHUNKED,
    "no reason": LENGTH.replace(b" OK", b""),
    "an empty reason": LENGTH.replace(b" OK", b" "),
    "loud": b"HTTP/1.1 200 OK\r\nX-Other: 1\r\nCONTENT-LENGTH:  5 \r\nConnection: keep-alive\r\n\r\nhello",
    "loud chunks": CHUNKED.replace(b"Transfer-Encoding: chunked", b"TRANSFER-ENCODING:\tchunked "),
    "an empty header": LENGTH.replace(b"\r\n\r\n", b"\r\nX-Nothing:\r\n\r\n"),
    "a header of a strange name and value": LENGTH.replace(
        b"\r\n\r\n", b"\r\n!#$%&'*+-.^_`|~9: \t\xe9\x80 \t~\r\n\r\n"
    ),
    "twice the same header": LENGTH.replace(b"\r\n\r\n", b"\r\nA: 1\r\na: 2\r\n\r\n"),
    "an error": LENGTH.replace(b"200 OK", b"503 No"),
    "one large chunk": CHUNKED.replace(b"3\r\nhel\r\n2\r\nlo", b"1F40\r\n" + b"x" * 8000),
}
EMPTY = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"


def head_with(line: bytes, answer: bytes = LENGTH) -> bytes:
    return answer.replace(b"\r\n\r\n", b"\r\n" + line + b"\r\n\r\n", 1)


# Some of these a library reads, some it refuses. Here it is enough that none is read.
NOT_PLAIN = {
    "continue": b"HTTP/1.1 100 Continue\r\n\r\n" + LENGTH,
    "early hints": b"HTTP/1.1 103 Early Hints\r\nContent-Length: 5\r\n\r\n" + LENGTH,
    "no content": EMPTY.replace(b"200 OK", b"204 No Content"),
    "not modified": LENGTH.replace(b"200 OK", b"304 Not Modified"),
    "up to the end of the connection": b"HTTP/1.1 200 OK\r\n\r\nhello",
    "an old version": LENGTH.replace(b"1.1", b"1.0"),
    "a new version": LENGTH.replace(b"1.1", b"2.0"),
    "another protocol": b"SSH-2.0-OpenSSH\r\n\r\n",
    "no head": b"{}\r\n\r\n",
    "lines that end otherwise": LENGTH.replace(b"\r\n", b"\n"),
    "one line that ends otherwise": LENGTH.replace(b"OK\r\n", b"OK\n"),
    "two lengths": head_with(b"Content-Length: 5"),
    "two lengths that differ": head_with(b"Content-Length: 6"),
    "a list of lengths": LENGTH.replace(b": 5", b": 5, 5"),
    "a negative length": LENGTH.replace(b": 5", b": -5"),
    "a length with a sign": LENGTH.replace(b": 5", b": +5"),
    "a length in letters": LENGTH.replace(b": 5", b": five"),
    "no length after all": LENGTH.replace(b": 5", b":"),
    "a length beyond all measure": LENGTH.replace(b": 5", b": " + b"9" * 16),
    "chunks and a length": head_with(b"Content-Length: 5", CHUNKED),
    "chunks twice": head_with(b"Transfer-Encoding: chunked", CHUNKED),
    "a length in another word": LENGTH.replace(b": 5", b": chunked"),
    "a coding in another word": CHUNKED.replace(b"chunked", b"5"),
    "chunks, louder": CHUNKED.replace(b"chunked", b"Chunked"),
    "another coding": CHUNKED.replace(b"chunked", b"gzip, chunked"),
    "a folded header": head_with(b"X-Long: a\r\n b"),
    "a header without a name": head_with(b": a"),
    "a header without a colon": head_with(b"X-Header"),
    "a space before the colon": LENGTH.replace(b"Length:", b"Length :"),
    "a zero in a header": head_with(b"X-Zero: \0"),
    "a bare return in a header": head_with(b"X-Return: a\rContent-Length: 6"),
    "a status of two digits": LENGTH.replace(b"200", b"20"),
    "a status of four": LENGTH.replace(b"200", b"2000"),
    "trailers": CHUNKED[:-2] + b"X-Sum: 1\r\n\r\n",
    "a chunk with a word of its own": CHUNKED.replace(b"\r\n2\r\n", b"\r\n2;a=b\r\n"),
    "a chunk that is longer than it says": CHUNKED.replace(b"hel", b"hell"),
    **{
        f"a chunk of size {size!r}": CHUNKED.replace(b"\r\n2\r\n", b"\r\n" + size + b"\r\n")
        for size in (b"-6", b"-1", b"+2", b"0x2", b"1_0", b" 2", b"", b"g", b"2 ", b"2 2", b"0" * 16)
    },
}


def read(*pieces: bytes) -> tuple[Received, AnswerReader] | None:
    """Read an answer; None if it is not whole at the end."""
    received = Received()
    reader = AnswerReader(received)
    for n, piece in enumerate(pieces):
        if reader.feed(piece):
            reader.came += b"".join(pieces[n + 1 :])
            return received, reader
    return None


def read_by_h11(data: bytes) -> tuple[int, dict[str, str], bytes, bytes]:
    connection = h11.Connection(h11.CLIENT)
    connection.send(h11.Request(method="GET", target="/", headers=[("Host", "a")]))
    connection.send(h11.EndOfMessage())
    connection.receive_data(data)
    head, body = connection.next_event(), b""
    assert isinstance(head, h11.Response)
    while isinstance(event := connection.next_event(), h11.Data):
        body += bytes(event.data)
    assert isinstance(event, h11.EndOfMessage)
    assert not event.headers
    headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in head.headers}
    return head.status_code, headers, body, bytes(connection.trailing_data[0])


def assert_read_as_by_h11(data: bytes, received: Received, reader: AnswerReader) -> None:
    status_code, headers, body, left = read_by_h11(data)
    assert (received.status_code, received.headers, bytes(received.body)) == (status_code, headers, body)
    assert reader.holds_nothing_more == (not left)


def splits(data: bytes) -> Iterator[tuple[bytes, ...]]:
    yield (data,)
    yield tuple(bytes([byte]) for byte in data)
    yield from ((data[:at], data[at:]) for at in range(1, min(len(data), 200)))


@pytest.mark.parametrize("answer", PLAIN.values(), ids=PLAIN)
def test_a_plain_answer(answer: bytes) -> None:
    """However it comes, it is what h11 says it is, and whole with its last byte."""
    for pieces in splits(answer):
        found = read(*pieces)
        assert found is not None
        assert_read_as_by_h11(answer, *found)
        assert found[1].holds_nothing_more
        assert not found[1].is_last
    assert read(answer[:-1]) is None


@pytest.mark.parametrize("answer", PLAIN.values(), ids=PLAIN)
@pytest.mark.parametrize("more", [b"\r\n", b"x", LENGTH])
def test_what_comes_behind_an_answer_is_seen(answer: bytes, more: bytes) -> None:
    found = read(answer + more)
    assert found is not None
    assert_read_as_by_h11(answer + more, *found)
    assert not found[1].holds_nothing_more


@pytest.mark.parametrize("answer", PLAIN.values(), ids=PLAIN)
def test_what_has_come_of_a_body_is_there(answer: bytes) -> None:
    """A task's id may be in it, should the rest never come."""
    body = read_by_h11(answer)[2]
    for n in range(len(answer)):
        received = Received()
        AnswerReader(received).feed(answer[:n])
        came = bytes(received.body)
        assert body.startswith(came)
        if answer is LENGTH:
            assert len(came) == max(0, n - (len(answer) - 5))


def test_a_part_of_a_chunk_is_there() -> None:
    received = Received()
    assert not AnswerReader(received).feed(CHUNKED[: CHUNKED.index(b"el\r\n") + 1])
    assert received.body == b"he"


@pytest.mark.parametrize("value", ["close", "Close", "upgrade", "keep-alive, close"])
def test_a_last_answer(value: str) -> None:
    found = read(head_with(f"Connection: {value}".encode()))
    assert found is not None
    assert found[1].is_last


@pytest.mark.parametrize("answer", NOT_PLAIN.values(), ids=NOT_PLAIN)
def test_what_is_not_plain_is_left_alone(answer: bytes) -> None:
    """However it comes, and although something of it may have been read by then."""
    for pieces in splits(answer):
        with pytest.raises(NotPlainError):
            read(*pieces)


@pytest.mark.parametrize("came", [b"X", b"HTTP/2", b"\r", b"\n", b"HTTP/1.1 200 OK\n"])
def test_nothing_is_waited_for_in_vain(came: bytes) -> None:
    """What cannot become plain is known at once: a library may have read it, or refused it, by now."""
    with pytest.raises(NotPlainError):
        read(came)


def test_a_head_without_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_http1, "_MAX_HEAD", len(LENGTH) - 5)
    assert read(LENGTH) is not None
    for answer in (head_with(b"A:"), b"HTTP/1.1 200 " + b"x" * 100):
        with pytest.raises(NotPlainError):
            read(answer)


ANYTHING = st.binary(max_size=8)
PARTS = [
    *(b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 404\r\n", b"HTTP/1.0 200 OK\r\n", b"HTTP/1.1 100 Go on\r\n"),
    *(b"Content-Length: 3\r\n", b"content-length:0\r\n", b"Transfer-Encoding: chunked\r\n", b"Connection: close\r\n"),
    *(b"3\r\nabc\r\n", b"0\r\n\r\n", b"a\r\n", b"abc", b"-6", b";x=y", b"\0", b"\r\n", b"\n", b"\r", b" ", b"\t", b":"),
]
LINES = st.lists(st.sampled_from(PARTS) | ANYTHING, max_size=12).map(b"".join)
NEARLY = st.builds(
    lambda status, headers, body: b"HTTP/1.1 " + status + b"\r\n" + b"\r\n".join([*headers, b"", body]),
    st.sampled_from([b"200 OK", b"500", b"402 ", b"999 x", b"600 \xff"]),
    st.lists(
        st.sampled_from([b"Content-Length: 3", b"Transfer-Encoding: chunked", b"A: b", b"Connection: close"])
        | ANYTHING.map(lambda value: b"X-A: " + value),
        max_size=3,
    ),
    st.sampled_from(
        [b"abc", b"abcd", b"3\r\nabc\r\n0\r\n\r\n", b"1\r\na\r\n2\r\nbc\r\n0\r\n\r\nx", b"3 \r\nabc\r\n0\r\n\r\n"]
    ),
)


@given(LINES | NEARLY, st.lists(st.integers(0, 200), max_size=4))
@example(LENGTH, [])
def test_what_is_read_is_what_h11_reads(data: bytes, cuts: list[int]) -> None:
    """Of any bytes, in any pieces: this reader may leave them to a library, and never reads them otherwise."""
    places = sorted({0, *(cut for cut in cuts if cut < len(data)), len(data)})
    try:
        found = read(*(data[a:b] for a, b in pairwise(places)))
    except NotPlainError:
        return
    if found is not None:
        assert_read_as_by_h11(data, *found)


def test_the_head_of_a_look() -> None:
    head = build_head(build_look("a-task"), host="api.example:8443", base_path="/v1", authorization="Bearer x")
    assert head == (
        b"GET /v1/task/a-task HTTP/1.1\r\nHost: api.example:8443\r\nAccept: */*\r\nAccept-Encoding: identity\r\n"
        b"User-Agent: " + USER_AGENT.encode() + b"\r\nAuthorization: Bearer x\r\n\r\n"
    )


def test_the_head_of_a_submit() -> None:
    call = build_generate(GenerateRequest("über alles"))
    head = build_head(call, host="api.example", base_path="", authorization="Bearer x")
    assert head.startswith(b"POST /generate HTTP/1.1\r\nHost: api.example\r\n")
    length = len(b"".join(call.body))
    assert head.endswith(b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % length)


READ_BY_A_LIBRARY = {
    "continue": b"hello",
    "no content": b"",
    "up to the end of the connection": b"hello",
    "an old version": b"hello",
    "lines that end otherwise": b"hello",
    "two lengths": b"hello",
    "a folded header": b"hello",
    "chunks and a length": b"hello",
    "trailers": b"hello",
    "chunks, louder": b"hello",
    "a chunk with a word of its own": b"hello",
}


def read_again(*pieces: bytes, limit: int = 100, received: Received | None = None) -> Received:
    """Have httpcore read what came first, and then the rest."""
    left = list(pieces)
    received = received or Received(999, {"x": "y"}, bytearray(b"of the first attempt"))

    async def go_on() -> bytes:
        await anyio.lowlevel.checkpoint()
        return left.pop(0) if left else b""

    async def main() -> None:
        await _httpcore.read_again(left.pop(0), go_on, received, limit=limit)

    in_virtual_time(main)
    return received


@pytest.mark.parametrize("name", READ_BY_A_LIBRARY)
def test_httpcore_reads_it_from_the_beginning(name: str) -> None:
    answer = NOT_PLAIN[name]
    for at in (1, len(answer) // 2, len(answer)):
        received = read_again(answer[:at], answer[at:])
        assert bytes(received.body) == READ_BY_A_LIBRARY[name]
        assert received.status_code == (204 if name == "no content" else 200)
        assert "x" not in received.headers


@pytest.mark.parametrize("name", sorted(NOT_PLAIN.keys() - READ_BY_A_LIBRARY.keys()))
def test_httpcore_reads_it_or_refuses_it(name: str) -> None:
    """What it raises is known."""
    with suppress(_httpcore.UnreadableError):
        read_again(NOT_PLAIN[name])


def test_httpcore_reads_no_more_than_an_answer_may_have() -> None:
    answer = b"HTTP/1.1 200 OK\r\n\r\n"
    assert 10 < len(read_again(answer, *[b"hello"] * 20, limit=10).body) <= 20


def test_httpcore_is_told_of_the_end() -> None:
    with pytest.raises(_httpcore.UnreadableError):
        read_again(b"HTTP/1.1 200 OK\r\nContent-Length: 5, 5\r\n\r\nhel")


def test_of_what_httpcore_cannot_read_nothing_is_left() -> None:
    """What the first attempt made of it is not believed."""
    received = Received(999, {"x": "y"}, bytearray(b"of the first attempt"))
    with pytest.raises(_httpcore.UnreadableError):
        read_again(b"{}\r\n\r\n", received=received)
    assert (received.status_code, received.headers, bytes(received.body)) == (0, {}, b"")


def test_the_headers_that_httpcore_reads() -> None:
    received = read_again(b"HTTP/1.0 502 \xe9\r\nX-Name: \xe9 b\r\nContent-Length: 0\r\n\r\n")
    assert (received.status_code, received.headers) == (502, {"x-name": "\xe9 b", "content-length": "0"})


def test_what_comes_behind_too_much_is_not_looked_at() -> None:
    """Though it be garbled."""
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    received = read_again(head + b"14\r\n" + b"x" * 20 + b"\r\nno size\r\n", limit=10)
    assert received.body == b"x" * 20
