"""The command line: `conceptviz generate "the water cycle"`.

    _app       the commands and their options
    _task_ids  ids that look like options
    _work      what they do: a client, a task, files, lines on stdout
    _journal   the commands about what is known of paid work
    _report    what is said meanwhile, on stderr
    _exits     the exit code of every error, and its sentence in a shell's words

What lives here, in this file: the entry point, which needs nothing but Python, so that it can say what is missing. What
must never live in this package: a decision about money or time, and anything that another program would want: it is
in the core.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence

from ._exits import INTERRUPTED, USAGE


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: The arguments after the program's name; None takes those of the process.

    Returns:
        The exit code, as `docs/reference/command-line.md` lists them.
    """
    missing = [name for name in ("typer", "rich") if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"The conceptviz command line needs {' and '.join(missing)}. Install it with "
            'pip install "conceptviz[cli]", or with the simulator too: pip install "conceptviz[all]"',
            file=sys.stderr,
        )
        return USAGE
    try:
        from ._app import run

        return run(argv)
    except KeyboardInterrupt:
        return INTERRUPTED
