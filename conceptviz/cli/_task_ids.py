"""Task ids on a command line: they may begin with a dash, as options do.

What lives here: telling the one from the other. What must never live here: a command.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from typer.core import TyperCommand

from .._spec import TASK_ID_CHARACTERS

# Seen in the field: ids have this length, and may begin with a dash.
_TASK_ID_LENGTH = 21


class TaskCommand(TyperCommand):
    """A command about a task, whose id may look like an option."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        options = [param for param in self.get_params(ctx) if param.param_type_name == "option"]
        flags = {name for option in options if getattr(option, "is_flag", False) for name in option.opts}
        valued = {name for option in options for name in option.opts} - flags
        return super().parse_args(ctx, set_id_apart(args, flags, valued))


def set_id_apart(args: list[str], flags: Collection[str], valued: Collection[str]) -> list[str]:
    """Move a task id that begins with a dash behind `--`, where it cannot be taken for an option.

    Args:
        args: The arguments of the command.
        flags: Its options without a value.
        valued: Its options with one.
    """
    found = None
    skip = False
    for place, arg in enumerate(args):
        if skip:
            skip = False
        elif not arg.startswith("-") or arg == "--":
            return args  # the id is given plainly
        elif arg in valued:
            skip = True
        elif arg not in flags and arg.partition("=")[0] not in valued:
            attached = arg[:2] in valued and len(arg) != _TASK_ID_LENGTH  # -oDIR
            if found is None and not attached and re.fullmatch(TASK_ID_CHARACTERS, arg):
                found = place
    return args if found is None else [*args[:found], *args[found + 1 :], "--", args[found]]
