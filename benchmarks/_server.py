"""The API and its image host as a stub whose answers cost next to nothing, so that what is measured is the client.

It is a process of its own: it prints its port and ends with its standard input. One thread for each connection,
blocking sockets, requests with a Content-Length; the answers are those of the API page, with the fields seen in the
field. It must never become a simulator: that is `conceptviz.simulator`.
"""

import hashlib
import json
import os
import random
import re
import socket
import sys
import threading

IMAGE_BYTES = 20_000_000
_LENGTH = re.compile(rb"\r\ncontent-length: *([0-9]+)", re.IGNORECASE)
_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n"


def build_image() -> bytes:
    """Return 20 MB that begin and end as a PNG file does; what is between is noise."""
    start, end = b"\x89PNG\r\n\x1a\n", b"\x00\x00\x00\x00IEND\xaeB`\x82"
    return start + random.Random(0).randbytes(IMAGE_BYTES - len(start) - len(end)) + end


def main() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    image = build_image()
    task = {
        "status": "completed",
        "images": [
            {
                "url": f"http://127.0.0.1:{port}/images/0-water.png",
                "prompt": "water cycle diagram",
                "imageHash": hashlib.sha256(image).hexdigest(),
                "storageKey": "images/0-water.png",
            }
        ],
    }
    accepted = {
        "taskId": "vaW29_MJ1wbnyFU4bl_pd",
        "status": "pending",
        "model": "cv-2",
        "quality": "2k",
        "aspect_ratio": "16:9",
        "credits_used": 2,
        "credits_remaining": 79,
        "poll_url": "/api/v1/task/vaW29_MJ1wbnyFU4bl_pd",
    }
    answers = {
        b"POST /api/v1/": _answer(accepted),
        b"GET /api/v1/t": _answer(task),
        b"GET /images/0": (_HEAD % (b"image/png", len(image)), image),
    }

    def accept() -> None:
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=serve, args=(connection, answers), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    print(port, flush=True)
    sys.stdin.read()
    os._exit(0)


def _answer(data: object) -> tuple[bytes, bytes]:
    body = json.dumps(data).encode()
    return _HEAD % (b"application/json", len(body)) + body, b""


def serve(connection: socket.socket, answers: dict[bytes, tuple[bytes, bytes]]) -> None:
    """Answer the requests of one connection until its client leaves."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    drain = memoryview(bytearray(2**20))
    received = b""
    with connection:
        try:
            while True:
                while b"\r\n\r\n" not in received:
                    more = connection.recv(65536)
                    if not more:
                        return
                    received += more
                head, _, received = received.partition(b"\r\n\r\n")
                length = _LENGTH.search(head)
                if length is not None:
                    if b"100-continue" in head:
                        connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
                    left = int(length[1]) - len(received)
                    received = b""
                    while left > 0:
                        left -= connection.recv_into(drain, min(left, len(drain))) or left
                # A request that is not known here is a fault of the benchmark, which the client will report.
                start, body = answers.get(head[:13], (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", b""))
                connection.sendall(start)
                connection.sendall(body)
        except ConnectionError:
            return


if __name__ == "__main__":
    main()
