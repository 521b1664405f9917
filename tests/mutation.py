"""Does a test fail when the code is wrong? Change the code a little, many times, and see.

    python tests/mutation.py conceptviz/_policy.py --sample 80 --seed 1 --json tests/faults/results/mutation.json

Each mutant is one small change to one module: a comparison turned round, a bound moved by one, a statement left out, a
member of an enum swapped. It is put into a private copy of the repository, and the tests that guard the module must
fail there. One that passes them all has survived: either a test is missing, or the change makes no difference; then the
result file says why, in the survivor's "equivalent", which later runs keep.

The tools of the trade know no statement left out, no lock not taken, no SQL and no enum, which is where a journal goes
wrong; mutmut leaves decorated functions alone, and each transaction here is one. What is not mutated: annotations,
docstrings, and the words of messages.
"""

from __future__ import annotations

import argparse
import ast
import copy
import json
import os
import queue
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conceptviz._attempts import AttemptState
from conceptviz._errors import Credits

ROOT = Path(__file__).resolve().parent.parent

# The tests that must notice a change of a module, the fastest and most likely first.
GUARDS = {
    "_policy": ["test_policy", "test_mutants"],
    "_config": ["test_config", "test_mutants"],
    "_refusals": ["test_refusals", "test_mutants", "test_error_codes", "test_wire"],
    "_wire": ["test_wire", "test_mutants", "test_refusals", "test_reference_examples", "test_error_codes"],
    "_calls": ["test_wire", "test_mutants", "test_reference_examples", "test_uploads"],
    "_budget": ["test_budget", "test_mutants"],
    "_attempts": ["test_journal", "test_mutants"],
    "_database": ["test_database", "test_mutants", "test_journal", "test_journal_processes"],
    "_journal": ["test_journal", "test_mutants", "test_submits"],
    "_submits": ["test_submits", "test_mutants", "test_cancellation", "test_client"],
    "_transport": [
        "test_transport",
        "test_first_byte",
        "test_mutants",
        "test_submits",
        "test_own_connections",
        "test_connections",
    ],
    "_connections": ["test_own_connections", "test_connections"],
    "_http1": ["test_http1", "test_own_connections"],
    "_httpcore": ["test_http1", "test_own_connections"],
    "_http": ["test_image_host", "test_transport", "test_downloads"],
    "_downloads": ["test_downloads", "test_image_host", "test_matrix"],
    "_exchange": ["test_exchange", "test_own_connections"],
    "_pace": ["test_pace"],
    "_schedule": ["test_schedule"],
    "_batches": ["test_batches", "test_fanout"],
    "_outcomes": ["test_fanout", "test_fanout_faults"],
    "_fanout": ["test_fanout", "test_fanout_faults"],
}

COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitOr: ast.BitAnd,
    ast.BitAnd: ast.BitOr,
}
FUNCTIONS = {"min": "max", "max": "min", "any": "all", "all": "any"}
SQL = {
    "DESC": "ASC",
    "IMMEDIATE": "DEFERRED",
    "EXTRA": "OFF",
    "WAL": "MEMORY",
    "COMMIT": "ROLLBACK",
    "AND": "OR",
    "IN": "NOT IN",
}
ENUMS = {enum.__name__: list(enum.__members__) for enum in (Credits, AttemptState)}
NOT_CODE = {"annotation", "returns", "decorator_list", "type_comment"}


@dataclass(frozen=True)
class Mutant:
    """One changed version of a module: what was changed, where, and the whole source."""

    name: str
    line: int
    source: str


def find_mutants(source: str) -> list[Mutant]:
    """Return every mutant of a module, in the order of its source."""
    tree = ast.parse(source)
    seen: Counter[str] = Counter()
    mutants = []
    for parent, field, index, scope in list(_places(tree, "")):
        holder = getattr(parent, field)
        node = holder if index is None else holder[index]
        for changed in _changes(node, parent):
            _put(parent, field, index, changed)
            ast.fix_missing_locations(tree)
            mutated = ast.unparse(tree)
            _put(parent, field, index, node)
            name = f"{scope or 'module'}: {_difference(ast.unparse(node), ast.unparse(changed))}"
            seen[name] += 1
            name += f" (again, {seen[name]})" if seen[name] > 1 else ""
            line = (node.target if isinstance(node, ast.comprehension) else node).lineno
            mutants.append(Mutant(name, line, mutated))
    return mutants


def _put(parent: ast.AST, field: str, index: int | None, node: ast.AST) -> None:
    if index is None:
        setattr(parent, field, node)
    else:
        getattr(parent, field)[index] = node


def _difference(before: str, after: str) -> str:
    """Say what was changed: of a long text only the first line that differs, around the change."""
    if after == "pass":
        return f"{_shortened(before.splitlines()[0])} -> pass"
    lines = zip(before.splitlines(), after.splitlines(), strict=False)
    old, new = next((pair for pair in lines if pair[0] != pair[1]), (before, after))
    same = next((n for n, pair in enumerate(zip(old, new, strict=False)) if pair[0] != pair[1]), 0)
    start = max(0, same - 60)
    return f"{_shortened(old[start:])} -> {_shortened(new[start:])}"


def _shortened(text: str) -> str:
    return text if len(text) <= 110 else text[:107] + "..."


def _places(node: ast.AST, scope: str) -> Iterator[tuple[ast.AST, str, int | None, str]]:
    """Yield where a node may be changed: its parent, the field that holds it, its index there, and the function."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        scope = f"{scope}.{node.name}".lstrip(".")
    for field, value in ast.iter_fields(node):
        if field in NOT_CODE:
            continue
        for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if isinstance(child, ast.AST) and not _is_left_alone(child):
                if isinstance(child, ast.stmt | ast.expr | ast.ExceptHandler | ast.comprehension):
                    yield node, field, index, scope
                yield from _places(child, scope)


def _is_left_alone(node: ast.AST) -> bool:
    """Say whether a node does nothing when the program runs, or could do harm outside of it if it did another thing."""
    # Docstrings; what type checkers and `*` read; a signal, and to whom.
    left_alone = ("if TYPE_CHECKING:", "T = TypeVar(", "__all__", "os.kill(")
    is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return is_docstring or (isinstance(node, ast.stmt) and ast.unparse(node).startswith(left_alone))


def _changes(node: Any, parent: ast.AST) -> Iterator[ast.AST]:
    """Yield the small mistakes that could have been made in place of a node."""
    match node:
        case ast.Compare():
            for n, op in enumerate(node.ops):
                for other in COMPARISONS[type(op)]:
                    yield _with(node, ops=[*node.ops[:n], other(), *node.ops[n + 1 :]])
        case ast.BoolOp():
            yield _with(node, op=ast.Or() if isinstance(node.op, ast.And) else ast.And())
            for left in _drop_each(node.values):
                yield left[0] if len(left) == 1 else _with(node, values=left)
        case ast.UnaryOp(op=ast.Not()):
            yield node.operand
        case ast.BinOp(op=op) if type(op) in ARITHMETIC and not _is_text(node.left) and not _is_text(node.right):
            yield _with(node, op=ARITHMETIC[type(op)]())
        case ast.Constant():
            yield from (_with(node, value=value) for value in _other_values(node.value, parent))
        case ast.Attribute(value=ast.Name(id=enum)) if node.attr in ENUMS.get(enum, ()):
            members = ENUMS[enum]
            yield _with(node, attr=members[(members.index(node.attr) + 1) % len(members)])
        case ast.Set() | ast.Tuple(ctx=ast.Load()) if all(map(_is_fixed, node.elts)):
            # `set()` has no display of its own.
            yield from (_with(node, elts=left) for left in _drop_each(node.elts) if left or isinstance(node, ast.Tuple))
        case ast.Call():
            if isinstance(node.func, ast.Name) and node.func.id in FUNCTIONS:
                yield _with(node, func=ast.Name(FUNCTIONS[node.func.id], ast.Load()))
            yield from (_with(node, keywords=left) for left in _drop_each(node.keywords))
        case ast.comprehension():
            yield from (_with(node, ifs=left) for left in _drop_each(node.ifs))
        case ast.If() | ast.IfExp():
            yield from (_with(node, test=ast.Constant(value)) for value in (True, False))
        case ast.With() | ast.AsyncWith() if all(item.optional_vars is None for item in node.items):
            yield ast.If(ast.Constant(True), node.body, [])
        case ast.ExceptHandler(type=ast.expr()):
            yield _with(node, type=ast.Tuple([], ast.Load()))
        case ast.Raise():
            yield ast.Pass()
            if isinstance(node.cause, ast.Constant):
                yield _with(node, cause=None)
        case ast.Return(value=ast.expr()) if not (isinstance(node.value, ast.Constant) and node.value.value is None):
            yield ast.Return(ast.Constant(None))
        case ast.Return() | ast.AugAssign() | ast.Delete() | ast.Continue() | ast.Break():
            yield ast.Pass()
        case ast.Expr(value=ast.Call() | ast.Await()):
            yield ast.Pass()
        case ast.Assign():
            # Without a plain name's first binding nothing would run at all.
            is_plain = isinstance(parent, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            if not (is_plain and isinstance(node.targets[0], ast.Name | ast.Tuple)):
                yield ast.Pass()


def _with(node: ast.AST, **fields: Any) -> ast.AST:
    changed = copy.copy(node)
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed


def _drop_each(nodes: list[Any]) -> Iterator[list[Any]]:
    return (nodes[:n] + nodes[n + 1 :] for n in range(len(nodes)))


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str | bytes))


def _is_fixed(node: ast.AST) -> bool:
    """Say whether an element is a constant, a class or a member of an enum, and not a value of the moment."""
    return isinstance(node, ast.Constant) or ast.unparse(node).rpartition(".")[2][:1].isupper()


def _other_values(value: object, parent: ast.AST) -> Iterator[object]:
    match value:
        case bool():
            yield not value
        case int() | float():
            yield value + 1
            yield value - 1
        case str():
            for word, other in SQL.items():
                if re.search(rf"\b{word}\b", value):
                    yield re.sub(rf"\b{word}\b", other, value)
            if value and not re.search(r"\s", value) and not isinstance(parent, ast.JoinedStr):
                yield value + "~"
        case bytes() if value.strip():
            yield value + b"~"


class Copy:
    """A private copy of the repository, in which one module is changed again and again."""

    def __init__(self, root: Path, module: Path, guards: list[str]) -> None:
        self._root = root
        self._module = root / module
        self._guards = guards
        ignored = shutil.ignore_patterns("__pycache__", ".*")
        for name in ("conceptviz", "tests", "docs"):
            shutil.copytree(ROOT / name, root / name, ignore=ignored)
        for name in ("pyproject.toml", "README.md"):
            shutil.copy(ROOT / name, root / name)

    def warm_up(self) -> float:
        """Run the tests on the unchanged module, and return the seconds they take."""
        where = [sys.executable, "-c", "import conceptviz; print(conceptviz.__file__)"]
        found = subprocess.check_output(where, cwd=self._root, env=self._environment(), text=True)
        assert Path(found.strip()).is_relative_to(self._root), f"the copy is not what is imported, but {found}"
        self._run(300.0)  # so that only what is changed is compiled again
        self._forget_compiled()
        start = time.monotonic()
        code, output = self._run(300.0)
        if code != 0:
            sys.exit(f"The tests fail without any change:\n{output}")
        return time.monotonic() - start

    def judge(self, mutant: Mutant, limit: float) -> str:
        """Return "killed", "survived", or "timeout", which is a kind of death."""
        self._module.write_text(mutant.source)
        self._forget_compiled()
        code, output = self._run(limit)
        if code is None:
            return "timeout"
        assert code != 5, output  # pytest's word for no tests at all; below 0 it died of a signal
        return "killed" if code else "survived"

    def _forget_compiled(self) -> None:
        # A change may leave the size as it was, and the time too within its resolution of a second.
        for stale in self._module.parent.glob(f"__pycache__/{self._module.stem}.*"):
            stale.unlink()

    def _run(self, limit: float) -> tuple[int | None, str]:
        options = ["-x", "-q", "-n0", "--timeout=20", "--hypothesis-profile=ci", "--tb=line"]
        plugins = ["-p", "no:cacheprovider", "-p", "no:randomly"]
        process = subprocess.Popen(
            ["nice", "-n", "10", sys.executable, "-m", "pytest", *options, *plugins, *self._guards],
            cwd=self._root,
            env=self._environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return None, ""
        return process.returncode, output

    def _environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        return {**kept, "PYTHONPATH": str(self._root), "TMPDIR": str(self._root)}


def judge_all(module: Path, mutants: list[Mutant], processes: int) -> dict[str, str]:
    """Return what became of each mutant, by its name."""
    guards = [path for name in GUARDS[module.stem] if (ROOT / (path := f"tests/{name}.py")).exists()]
    verdicts = {}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(processes) as pool:
        copies: queue.SimpleQueue[Copy] = queue.SimpleQueue()
        made = [Copy(Path(folder, str(n)), module, guards) for n in range(processes)]
        limit = max(pool.map(Copy.warm_up, made)) * 3 + 20
        for one in made:
            copies.put(one)

        def judge(mutant: Mutant) -> tuple[Mutant, str]:
            own = copies.get()
            try:
                return mutant, own.judge(mutant, limit)
            finally:
                copies.put(own)

        for mutant, verdict in pool.map(judge, mutants):
            verdicts[mutant.name] = verdict
            if verdict != "killed":
                print(f"{verdict}: {module}:{mutant.line}: {mutant.name}", flush=True)
    return verdicts


def main() -> None:
    parser = argparse.ArgumentParser(description="Change a module a little, many times, and see whether tests fail.")
    parser.add_argument("modules", nargs="+", type=Path, help="such as conceptviz/_policy.py")
    parser.add_argument("--sample", type=int, default=0, help="how many mutants of each module; 0: all of them")
    parser.add_argument("--seed", type=int, default=1, help="which ones")
    parser.add_argument("--within", default="", help="only in what this pattern finds, such as '_exchange|_answer'")
    parser.add_argument("--survivors", action="store_true", help="only those that survived, by the file of --json")
    parser.add_argument("--json", type=Path, help="where the results go, beside those of other modules")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--list", action="store_true", help="only print the mutants")
    options = parser.parse_args()
    results = json.loads(options.json.read_text()) if options.json and options.json.exists() else {}
    for module in options.modules:
        found = [
            m for m in find_mutants((ROOT / module).read_text()) if re.search(options.within, m.name.split(":")[0])
        ]
        before = results.get(module.as_posix(), {})
        known = {one["mutant"]: one["equivalent"] for one in before.get("survivors", [])}
        if options.survivors:
            chosen = [m for m in found if m.name in known]
            if len(chosen) != len(known):
                sys.exit(f"{module} has changed since its results were written: run it anew, without --survivors.")
        else:
            chosen = random.Random(options.seed).sample(found, min(options.sample or len(found), len(found)))
            chosen.sort(key=found.index)
        if options.list:
            print(*(f"{module}:{m.line}: {m.name}" for m in chosen), sep="\n")
            continue
        verdicts = judge_all(module, chosen, options.processes)
        survivors = [m for m in chosen if verdicts[m.name] == "survived"]
        mutants = before["mutants"] if options.survivors else len(chosen)
        equivalent = sum(known.get(m.name) is not None for m in survivors)
        results[module.as_posix()] = {
            "possible": len(found),
            "mutants": mutants,
            "killed": mutants - len(survivors),
            "survived": len(survivors),
            "equivalent": equivalent,
            "score": round((mutants - len(survivors)) / (mutants or 1), 3),
            "score_without_equivalent": round((mutants - len(survivors)) / ((mutants - equivalent) or 1), 3),
            "seed": before["seed"] if options.survivors else options.seed,
            "within": before["within"] if options.survivors else options.within,
            "survivors": [{"mutant": m.name, "line": m.line, "equivalent": known.get(m.name)} for m in survivors],
        }
        summary = {key: value for key, value in results[module.as_posix()].items() if key != "survivors"}
        print(module, json.dumps(summary), flush=True)
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
