"""The command line's journal: where it is, what it says, and what can be done about what it says."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import sqlite3
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from cli_helpers import advised, move_in, reach, start, wait_for_submit

from conceptviz import AttemptState, Journal, JournalEntry, JournalError
from conceptviz.cli import main
from conceptviz.cli._work import journal_file
from conceptviz.simulator import Simulator, render_tiny

Capture = pytest.CaptureFixture[str]
RUNNING = {"status": "processing"}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return move_in(tmp_path, monkeypatch)


@pytest.fixture
def service(home: Path, monkeypatch: pytest.MonkeyPatch) -> Simulator:
    return reach(Simulator(speed=400, seed=5, render=render_tiny), monkeypatch)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[Simulator]:
    """A simulator on a port, for commands in a process of their own."""
    simulator = Simulator(speed=40, render=render_tiny)
    with simulator.serve() as base_url:
        monkeypatch.setenv("CONCEPTVIZ_BASE_URL", base_url)
        monkeypatch.setenv("CONCEPTVIZ_API_KEY", simulator.api_key)
        yield simulator


def written(path: Path | None = None) -> list[JournalEntry]:
    """All that the journal holds."""
    with Journal(path or journal_file(None)) as journal:
        return journal.entries()


def lose_an_answer(service: Simulator, capsys: Capture, *args: str, accept: bool = True) -> str:
    """Have a submit sent and its answer lost; return the attempt's id."""
    service.faults.add("submit", close=True, accept=accept)
    assert main(["generate", *(args or ("a lost one",))]) == 4
    capsys.readouterr()
    return written()[-1].id


def leave(service: Simulator, capsys: Capture, *prompts: str) -> list[str]:
    """Have tasks paid for and not waited for; return their ids."""
    service.faults.add("poll", body=RUNNING, times=None)
    for prompt in prompts:
        assert main(["generate", prompt, "--timeout", "0.01"]) == 8
    service.faults.clear()
    capsys.readouterr()
    return [entry.task_id or "" for entry in written()[-len(prompts) :]]


def test_what_is_paid_for_is_in_the_user_s_state_folder(service: Simulator, home: Path, capsys: Capture) -> None:
    """Readable by the owner alone, from the folder on; and nothing of the API key is in it."""
    assert main(["generate", "the water cycle"]) == 0
    path = home / "state" / "conceptviz" / "journal.sqlite3"
    (entry,) = written(path)
    assert (entry.state, entry.prompts, entry.credits_used) == (AttemptState.COMPLETED, ("the water cycle",), 2)
    assert (path.parent.stat().st_mode & 0o777, path.stat().st_mode & 0o777) == (0o700, 0o600)
    assert service.api_key[4:].encode() not in path.read_bytes()


def test_an_edit_is_written_down_too(service: Simulator) -> None:
    assert main(["edit", "make it blue", "https://example.com/a.png", "--key", "blue"]) == 0
    (entry,) = written()
    assert (entry.endpoint, entry.key, entry.state) == ("/edit", "blue", AttemptState.COMPLETED)


@pytest.mark.parametrize(
    ("platform", "name", "variables", "expected"),
    [
        ("linux", "posix", {}, "home/.local/state"),
        ("linux", "posix", {"XDG_STATE_HOME": "relative"}, "home/.local/state"),  # which XDG says to pass over
        ("darwin", "posix", {}, "home/Library/Application Support"),
        ("win32", "nt", {"LOCALAPPDATA": "{tmp}/local"}, "local"),
        ("win32", "nt", {}, "home/AppData/Local"),
        ("darwin", "posix", {"XDG_STATE_HOME": "{tmp}/xdg"}, "xdg"),
    ],
)
def test_the_state_folder_is_the_platform_s(
    platform: str,
    name: str,
    variables: dict[str, str],
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("XDG_STATE_HOME")
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value.format(tmp=tmp_path))
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    monkeypatch.setattr(sys, "platform", platform)
    with monkeypatch.context() as patch:
        patch.setattr("conceptviz.cli._work.os.name", name)
        # Path makes the flavour of os.name, and only one of them can be made here.
        patch.setattr("conceptviz.cli._work.Path", type(tmp_path))
        found = journal_file(None)
    assert found == tmp_path / expected / "conceptviz" / "journal.sqlite3"
    assert not found.parent.exists()  # to ask where it is does not make it


def test_the_option_wins_over_the_variable_and_both_over_the_usual_place(
    service: Simulator, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONCEPTVIZ_JOURNAL", "of-the-variable.sqlite3")
    assert main(["generate", "x"]) == 0
    assert main(["generate", "y", "--journal", "of the option.sqlite3"]) == 0
    assert [entry.prompts for entry in written(home / "of-the-variable.sqlite3")] == [("x",)]
    assert [entry.prompts for entry in written(home / "of the option.sqlite3")] == [("y",)]
    assert not (home / "state").exists()


def test_a_simulation_is_not_written_down(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not paid for; the same command with --simulate can be tried before it is meant."""
    monkeypatch.setattr("conceptviz.cli._work.SIMULATED_SPEED", 400)
    assert main(["generate", "x", "--simulate", "--key", "k", "--journal", "j.sqlite3", "--budget", "2"]) == 0
    assert main(["generate", "x", "--simulate", "--budget", "1"]) == 11
    assert {path.name for path in home.iterdir()} == {"diagrams"}


def test_without_a_journal_nothing_is_written(service: Simulator, home: Path, capsys: Capture) -> None:
    """And to look for what is known makes no journal either."""
    assert main(["generate", "x", "--no-journal"]) == 0
    task_id = Path(capsys.readouterr().out.splitlines()[0]).stem[:-2]
    assert main(["wait", task_id]) == 0
    for command in (["list"], ["list", "--json"], ["resume"], ["prune", "--older-than", "1"]):
        capsys.readouterr()
        assert main(["journal", *command]) == 0
        out, err = capsys.readouterr()
        assert out == ""
        assert "There is no journal at " in err
    assert main(["journal", "resolve", "abc"]) == 2
    assert "There is no journal at " in capsys.readouterr().err
    assert {path.name for path in home.iterdir()} == {"diagrams"}


def make_a_folder(path: Path) -> None:
    path.mkdir()


def make_text(path: Path) -> None:
    path.touch(0o600)
    path.write_text("A shopping list, long enough to be told from the head of a database file." * 10)


def make_readable_by_all(path: Path) -> None:
    Journal(path).close()
    path.chmod(0o644)


def make_of_a_later_version(path: Path) -> None:
    Journal(path).close()
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA user_version = 99")


@pytest.mark.parametrize("spoil", [make_a_folder, make_text, make_readable_by_all, make_of_a_later_version])
def test_without_a_usable_journal_nothing_is_sent(
    spoil: Callable[[Path], None], service: Simulator, home: Path, capsys: Capture
) -> None:
    """--no-journal is named as the way out; and what costs nothing goes on without."""
    journal = home / "spoilt"
    spoil(journal)
    assert main(["generate", "x", "--journal", "spoilt"]) == 12
    out, err = capsys.readouterr()
    assert out == ""
    assert re.match(r"Error: .*spoilt.*\nNothing was sent\. .*--no-journal\.\n$", err)
    assert not service.requests
    assert main(["journal", "list", "--journal", "spoilt"]) == 12
    assert "--no-journal" not in capsys.readouterr().err
    assert main(["generate", "x", "--no-journal"]) == 0
    task_id = Path(capsys.readouterr().out).stem[:-2]
    assert main(["wait", task_id, "--journal", "spoilt"]) == 0
    assert "Warning: " in capsys.readouterr().err


def test_a_named_journal_is_not_begun_where_its_folder_is_missing(service: Simulator, home: Path) -> None:
    """It may be on a disk that is not there, and know what is paid for."""
    assert main(["generate", "x", "--journal", "disk/journal.sqlite3"]) == 12
    assert not (home / "disk").exists()
    assert not service.requests


@pytest.mark.parametrize("problem", ["a file in the way", "no home"])
def test_a_state_folder_that_cannot_be_made_is_a_sentence(
    problem: str, service: Simulator, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    if problem == "no home":

        def no_home() -> Path:
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.delenv("XDG_STATE_HOME")
        monkeypatch.setattr(Path, "home", no_home)
        monkeypatch.setattr(sys, "platform", "linux")
    else:
        (home / "state").write_text("taken")
    assert main(["generate", "x"]) == 12
    assert "Error: The journal's folder cannot be made: " in capsys.readouterr().err
    assert not service.requests


def test_a_journal_that_fails_before_the_first_byte_sends_nothing(
    service: Simulator, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def full_disk(*_: object) -> None:
        raise JournalError("The disk is full.")

    monkeypatch.setattr(Journal, "sending", full_disk)
    assert main(["generate", "x"]) == 12
    assert capsys.readouterr().err == "Error: The disk is full.\nNothing was sent.\n"  # to go without it is not advised
    assert not service.requests


def test_a_journal_that_fails_after_the_answer_names_the_task(
    service: Simulator, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """The id is on stderr and in the command that takes the task up; it is said once that it could not be written."""

    def full_disk(*_: object) -> None:
        raise JournalError("The disk is full.")

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "accepted", full_disk)
        assert main(["generate", "x"]) == 12
    err = capsys.readouterr().err
    assert "is paid for, but could not be written down: The disk is full. Keep the id.\n" in err
    assert err.count("The disk is full") == 1
    assert "Nothing was sent" not in err
    command = advised(err)
    assert command[0] == "wait"
    assert main(command) == 0
    assert service.ledger.submissions == 1


def test_one_key_is_paid_for_once(service: Simulator, capsys: Capture) -> None:
    """The second run prints what the first one printed, and says that nothing was spent."""
    assert main(["generate", "the water cycle", "--key", "fig-1", "--json"]) == 0
    first, err = capsys.readouterr()
    assert "nothing is spent" not in err
    assert main(["generate", "the water cycle", "--key", "fig-1", "--json", "--budget", "0"]) == 0
    second, err = capsys.readouterr()
    assert second == first
    assert (
        err == f"Task {json.loads(first)['task_id']} was paid for by an earlier submit of this key: nothing is spent.\n"
    )
    assert main(["generate", "the water cycle", "--key", "fig-2"]) == 0
    assert service.ledger.submissions == 2


def test_one_key_is_one_piece_of_work(service: Simulator, capsys: Capture) -> None:
    assert main(["generate", "the water cycle", "--key", "fig-1"]) == 0
    capsys.readouterr()
    assert main(["generate", "the rock cycle", "--key", "fig-1"]) == 2
    assert "a key names one piece of work" in capsys.readouterr().err
    assert service.ledger.submissions == 1


def test_a_second_run_waits_for_what_the_first_one_left(service: Simulator, capsys: Capture) -> None:
    service.faults.add("poll", body=RUNNING, times=None)
    assert main(["generate", "x", "--key", "k", "--timeout", "0.01"]) == 8
    service.faults.clear()
    capsys.readouterr()
    assert main(["generate", "x", "--key", "k"]) == 0
    assert Path(capsys.readouterr().out.strip()).is_file()
    assert service.ledger.submissions == 1


def test_a_failed_task_of_a_key_is_told_again_unless_it_was_refunded(service: Simulator, capsys: Capture) -> None:
    body = {"status": "failed", "error": "No luck", "code": "GENERATION_FAILED", "credits_refunded": False}
    service.faults.add("poll", body=body)
    assert main(["generate", "x", "--key", "k"]) == 7
    assert main(["generate", "x", "--key", "k"]) == 7
    assert "No luck" in capsys.readouterr().err
    assert service.ledger.submissions == 1
    for _ in range(2):
        assert main(["generate", "[sim:failed]", "--key", "refunded"]) == 7
    assert service.ledger.submissions == 3


def test_a_budget_is_for_one_command(service: Simulator, capsys: Capture) -> None:
    assert main(["generate", "x", "y", "--budget", "3"]) == 11
    assert "This request costs 4 credits, and 3 of the budget of 3 remain" in capsys.readouterr().err
    assert not service.requests
    assert written() == []  # what is refused for its price leaves nothing behind
    assert main(["generate", "x", "y", "--budget", "4"]) == 0
    assert main(["generate", "x", "--no-journal", "--budget", "2"]) == 0


def test_an_unknown_attempt_is_told_with_what_to_do(service: Simulator, capsys: Capture) -> None:
    """By the submit that lost its answer, by the next one of its key, and by the list: the advice can be followed."""
    service.faults.add("submit", close=True, accept=True)
    attempt = ""
    for _ in range(2):
        assert main(["generate", "a lost one", "--key", "k", "--journal", "my journal"]) == 4
        err = capsys.readouterr().err
        (entry,) = written(Path("my journal"))
        attempt = entry.id
        assert advised(err) == ["journal", "resolve", attempt, "--journal", "my journal"]
    assert main(["journal", "list", "--journal", "my journal"]) == 0
    assert advised(capsys.readouterr().err) == ["journal", "resolve", attempt, "--journal", "my journal"]
    assert service.ledger.submissions == 1


def test_the_list_is_lines_when_piped(service: Simulator, capsys: Capture) -> None:
    """One line each, whatever prompts and keys hold; what has ended only if it is asked for."""
    assert main(["generate", "done\tand\ndone", "x", "--key", "a\tkey\x1b[2J"]) == 0
    (paid,) = leave(service, capsys, "paid")
    attempt = lose_an_answer(service, capsys)
    capsys.readouterr()
    assert main(["journal", "list"]) == 0
    out, err = capsys.readouterr()
    accepted, unknown = (line.split("\t") for line in out.splitlines())
    assert accepted[1:4] == ["accepted", paid, "2"]
    assert (unknown[0], unknown[1:4]) == (attempt, ["unknown", "-", "2?"])
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", unknown[4])
    assert unknown[5:] == ["-", "a lost one"]
    assert "1 attempt may have been charged" in err
    assert "1 task paid for and not ended" in err
    assert "  conceptviz journal resume\n" in err
    assert main(["journal", "list", "--all"]) == 0
    done, *others = (line.split("\t") for line in capsys.readouterr().out.splitlines())
    assert others == [accepted, unknown]
    assert done[5:] == ["a key\N{REPLACEMENT CHARACTER}[2J", "done and done | x"]


def test_the_list_as_json_is_all_there_is_to_know(service: Simulator, capsys: Capture) -> None:
    args = ["generate", "x", "y", "--model", "cv-1", "--quality", "4k", "--aspect-ratio", "1:1", "--key", "k"]
    assert main(args) == 0
    capsys.readouterr()
    assert main(["journal", "list", "--json"]) == 0
    assert capsys.readouterr() == ("", "Nothing is unfinished.\n")
    assert main(["journal", "list", "--json", "--all"]) == 0
    found = json.loads(capsys.readouterr().out)
    (entry,) = written()
    assert found.pop("created_at") <= found.pop("updated_at")
    assert found == {
        "attempt": entry.id,
        "state": "completed",
        "key": "k",
        "task_id": entry.task_id,
        "prompts": ["x", "y"],
        "endpoint": "/generate",
        "base_url": "https://conceptviz.app/api/v1",
        "account": entry.account,
        "model": "cv-1",
        "quality": "4k",
        "aspect_ratio": "1:1",
        "expected_credits": 4,
        "credits_used": 4,
        "credits_remaining": 96,
        "credits_refunded": None,
        "error": None,
    }


@pytest.mark.parametrize(
    ("prompt", "state", "credits"),
    [
        ("[sim:blocked]", "rejected", "0"),
        ("[sim:failed]", "failed", "0"),
        ("[sim:server-error]", "failed", "2?"),
        ("x", "completed", "2"),
    ],
)
def test_the_list_says_what_each_has_cost(
    prompt: str, state: str, credits: str, service: Simulator, capsys: Capture
) -> None:
    main(["generate", prompt])
    capsys.readouterr()
    assert main(["journal", "list", "--all"]) == 0
    fields = capsys.readouterr().out.split("\t")
    assert (fields[1], fields[3]) == (state, credits)


def test_a_price_that_nobody_knows_is_a_question_mark(service: Simulator, capsys: Capture) -> None:
    lose_an_answer(service, capsys, "x", "--model", "cv-9")
    assert main(["journal", "list"]) == 0
    assert capsys.readouterr().out.split("\t")[3] == "?"
    assert main(["journal", "resolve", written()[0].id]) == 2
    assert "It costs" not in capsys.readouterr().err


class Terminal(io.StringIO):
    """A stdout that somebody looks at."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def test_the_list_is_a_table_on_a_terminal(served: Simulator, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    """Of a usual width: no id is cut short, and what was sent elsewhere than to the service says so."""
    with Journal(journal_file(None, make_folder=True)) as journal:
        for key, base_url in (("fig-1", os.environ["CONCEPTVIZ_BASE_URL"]), (None, "https://conceptviz.app/api/v1")):
            claim = journal.claim(
                key=key,
                fingerprint="",
                account="",
                base_url=base_url,
                endpoint="/generate",
                prompts=["the \x1b[2Jwater cycle, and a good deal more than fits into a line of it", "a [b] c"],
                settings={},
                expected_credits=2,
                seconds=60,
            )
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "dumb")
    assert main(["journal", "list"]) == 0
    seen = terminal.getvalue()
    assert max(map(len, seen.splitlines())) <= 80
    assert claim.entry.id in seen
    assert "intent" in seen
    assert "key fig-1" in seen
    assert "a [b] c" in seen  # no markup is read into it
    assert seen.count("at 127.0.0.1:") == 1
    assert "conceptviz.app" not in seen
    assert "\x1b[2J" not in seen


def test_resume_saves_what_is_paid_for(service: Simulator, capsys: Capture) -> None:
    tasks = leave(service, capsys, "one", "two")
    assert main(["journal", "resume", "-o", "out"]) == 0
    out, err = capsys.readouterr()
    assert [Path(line).stem[:-2] for line in out.splitlines()] == tasks
    assert all(Path(line).is_file() for line in out.splitlines())
    assert err.startswith("2 tasks of this account paid for and not ended.\n")
    assert main(["journal", "list"]) == 0
    assert capsys.readouterr() == ("", "Nothing is unfinished.\n")
    assert main(["journal", "resume"]) == 0
    assert capsys.readouterr() == ("", "0 tasks of this account paid for and not ended.\n")
    assert service.ledger.submissions == 2


def test_resume_as_json(service: Simulator, capsys: Capture) -> None:
    (task_id,) = leave(service, capsys, "one")
    assert main(["journal", "resume", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["task_id"], found["prompt"], found["index"]) == (task_id, "one", 0)
    assert found["credits_used"] == 2  # the journal keeps the receipt


def test_resume_goes_on_past_failures_and_ends_as_the_worst(service: Simulator, capsys: Capture) -> None:
    """One that is late, one whose image is lost, one that is short of an image, one that is well."""
    late, lost, _, _ = leave(service, capsys, "late", "lost", "short [sim:partial]", "well")
    service.faults.add("poll", body=RUNNING, containing=late, times=None)
    service.faults.add("image", status=500, containing=lost, times=None)
    assert main(["journal", "resume", "--timeout", "0.2"]) == 9
    out, err = capsys.readouterr()
    assert len(out.splitlines()) >= 1
    for task_id in (late, lost):
        assert f"  conceptviz wait {task_id} -o diagrams\n" in err
    assert [entry.task_id for entry in written() if entry.state is AttemptState.ACCEPTED] == [late]


def test_a_shortfall_is_less_than_a_failure(service: Simulator, capsys: Capture) -> None:
    service.faults.add("poll", body=RUNNING, times=None)
    assert main(["generate", "x", "short [sim:partial]", "--timeout", "0.01"]) == 8
    assert main(["generate", "[sim:failed]", "--timeout", "0.01"]) == 8
    service.faults.clear()
    assert main(["journal", "resume"]) == 7
    capsys.readouterr()
    service.faults.add("poll", body=RUNNING, times=None)
    assert main(["generate", "x", "short [sim:partial]", "--timeout", "0.01"]) == 8
    service.faults.clear()
    assert main(["journal", "resume"]) == 10


def test_resume_does_not_ask_for_each_task_with_a_key_that_is_refused(service: Simulator, capsys: Capture) -> None:
    leave(service, capsys, "one", "two")
    service.faults.add("poll", status=401, body={"error": "Disabled", "code": "INVALID_API_KEY"}, times=None)
    looks = service.requests["poll"]
    assert main(["journal", "resume"]) == 24
    assert service.requests["poll"] == looks + 1
    assert len([entry for entry in written() if entry.state is AttemptState.ACCEPTED]) == 2


def test_resume_leaves_other_accounts_alone(
    service: Simulator, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    leave(service, capsys, "one")
    reach(service, monkeypatch, api_key=service.add_account().api_key)
    assert main(["journal", "resume"]) == 0
    assert "0 tasks of this account" in capsys.readouterr().err


def test_wait_tells_the_journal(service: Simulator, capsys: Capture) -> None:
    (task_id,) = leave(service, capsys, "one")
    assert main(["wait", task_id]) == 0
    (entry,) = written()
    assert entry.state is AttemptState.COMPLETED


def test_resolve_says_what_to_compare_first(service: Simulator, capsys: Capture) -> None:
    """Before and after the next receipt; and it changes nothing."""
    attempt = lose_an_answer(service, capsys, "first of all", "--key", "k")
    assert main(["journal", "resolve", attempt]) == 2
    err = capsys.readouterr().err
    assert "left" not in err  # no receipt yet
    assert "It costs 2 credits if it was." in err
    assert "  key: k\n  prompt: first of all\n  why: The submit was sent, but " in err
    main(["generate", "w"])
    main(["generate", "x"])
    lost = lose_an_answer(service, capsys)
    assert main(["journal", "resolve", lost]) == 2
    assert re.search(
        r"The last receipt before it \(.*\) left 94 credits: are there fewer now\?", capsys.readouterr().err
    )
    main(["generate", "z"])
    capsys.readouterr()
    assert main(["journal", "resolve", lost]) == 2
    err = capsys.readouterr().err
    assert re.search(r"left 94 credits; the next one after it used 2 and left 90\. That makes 2 in between", err)
    assert f"  conceptviz journal resolve {lost} --task-id ID\n" in err
    assert f"  conceptviz journal resolve {lost} --retry\n" in err
    assert [entry.state for entry in written() if entry.id == lost] == [AttemptState.UNKNOWN]


def test_resolve_takes_the_task_up(service: Simulator, capsys: Capture) -> None:
    """The attempt was accepted, its answer did not say so, and somebody has found out its task."""
    found: list[str] = []

    def hide(answer: dict[str, str]) -> dict[str, str]:
        found.append(answer["taskId"])
        return {}

    service.faults.add("submit", alter=hide)
    assert main(["generate", "x", "--key", "k"]) == 4
    attempt = written()[0].id
    assert main(["journal", "resolve", attempt, "--task-id", *found]) == 0
    err = capsys.readouterr().err
    assert f"Attempt {attempt} is task {found[0]}." in err
    assert advised(err) == ["journal", "resume"]
    assert main(["journal", "resume"]) == 0
    path = capsys.readouterr().out
    assert main(["generate", "x", "--key", "k"]) == 0
    assert capsys.readouterr().out == path
    assert service.ledger.submissions == 1


def test_resolve_frees_the_key(service: Simulator, capsys: Capture) -> None:
    attempt = lose_an_answer(service, capsys, "x", "--key", "k", accept=False)
    assert main(["journal", "resolve", attempt, "--retry"]) == 0
    assert "is given up. The key 'k' may be submitted again, and is paid for then." in capsys.readouterr().err
    assert main(["generate", "x", "--key", "k"]) == 0
    assert service.ledger.submissions == 1


def test_resolve_refuses_what_it_must_not_change(
    service: Simulator, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    main(["generate", "done"])
    lost = lose_an_answer(service, capsys)
    (done, unknown) = written()
    assert done.task_id is not None
    refused = {
        (done.id, "--retry"): "is completed, and only an unknown one can be resolved",
        (done.id,): "is completed, and only an unknown one can be resolved",
        ("nonsense", "--retry"): "has no attempt 'nonsense'",
        (lost, "--task-id", done.task_id): f"is that of attempt {done.id}",
        (lost, "--task-id", "-no-such-task"): "This account has no task -no-such-task.",
        (lost, "--task-id", "a/b"): "is not a task id",
    }
    for args, sentence in refused.items():
        assert main(["journal", "resolve", *args]) == 2
        assert sentence in capsys.readouterr().err
    looks = service.requests["poll"]
    monkeypatch.setenv("CONCEPTVIZ_BASE_URL", "https://example.com/api/v1")
    assert main(["journal", "resolve", lost, "--task-id", "abc"]) == 2
    assert "set CONCEPTVIZ_BASE_URL" in capsys.readouterr().err
    assert service.requests["poll"] == looks
    assert written() == [done, unknown]


def test_resolve_gives_a_task_up_that_the_service_no_longer_knows(service: Simulator, capsys: Capture) -> None:
    """Only with a word of its own, and never without saying what it costs."""
    service.faults.add("poll", body=RUNNING, times=None)
    assert main(["generate", "x", "--key", "k", "--timeout", "0.01"]) == 8
    service.faults.clear()
    (lost,) = written()
    unknown = {"error": "Task not found", "code": "TASK_NOT_FOUND"}
    service.faults.add("poll", status=404, body=unknown, times=None)
    capsys.readouterr()
    assert main(["journal", "resume"]) == 28
    words = advised(capsys.readouterr().err)
    assert words == ["journal", "resolve", lost.id]
    assert main(words) == 2
    err = capsys.readouterr().err
    assert f"task {lost.task_id} is paid for (2 credits)." in err
    assert "what it cost is lost, and its key is free." in err
    assert f"  conceptviz journal resolve {lost.id} --give-up\n" in err
    for other in (["--retry"], ["--task-id", "abc"]):
        assert main([*words, *other]) == 2
        assert "only --give-up gives it up. Nothing was changed." in capsys.readouterr().err
    assert written() == [lost]
    assert main([*words, "--give-up"]) == 0
    err = capsys.readouterr().err
    assert (
        f"Task {lost.task_id} is given up: it is not taken up any more, and the 2 credits that it cost are not" in err
    )
    assert "The key 'k' may be submitted again, and is paid for then." in err
    assert [(entry.state, entry.task_id) for entry in written()] == [(AttemptState.ABANDONED, lost.task_id)]
    service.faults.clear()
    assert main(["journal", "resume"]) == 0
    assert "0 tasks of this account" in capsys.readouterr().err
    assert main(["generate", "x", "--key", "k"]) == 0
    assert service.ledger.submissions == 2


def test_resolve_takes_up_or_gives_up(service: Simulator, capsys: Capture) -> None:
    attempt = lose_an_answer(service, capsys)
    assert main(["journal", "resolve", attempt, "--task-id", "abc", "--give-up"]) == 2
    assert "choose one" in capsys.readouterr().err
    assert main(["journal", "resolve", attempt, "--give-up"]) == 0
    assert "is given up. What is submitted again is paid for again." in capsys.readouterr().err


def test_prune_forgets_what_has_ended(service: Simulator, capsys: Capture) -> None:
    main(["generate", "done", "--key", "k"])
    leave(service, capsys, "paid")
    lose_an_answer(service, capsys)
    assert main(["journal", "prune", "--older-than", "0.0005"]) == 0  # 43 s
    assert capsys.readouterr() == ("", "0 attempts forgotten.\n")
    assert main(["journal", "prune", "--older-than", "0"]) == 0
    assert capsys.readouterr() == ("", "1 attempt forgotten.\n")
    assert [entry.state for entry in written()] == [AttemptState.ACCEPTED, AttemptState.UNKNOWN]
    assert main(["journal", "list", "--all"]) == 0


def test_the_list_of_an_empty_journal(service: Simulator, capsys: Capture) -> None:
    Journal(journal_file(None, make_folder=True)).close()
    assert main(["journal", "list", "--all"]) == 0
    assert capsys.readouterr() == ("", "Nothing has been written down yet.\n")


@pytest.mark.parametrize("end", ["twice interrupted", "killed"])
def test_what_a_dead_command_left_is_unknown(end: str, served: Simulator, capsys: Capture) -> None:
    """The journal says what is known of a submit that nobody waited for, and it is not sent again."""
    served.faults.add("submit", delay=25.0, accept=True)
    process = start("generate", "x", "--key", "k")
    assert process.stderr is not None
    wait_for_submit(served)
    if end == "killed":
        process.kill()
    else:
        process.send_signal(signal.SIGINT)
        assert process.stderr.readline().startswith("Waiting for the answer")
        process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=9)
    assert main(["journal", "list"] if end == "killed" else advised(err)) == 0
    out, err = capsys.readouterr()
    assert out.split("\t")[1] == "unknown"
    assert main(["generate", "x", "--key", "k"]) == 4
    assert advised(capsys.readouterr().err) == advised(err)
    assert served.ledger.submissions == 1
