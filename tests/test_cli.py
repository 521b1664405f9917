"""The command line, run as a user runs it: what it prints where, how it ends, and what it says when it goes wrong."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any

import pytest
from cli_helpers import AT_ONCE, QUICK, advised, move_in, reach, start, wait_for_submit

import conceptviz
from conceptviz import ConceptViz, ConceptVizError, Journal, _errors
from conceptviz.cli import _exits, _work, main
from conceptviz.cli._task_ids import set_id_apart
from conceptviz.simulator import Simulator, render_tiny

REFERENCE = Path(__file__).parents[1] / "docs" / "reference" / "command-line.md"
ERRORS = [value for value in vars(_errors).values() if isinstance(value, type) and issubclass(value, ConceptVizError)]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return move_in(tmp_path, monkeypatch)


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Simulator]:
    """Let a simulator be the service that the commands reach."""
    return partial(reach, monkeypatch=monkeypatch)


@pytest.fixture
def service(use: Callable[..., Simulator]) -> Simulator:
    return use(Simulator(speed=400, seed=5, render=render_tiny))


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[Simulator]:
    """A simulator on a port, for commands in a process of their own."""
    simulator = Simulator(speed=40, render=render_tiny)
    with simulator.serve() as base_url:
        monkeypatch.setenv("CONCEPTVIZ_BASE_URL", base_url)
        monkeypatch.setenv("CONCEPTVIZ_API_KEY", simulator.api_key)
        yield simulator


def no_reader() -> IO[str]:
    """A pipe whose reader has gone."""
    read, write = os.pipe()
    os.close(read)
    return os.fdopen(write, "w")


def advice(err: str) -> list[str]:
    """The command that a message advises to take a task up again."""
    return advised(err.rpartition("Take it up again, at no further cost:\n")[2].partition("\n")[0])


def test_generate_prints_the_path_of_a_diagram(service: Simulator, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "the water cycle"]) == 0
    out, err = capsys.readouterr()
    (path,) = out.splitlines()
    assert Path(path).parent == Path("diagrams")
    assert Path(path).read_bytes()[:2] in {b"\xff\xd8", b"\x89P"}
    assert "2 credits used, 98 left" in err
    assert "completed after" in err
    assert service.ledger.charged == 2
    assert logging.getLogger("conceptviz").handlers == []  # a program that calls main keeps its own


def test_a_batch_as_json_is_one_object_per_image(service: Simulator, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["generate", "cell division", "DNA", "--model", "cv-1", "--quality", "4k", "--aspect-ratio", "1:1"]
    assert main([*args, "-o", "out", "--json"]) == 0
    out, err = capsys.readouterr()
    first, second = (json.loads(line) for line in out.splitlines())
    for index, (found, prompt) in enumerate([(first, "cell division"), (second, "DNA")]):
        path = Path(found.pop("path"))
        assert path.parent == Path("out")
        assert found == {
            "task_id": path.stem[:-2],
            "prompt": prompt,
            "index": index,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "model": "cv-1",
            "quality": "4k",
            "aspect_ratio": "1:1",
            "credits_used": 4,
            "credits_remaining": 96,
        }
    assert "r2." not in out + err  # an image's URL identifies an account
    assert service.ledger.submissions == 1


def test_edit_takes_paths_and_urls(service: Simulator, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sketch = home / "sketch.png"
    sketch.write_bytes(render_tiny("x", model="", quality="", aspect_ratio="", seed=1, format="png"))
    assert main(["edit", "make it blue", "sketch.png", "HTTPS://example.com/a.png"]) == 0
    assert Path(capsys.readouterr().out.strip()).is_file()
    assert main(["edit", "make it blue", "missing.png"]) == 2
    assert "missing.png" in capsys.readouterr().err
    assert service.ledger.submissions == 1


def test_wait_and_status_take_up_a_task(service: Simulator, capsys: pytest.CaptureFixture[str]) -> None:
    main(["generate", "the water cycle", "-o", "first"])
    saved = Path(capsys.readouterr().out.strip())
    task_id = saved.stem[:-2]
    assert main(["status", task_id]) == 0
    out, err = capsys.readouterr()
    assert out == "completed\n"
    assert advice(err) == ["wait", task_id, "-o", "diagrams"]
    assert main(["wait", task_id, "-o", "second"]) == 0
    again = Path(capsys.readouterr().out.strip())
    assert again == Path("second") / saved.name
    assert again.read_bytes() == saved.read_bytes()
    assert service.ledger.charged == 2


@pytest.mark.parametrize(
    ("refunded", "sentence"),
    [(True, "credits were refunded"), (False, "credits were not refunded"), (None, "did not say")],
)
def test_the_status_of_a_failed_task_says_why(
    service: Simulator, refunded: bool | None, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = {} if refunded is None else {"credits_refunded": refunded}
    body = {"status": "failed", "error": "No luck", "code": "GENERATION_FAILED", **said}
    service.faults.add("poll", body=body, times=2)
    assert main(["status", "abc"]) == 0
    out, err = capsys.readouterr()
    assert out == "failed\n"
    assert "No luck (GENERATION_FAILED). " in err
    assert sentence in err
    assert main(["status", "abc", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "task_id": "abc",
        "status": "failed",
        "images": 0,
        "error": "No luck",
        "code": "GENERATION_FAILED",
        "credits_refunded": refunded,
    }


@pytest.mark.parametrize(
    "task_id",
    [
        "-bcdefghijklmnopqrstu",
        "--cdefghijklmnopqrstu",
        "---defghijklmnopqrstu",
        "-odefghijklmnopqrstu_",
        "abcdefghijklmnopqrst-",
        "_bcdefghijklmnopqrst-",
        "-x",
    ],
)
def test_a_task_id_may_look_like_an_option(
    service: Simulator, task_id: str, capsys: pytest.CaptureFixture[str]
) -> None:
    running = {"status": "processing"}
    for args in (["status", task_id], ["status", "--json", task_id], ["status", "--", task_id]):
        service.faults.add("poll", body=running, containing=task_id)
        assert main(args) == 0, capsys.readouterr().err
        assert "processing" in capsys.readouterr().out
    service.faults.add("poll", body=running, containing=task_id, times=None)
    assert main(["wait", "--timeout", "0.05", task_id, "-o", "out"]) == 8
    assert advice(capsys.readouterr().err) == ["wait", task_id, "-o", "out"]


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["-x"], ["--", "-x"]),
        (["-x", "--json"], ["--json", "--", "-x"]),
        (["-o", "-x"], ["-o", "-x"]),  # the value of -o; the id is missing
        (["-oDIR"], ["-oDIR"]),
        (["-oDIR", "-x"], ["-oDIR", "--", "-x"]),
        (["--output=DIR", "-x"], ["--output=DIR", "--", "-x"]),
        (["abc", "--jsn"], ["abc", "--jsn"]),  # a slip is not an id when there is one
        (["abc", "-odefghijklmnopqrstu_"], ["abc", "-odefghijklmnopqrstu_"]),
        (["--", "-x"], ["--", "-x"]),
        (["-x", "-y"], ["-y", "--", "-x"]),
        (["--help"], ["--help"]),
        ([], []),
    ],
)
def test_only_an_id_is_set_apart(args: list[str], expected: list[str]) -> None:
    assert set_id_apart(args, {"--json", "--help", "-h"}, {"-o", "--output", "--timeout"}) == expected


def test_simulate_needs_no_key_and_no_network(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the environment says of the real service is left alone, and no socket is connected."""
    monkeypatch.setenv("CONCEPTVIZ_BASE_URL", "http://127.0.0.1:9/api/v1")
    monkeypatch.setenv("CONCEPTVIZ_API_KEY", "cvk_real")
    monkeypatch.setattr(_work, "SIMULATED_SPEED", 400)
    connected: list[object] = []
    watching = True

    def watch(event: str, args: tuple[Any, ...]) -> None:
        if watching and event in {"socket.connect", "socket.getaddrinfo"}:
            connected.append(args)

    sys.addaudithook(watch)
    code = main(["generate", "the water cycle", "--simulate"])
    watching = False
    out, err = capsys.readouterr()
    assert code == 0
    assert Path(out.strip()).stat().st_size > 10_000  # a drawn page
    assert err.startswith("Simulating: no key, no network, and nothing is charged.\n")
    assert len(err.splitlines()) <= 5
    assert connected == []


def test_a_simulated_task_is_not_said_to_live_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_work, "SIMULATED_SPEED", 400)
    assert main(["generate", "[sim:slow]", "--simulate", "--timeout", "0.05"]) == 8
    err = capsys.readouterr().err
    assert "nothing was charged, and nothing goes on" in err
    assert "conceptviz wait" not in err


def test_a_partial_result_names_what_is_missing(service: Simulator, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "cell division", "a missing [sim:partial] one"]) == 10
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 1
    assert "No image came back for 1 of 2 prompts:\n  " in err


def test_one_lost_image_does_not_lose_the_other(service: Simulator, capsys: pytest.CaptureFixture[str]) -> None:
    """The first image cannot be fetched; the command that is advised fetches it, and nothing is paid twice."""
    service.faults.add("image", status=500, times=AT_ONCE.attempts)
    assert main(["generate", "cell division", "DNA", "-o", "my out"]) == 9
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 1
    assert main(advice(err)) == 0
    assert len(set(capsys.readouterr().out.splitlines()) | set(out.splitlines())) == 2
    assert service.ledger.submissions == 1


def test_every_lost_image_is_told(service: Simulator, capsys: pytest.CaptureFixture[str]) -> None:
    service.faults.add("image", status=500, times=None)
    assert main(["generate", "cell division", "DNA"]) == 9
    assert capsys.readouterr().err.count("Error: The image of task") == 2


def refused(simulator: Simulator, on: Any, **fault: Any) -> Simulator:
    simulator.faults.add(on, **{"times": None, **fault})
    return simulator


def made(**options: Any) -> Simulator:
    return Simulator(**{"speed": 400, "render": render_tiny, **options})


GENERATE = ["generate", "x"]
FAILURES: dict[str, tuple[Callable[[], Simulator], list[str], int, bool]] = {
    # what goes wrong, the command, its exit code, whether a task lives on
    "blank prompt": (made, ["generate", " "], 2, False),
    "not a task id": (made, ["status", "a/b"], 2, False),
    "no connection": (lambda: refused(made(), "submit", refuse=True), GENERATE, 3, False),
    "answer lost": (lambda: refused(made(), "submit", close=True, accept=True), GENERATE, 4, False),
    "looks fail": (lambda: refused(made(), "poll", close=True), GENERATE, 5, True),
    "no images": (lambda: refused(made(), "poll", body={"status": "completed", "images": []}), GENERATE, 6, True),
    "task failed": (made, ["generate", "[sim:failed]"], 7, False),
    "out of time": (
        lambda: refused(made(), "poll", body={"status": "processing"}),
        [*GENERATE, "--timeout", "0.1"],
        8,
        True,
    ),
    "image lost": (lambda: refused(made(), "image", status=500), GENERATE, 9, True),
    "over budget": (made, [*GENERATE, "--budget", "1"], 11, False),
    "no journal": (made, [*GENERATE, "--journal", "."], 12, False),
    "model unknown": (made, ["generate", "x", "--model", "cv-9"], 21, False),
    "blocked": (made, ["generate", "[sim:blocked]"], 22, False),
    "image refused": (
        lambda: refused(made(), "submit", status=400, body={"error": "bad", "code": "INVALID_IMAGE"}),
        ["edit", "x", "https://example.com/a.png"],
        23,
        False,
    ),
    "key disabled": (lambda: refused(made(), "submit", status=401), GENERATE, 24, False),
    "key disabled later": (lambda: refused(made(), "poll", status=401), GENERATE, 24, True),
    "no credits": (lambda: made(credits=1), GENERATE, 25, False),
    "no plan": (lambda: made(plan="free"), GENERATE, 26, False),
    "small plan": (lambda: made(plan="pro-single"), ["generate", "x", "y"], 27, False),
    "no task": (made, ["wait", "abc"], 28, False),
    "in haste": (made, ["generate", "[sim:rate-limited]"], 29, False),
    "service failed": (made, ["generate", "[sim:credit-error]"], 30, False),
}


@pytest.mark.parametrize("name", FAILURES)
def test_every_failure_is_a_sentence_and_a_code(
    name: str, use: Callable[..., Simulator], capsys: pytest.CaptureFixture[str]
) -> None:
    """On stderr alone, in a shell's words, without the key; and with the way back to a task that lives on."""
    make, args, code, lives_on = FAILURES[name]
    simulator = use(make())
    assert main(args) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert re.search(r"^Error: ['\w].*\.$", err, re.MULTILINE), err
    assert simulator.api_key not in err
    for python in ("Traceback", "task(", "wait()", "overwrite=", "api_key=", "Unchecked", "Journal."):
        assert python not in err
    assert ("Take it up again" in err) == lives_on
    if lives_on:
        simulator.faults.clear()
        assert main(advice(err)) == 0
        assert Path(capsys.readouterr().out.strip()).is_file()
    assert simulator.ledger.submissions <= 1


def test_the_failures_cover_every_class() -> None:
    """All but the two that are only raised as one of their subclasses."""
    abstract = {_exits.EXIT_CODES[kind] for kind in (ConceptVizError, conceptviz.APIStatusError)}
    assert {code for _, _, code, _ in FAILURES.values()} | abstract == set(_exits.EXIT_CODES.values())


def test_every_class_of_error_has_an_exit_code_of_its_own() -> None:
    assert set(_exits.EXIT_CODES) == set(ERRORS)
    assert len(set(_exits.EXIT_CODES.values())) == len(ERRORS)


def test_a_class_to_come_ends_as_its_family() -> None:
    class QuotaError(conceptviz.PlanError):
        pass

    assert _exits.exit_code(QuotaError("x", status_code=403)) == _exits.EXIT_CODES[conceptviz.PlanError]


def test_the_reference_lists_every_exit_code() -> None:
    rows = re.findall(r"^\| (\d+) \| (?:`(\w+)`)?", REFERENCE.read_text("utf-8"), re.MULTILINE)
    listed = {name: int(code) for code, name in rows if name}
    assert listed == {kind.__name__: code for kind, code in _exits.EXIT_CODES.items()}
    others = {0, _exits.PARTIAL, _exits.INTERRUPTED, _exits.READER_GONE}
    assert {int(code) for code, name in rows if not name} == others


def test_the_reference_lists_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    page = REFERENCE.read_text("utf-8")
    journal = [f"journal {command}" for command in ("list", "resume", "resolve", "prune")]
    for command in ("generate", "edit", "status", "wait", "estimate", *journal, "simulator"):
        assert main([*command.split(), "--help"]) == 0
        section = page.partition(f"## `{command}`")[2].partition("\n## ")[0]
        options = re.findall(r"^  (?:-\w, )?(--[a-z-]+)", capsys.readouterr().out, re.MULTILINE)
        assert options.pop() == "--help"
        for option in options:
            assert option in section, f"{command} {option}"


def full_disk(*_: object) -> None:
    raise conceptviz.JournalError("The disk is full.")


def test_advice_in_python_is_put_in_a_shells_words(
    service: Simulator, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each replacement meets a sentence that the core really says: if the core's words change, this list must too."""
    said: list[str] = []
    in_shell_words = _exits.in_shell_words

    def overhear(error: Exception | str) -> str:
        said.append(str(error))
        return in_shell_words(error)

    monkeypatch.setattr("conceptviz.cli._app.in_shell_words", overhear)
    monkeypatch.setattr("conceptviz.cli._report.in_shell_words", overhear)
    main(["generate", "x", "--quality", "4k"])
    main(["generate", "x", "-o", "a.png"])
    main(["generate", "[sim:slow]", "--timeout", "0.05"])
    main(["simulator", "--host", "0.0.0.0"])
    main(["generate", "x"])
    path = Path(capsys.readouterr().out.strip())
    path.write_bytes(b"something else")
    main(["wait", path.stem[:-2]])
    main(["generate", "x", "--model", "cv-9", "--budget", "9"])
    service.faults.add("submit", close=True)
    main(["generate", "x", "--key", "lost"])
    main(["generate", "x", "--key", "lost"])
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "accepted", full_disk)
        main(["generate", "x"])
    service.faults.add("submit", status=401, body={"error": "No header", "code": "UNAUTHORIZED"})
    main(["generate", "x"])
    monkeypatch.setattr(_work, "ConceptViz", ConceptViz)
    main(["generate", "x"])
    unused = [pattern.pattern for pattern, _ in _exits._SHELL_WORDS if not any(map(pattern.search, said))]
    assert unused == []


@pytest.mark.parametrize(
    "args",
    [
        ["generate", "x", "--timeout", "soon"],
        ["generate", "x", "--timeout", "0"],
        ["generate", "x", "--timeout", "nan"],
        ["generate", "x", "--timeout", "inf"],
        ["generate", "x", "--budget", "some"],
        ["generate", "x", "--budget", "-1"],
        ["generate", "x", "--key", "a", "--no-journal"],
        ["edit", "x", "https://example.com/a.png", "--journal", "a", "--no-journal"],
        ["journal", "resolve"],
        ["journal", "resolve", "a", "--retry", "--task-id", "b"],
        ["journal", "prune"],
        ["journal", "prune", "--older-than", "-1"],
        ["generate"],
        ["edit", "x"],
        ["status"],
        ["status", "abc", "--jsn"],
        ["estimate", "many"],
        ["simulator", "--port", "99999"],
        ["simulator", "--plan", "gold"],
        ["simulator", "--speed", "0"],
        ["nonsense"],
    ],
)
def test_a_wrong_command_line_is_a_usage_error(
    args: list[str], service: Simulator, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(args) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("Usage: conceptviz")
    assert not service.requests


@pytest.mark.parametrize("output", ["taken", "taken/below", "picture.png"])
def test_a_folder_that_cannot_be_is_found_out_before_anything_is_paid(
    output: str, service: Simulator, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / "taken").write_text("a file")
    assert main(["generate", "x", "-o", output]) == 2
    assert output in capsys.readouterr().err
    assert service.ledger.submissions == 0


def test_a_folder_without_permission_is_found_out_before_anything_is_paid(
    service: Simulator, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)  # root, who may run this, may write anywhere
    assert main(["generate", "x", "-o", "out"]) == 2
    assert "The folder out cannot be written to." in capsys.readouterr().err
    assert service.ledger.submissions == 0


@pytest.mark.parametrize(("args", "credits"), [([], 2), (["24"], 48), (["24", "--model", "cv-1"], 24), (["0"], 0)])
def test_estimate_prints_credits(args: list[str], credits: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", *args]) == 0
    assert capsys.readouterr().out == f"{credits}\n"


def test_estimate_refuses_what_has_no_price(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", "--quality", "4k"]) == 2
    assert "no price" in capsys.readouterr().err


@pytest.mark.parametrize(
    "args", [["--help"], ["--version"], ["generate", "--help"], ["journal", "list", "--help"], ["estimate", "3"]]
)
def test_what_needs_no_service_starts_without_http(args: list[str]) -> None:
    code = (
        "import sys; before = set(sys.modules); from conceptviz.cli import main; "
        f"assert main({args!r}) == 0; assert not {{'httpx', 'anyio', 'PIL', 'sqlite3'}} & (set(sys.modules) - before)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_the_version_by_way_of_python_m() -> None:
    done = subprocess.run([sys.executable, "-m", "conceptviz", "--version"], check=True, capture_output=True, text=True)
    assert done.stdout == f"conceptviz {conceptviz.__version__}\n"


@pytest.mark.parametrize(
    ("library", "args", "extra"),
    [
        ("typer", ["--help"], "[cli]"),
        ("rich", ["estimate"], "[cli]"),
        ("PIL", ["generate", "x", "--simulate"], "[simulator]"),
        ("uvicorn", ["simulator", "--port", "0"], "[simulator]"),
    ],
)
def test_a_missing_library_is_one_sentence_that_says_what_to_install(
    library: str,
    args: list[str],
    extra: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    assert main(args) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert f'pip install "conceptviz{extra}"' in err
    assert len(err.splitlines()) == 1


def test_a_module_of_ours_that_is_missing_is_not_called_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "conceptviz._files", None)
    monkeypatch.delitem(sys.modules, "conceptviz.cli._work")
    with pytest.raises(ModuleNotFoundError):
        main(["generate", "x"])


class Terminal(io.StringIO):
    """A stderr that somebody looks at."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("spelling", ["utf-8", "latin-1"])
def test_a_terminal_gets_one_line_that_is_kept_up_to_date(
    spelling: str, service: Simulator, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(Terminal, "encoding", spelling)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("NO_COLOR", "1")
    service.faults.add("submit", delay=0.25)  # longer than the line takes to be drawn
    service.faults.add("poll", status=500)
    assert main(["generate", "the water cycle"]) == 0
    seen = terminal.getvalue()
    assert Path(capsys.readouterr().out.strip()).is_file()
    assert "submitting · 0 s" in seen
    assert re.search(r"(pending|processing|saving) · \d s · task \S+ · 2 credits used, 98 left", seen)
    assert re.search(r"Trying again in \d\.\d s\.", seen)
    assert re.search(r"completed after \d+\.\d s: 2 credits used, 98 left\.", seen)
    assert seen.rfind("\x1b[?25h") > seen.rfind("\x1b[?25l")  # the cursor is back
    assert not re.search(r"\x1b\[[0-9;]*3\dm", seen)  # and NO_COLOR is honoured
    assert ("⠋" in seen) == (spelling == "utf-8")


def test_a_terminal_is_left_in_order_when_a_task_fails(service: Simulator, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    assert main(["generate", "[sim:failed]"]) == 7
    seen = terminal.getvalue()
    assert seen.index("\x1b[?25h") < seen.index("Error: Task ")


def test_a_terminal_that_cannot_move_its_cursor_gets_lines(service: Simulator, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "dumb")
    assert main(["generate", "the water cycle"]) == 0
    assert "\x1b" not in terminal.getvalue()
    assert "submitted: 2 credits used" in terminal.getvalue()


def test_a_closed_stderr_does_not_send_messages_to_stdout(
    service: Simulator, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    assert main(["generate", "the water cycle"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_a_reader_of_stderr_who_leaves_does_not_stop_a_paid_task(
    service: Simulator, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stderr = no_reader()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stderr)
        assert main(["generate", "the water cycle"]) == 0
    with pytest.raises(BrokenPipeError):
        stderr.close()
    assert Path(capsys.readouterr().out.strip()).is_file()


def test_a_terminal_that_cannot_spell_a_name_gets_it_all_the_same(
    service: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffer = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(buffer, "ascii"))
    assert main(["generate", "вода 水", "-o", "диаграммы"]) == 0
    assert buffer.getvalue().startswith(b"?????????/")
    assert len(list(Path("диаграммы").iterdir())) == 1


def test_a_service_cannot_command_the_terminal(service: Simulator, capsys: pytest.CaptureFixture[str]) -> None:
    service.faults.add("poll", body={"status": "pro\x1b[2Jcess\x9b"})
    main(["status", "abc"])
    service.faults.add("submit", status=400, body={"error": "\x1b]0;title\x07", "code": "INVALID_BODY"})
    main(["generate", "x"])
    out, err = capsys.readouterr()
    assert out == "pro\N{REPLACEMENT CHARACTER}[2Jcess\N{REPLACEMENT CHARACTER}\n"
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f]", err)


def test_a_changed_price_is_told(service: Simulator, capsys: pytest.CaptureFixture[str]) -> None:
    service.faults.add("submit", alter=lambda answer: {**answer, "credits_used": 3, "credits_remaining": None})
    assert main(["generate", "x"]) == 0
    err = capsys.readouterr().err
    assert "Warning: Task " in err
    assert "submitted: 3 credits used.\n" in err


def test_a_service_that_does_not_speak_of_credits(service: Simulator, capsys: pytest.CaptureFixture[str]) -> None:
    service.faults.add("submit", alter=lambda answer: {"taskId": answer["taskId"]})
    assert main(["generate", "x"]) == 0
    assert re.search(r"Task \S+ submitted\.\n", capsys.readouterr().err)


def test_it_runs_outside_the_main_thread(service: Simulator, capsys: pytest.CaptureFixture[str]) -> None:
    """There, no signal can be handled, and none needs to be."""
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(main(["generate", "x"])))
    thread.start()
    thread.join()
    assert codes == [0]


def test_ctrl_c_while_waiting_says_how_to_take_the_task_up(
    served: Simulator, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first look is 3 s after the submit, so that the wait is under way; the advice is then followed."""
    process = start("generate", "cell division", "DNA", "-o", "my out")
    assert process.stderr is not None
    assert "submitted" in process.stderr.readline()
    threading.Event().wait(0.2)  # let the wait begin; a Ctrl-C that comes before it is another test's
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert out == ""
    assert "is paid for and goes on at the service" in err
    assert err.count("Take it up again") == err.count("conceptviz wait") == 1
    assert "Traceback" not in err
    assert "Warning" not in err  # the core's own, in Python's words
    monkeypatch.setattr(_work, "ConceptViz", partial(ConceptViz, polling=QUICK))
    assert main(advice(err)) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert served.ledger.submissions == 1


def test_ctrl_c_during_a_submit_waits_for_its_answer(served: Simulator) -> None:
    """The answer names the task that has been paid for."""
    served.faults.add("submit", delay=1.0)
    process = start("generate", "x")
    wait_for_submit(served)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert err.startswith("Waiting for the answer")
    assert advice(err)[0] == "wait"


def test_a_second_ctrl_c_does_not_wait(served: Simulator) -> None:
    served.faults.add("submit", delay=25.0)
    process = start("generate", "x")
    assert process.stderr is not None
    wait_for_submit(served)
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline().startswith("Waiting for the answer")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=9)  # less than a submit under way is given
    assert process.returncode == 130
    stopped = "Stopped before the service had answered: the request may have been accepted and charged."
    assert err == f"{stopped} What is known of it:\n  conceptviz journal list\n"


@pytest.mark.parametrize(("simulated", "sentence"), [(True, "nothing was charged"), (False, "Nothing was sent")])
def test_ctrl_c_before_a_submit(
    simulated: bool,
    sentence: str,
    service: Simulator,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(_work, "open_client", interrupted)
    assert main(["generate", "x", *(["--simulate"] if simulated else [])]) == 130
    assert sentence in capsys.readouterr().err


def test_ctrl_c_before_any_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("conceptviz.cli._app.run", interrupted)
    assert main(["--help"]) == 130


def test_a_reader_of_stdout_who_leaves_is_no_error() -> None:
    with no_reader() as stdout:
        process = start("estimate", stdout=stdout)
        _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (141, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_is_a_sentence() -> None:
    with Path("/dev/full").open("w") as stdout:
        process = start("estimate", stdout=stdout)
        _, err = process.communicate(timeout=20)
    assert process.returncode == 1
    assert err.startswith("Error: The results could not be printed: ")
    assert "Traceback" not in err


def test_the_simulator_says_in_json_when_it_answers() -> None:
    process = start("simulator", "--port", "0", "--json", "--speed", "30", "--credits", "7")
    assert process.stdout is not None
    ready = json.loads(process.stdout.readline())
    assert set(ready) == {"base_url", "api_key"}
    request = urllib.request.Request(
        f"{ready['base_url']}/task/none", headers={"Authorization": f"Bearer {ready['api_key']}"}
    )
    with pytest.raises(urllib.error.HTTPError) as refusal:
        urllib.request.urlopen(request, timeout=10)
    with refusal.value as answer:
        assert json.load(answer)["code"] == "TASK_NOT_FOUND"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (0, "", "")


def test_the_simulator_prints_two_lines_to_paste(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(simulator: Simulator, *, host: str, port: int, on_ready: Callable[[str], None]) -> None:
        assert simulator.ledger.credits == 7
        on_ready(f"http://{host}:{port}/api/v1")

    monkeypatch.setattr("conceptviz.simulator.run", run)
    assert main(["simulator", "--credits", "7"]) == 0
    out, err = capsys.readouterr()
    first, second = out.splitlines()
    assert first == "export CONCEPTVIZ_BASE_URL=http://127.0.0.1:8787/api/v1"
    assert re.fullmatch(r"export CONCEPTVIZ_API_KEY=cvk_\w+", second)
    assert "7 credits, plan pro, speed 1" in err


def test_a_port_that_is_taken_is_a_sentence(served: Simulator, capsys: pytest.CaptureFixture[str]) -> None:
    port = os.environ["CONCEPTVIZ_BASE_URL"].split(":")[2].split("/")[0]
    assert main(["simulator", "--port", port]) == 1
    assert f"cannot listen on 127.0.0.1:{port}" in capsys.readouterr().err


def test_a_simulator_whose_reader_leaves_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    with no_reader() as stdout:
        process = start("simulator", "--port", "0", "--json", stdout=stdout)
        _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (141, "")
