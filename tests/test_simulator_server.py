"""The simulator on a port: real HTTP over loopback, real sockets that close, threads that end."""

import hashlib
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import anyio
import httpx
import pytest

from conceptviz.simulator import Simulator, render_tiny, run

PNG = render_tiny("x", model="cv-2", quality="2k", aspect_ratio="1:1", seed=0, format="png")

# Waits for what must come soon; only a test that fails ever waits this long, in seconds.
PATIENCE = 20


@pytest.fixture(scope="module")
def simulator() -> Simulator:
    return Simulator(render=render_tiny, credits=10_000, speed=2000)


@pytest.fixture(scope="module")
def base_url(simulator: Simulator) -> Iterator[str]:
    with simulator.serve() as url:
        yield url


@pytest.fixture
def http(simulator: Simulator, base_url: str) -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Bearer {simulator.api_key}"}
    with httpx.Client(base_url=base_url, headers=headers, trust_env=False) as client:
        yield client
    simulator.faults.clear()


def wait_for(http: httpx.Client, task_id: str) -> Any:
    deadline = time.monotonic() + PATIENCE
    while (answer := http.get(f"/task/{task_id}").json())["status"] not in ("completed", "failed"):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return answer


def test_the_whole_road(http: httpx.Client, base_url: str) -> None:
    """The pictures come from the same port, and without the key."""
    origin = base_url.removesuffix("/api/v1")
    task_id = http.post("/generate", json={"prompts": ["one", "two"]}).json()["taskId"]
    for image in wait_for(http, task_id)["images"]:
        assert image["url"].startswith(f"{origin}/images/")
        assert http.get(image["url"]).status_code == 400
        answer = httpx.get(image["url"], trust_env=False)
        assert hashlib.sha256(answer.content).hexdigest() == image["imageHash"]
        assert answer.headers["content-type"] in ("image/jpeg", "image/png")


def test_image_urls_follow_the_name_the_caller_used(http: httpx.Client) -> None:
    task_id = http.post("/generate", json={"prompt": "x"}).json()["taskId"]
    wait_for(http, task_id)
    answer = http.get(f"/task/{task_id}", headers={"Host": "simulator.test:99"})
    assert answer.json()["images"][0]["url"].startswith("http://simulator.test:99/images/")


def test_local_files_are_uploaded(http: httpx.Client) -> None:
    files = [("image", ("a.png", PNG, "image/png")), ("image", ("b.png", PNG, "image/png"))]
    answer = http.post("/edit", data={"prompt": "Combine these", "model": "cv-1"}, files=files)
    assert answer.json()["credits_used"] == 1
    assert wait_for(http, answer.json()["taskId"])["images"][0]["prompt"] == "Combine these"
    assert http.post("/edit", data={"prompt": "x"}, files=[files[0]] * 5).json()["code"] == "TOO_MANY_IMAGES"


def test_errors_and_failures(http: httpx.Client) -> None:
    assert http.post("/generate", content=b"{").json()["code"] == "INVALID_BODY"
    assert http.get("/generate").status_code == 405
    assert http.get("/nowhere").json()["code"] == "NOT_FOUND"
    task_id = http.post("/generate", json={"prompt": "[sim:failed]"}).json()["taskId"]
    assert wait_for(http, task_id)["credits_refunded"] is True


def test_the_front_page_says_what_this_is(base_url: str) -> None:
    answer = httpx.get(base_url.removesuffix("/api/v1"), trust_env=False)
    assert "simulated" in answer.text


def test_a_lost_answer_closes_the_socket_after_the_payment(simulator: Simulator, http: httpx.Client) -> None:
    before = simulator.ledger.charged
    simulator.faults.add("submit", accept=True, close=True)
    with pytest.raises((httpx.RemoteProtocolError, httpx.ReadError)):
        http.post("/generate", json={"prompt": "x"})
    assert simulator.ledger.charged == before + 2


@pytest.mark.parametrize("fault", [{"close": True}, {"refuse": True}])
def test_a_connection_that_ends_too_early_costs_nothing(
    simulator: Simulator, http: httpx.Client, fault: dict[str, bool]
) -> None:
    before = simulator.ledger.charged
    simulator.faults.add("submit", **fault)
    with pytest.raises((httpx.RemoteProtocolError, httpx.ReadError)):
        http.post("/generate", json={"prompt": "x"})
    assert simulator.ledger.charged == before
    assert http.post("/generate", json={"prompt": "x"}).is_success


def test_a_body_breaks_off(simulator: Simulator, http: httpx.Client) -> None:
    simulator.faults.add("poll", cut=5)
    with pytest.raises(httpx.RemoteProtocolError, match="received 5 bytes"):
        http.get("/task/x")


def test_statuses_headers_and_delays(simulator: Simulator, http: httpx.Client) -> None:
    simulator.faults.add("submit", status=429, headers={"Retry-After": "2"})
    simulator.faults.add("submit", delay=60)
    answer = http.post("/generate", json={"prompt": "x"})
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "2")
    with pytest.raises(httpx.ReadTimeout):
        http.post("/generate", json={"prompt": "x"}, timeout=0.05)


def test_a_task_id_cannot_leave_its_path(http: httpx.Client) -> None:
    for task_id in ("..%2F..%2Fgenerate", "a%2Fb", "%00", "-", "a%3Fb"):
        assert http.get(f"/task/{task_id}").json()["code"] == "TASK_NOT_FOUND"


def test_a_broken_request_does_not_end_the_server(http: httpx.Client, base_url: str) -> None:
    url = httpx.URL(base_url)
    for data in (b"\x16\x03\x01\x02\x00", b"POST /api/v1/generate HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{"):
        with socket.create_connection((url.host, url.port or 0)) as connection:
            connection.sendall(data)
    assert http.post("/generate", json={"prompt": "x"}).is_success


def test_one_simulator_answers_in_process_and_on_a_port(simulator: Simulator, http: httpx.Client) -> None:
    """A task submitted over the socket is seen through the transport, with the same age."""
    task_id = http.post("/generate", json={"prompt": "x"}).json()["taskId"]
    wait_for(http, task_id)

    async def look() -> Any:
        async with httpx.AsyncClient(transport=simulator.transport(), headers=http.headers) as inside:
            return (await inside.get(f"https://conceptviz.app/api/v1/task/{task_id}")).json()

    image = anyio.run(look)["images"][0]
    assert image["url"].startswith("https://r2.conceptviz.app/")
    assert image["prompt"] == "x"


@pytest.mark.anyio
async def test_it_can_be_served_from_a_running_loop() -> None:
    simulator = Simulator(render=render_tiny)
    with simulator.serve() as url:
        async with httpx.AsyncClient(trust_env=False) as http:
            answer = await http.post(
                f"{url}/generate", json={"prompt": "x"}, headers={"Authorization": f"Bearer {simulator.api_key}"}
            )
    assert answer.is_success


def test_several_servers_stop_cleanly() -> None:
    """Each has its own port; afterwards no thread is left and nobody listens."""
    before = threading.active_count()
    with ExitStack() as stack:
        urls = [httpx.URL(stack.enter_context(Simulator(render=render_tiny).serve())) for _ in range(3)]
        assert len({url.port for url in urls}) == 3
        assert all(httpx.get(url, trust_env=False).status_code == 404 for url in urls)
    assert threading.active_count() == before
    for url in urls:
        with pytest.raises(httpx.ConnectError):
            httpx.get(url, trust_env=False)


def test_a_server_stops_while_an_answer_is_delayed(caplog: pytest.LogCaptureFixture) -> None:
    """Whoever waits for it sees the connection close, and nothing is logged as a crash."""
    simulator = Simulator(render=render_tiny)
    simulator.faults.add("poll", delay=600)
    errors: list[Exception] = []

    def ask(url: str) -> None:
        try:
            httpx.get(f"{url}/task/x", timeout=PATIENCE, trust_env=False)
        except httpx.HTTPError as error:
            errors.append(error)

    with simulator.serve() as url:
        thread = threading.Thread(target=ask, args=(url,))
        thread.start()
        until(lambda: simulator.requests["poll"] == 1)
    thread.join(PATIENCE)
    assert [type(error) for error in errors] == [httpx.RemoteProtocolError]
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]


def until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.com", ""])
def test_it_does_not_listen_to_the_world_unless_told(host: str) -> None:
    simulator = Simulator(render=render_tiny)
    with pytest.raises(ValueError, match="allow_remote=True"), simulator.serve(host):
        pass
    with pytest.raises(ValueError, match="allow_remote=True"):
        run(simulator, host=host, port=0)


def test_it_listens_to_the_world_when_told() -> None:
    with Simulator(render=render_tiny).serve("0.0.0.0", allow_remote=True) as url:
        assert httpx.get(url.replace("0.0.0.0", "127.0.0.1"), trust_env=False).status_code == 404


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "::1"])
def test_loopback_has_several_names(host: str) -> None:
    if host == "::1" and not _has_ipv6():
        pytest.skip("this machine has no IPv6 loopback")
    with Simulator(render=render_tiny).serve(host) as url:
        assert httpx.URL(url).host == host
        assert httpx.get(url, trust_env=False).status_code == 404


def _has_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


def test_a_port_that_is_taken_is_an_os_error() -> None:
    with Simulator(render=render_tiny).serve() as url:
        port = httpx.URL(url).port or 0
        with pytest.raises(OSError, match=r"in use"), Simulator(render=render_tiny).serve(port=port):
            pass


def test_without_uvicorn_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with (
        pytest.raises(ModuleNotFoundError, match=r'pip install "conceptviz\[simulator\]"'),
        Simulator(render=render_tiny).serve(),
    ):
        pass


PROGRAM = """
from conceptviz.simulator import Simulator, render_tiny, run
run(Simulator(render=render_tiny), port=0, on_ready=lambda url: print(url, flush=True))
print("ended")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
def test_run_answers_until_ctrl_c() -> None:
    """What the command line stands on: ready, answering, and a quiet end."""
    command = [sys.executable, "-W", "error", "-c", PROGRAM]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().strip()
            assert httpx.get(f"{url}/task/x", trust_env=False).json()["code"] == "UNAUTHORIZED"
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
    assert (process.returncode, out, err) == (0, "ended\n", "")
