"""What every test shares: both async backends, and an environment like a newcomer's."""

import os
import signal
from contextlib import suppress

import pytest

# Some machines set it, and unbuffered output hides what a full disk or a reader who leaves does to buffered output.
os.environ.pop("PYTHONUNBUFFERED", None)
# A shell that starts the tests in the background has them, and the programs they start, ignore Ctrl-C.
with suppress(ValueError):  # not in the main thread, where no signal arrives
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    """Run each async test on asyncio and on trio."""
    return str(request.param)
