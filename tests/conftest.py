"""What every test shares: both async backends, and an environment like a newcomer's."""

import gc
import os
import signal
import sys
from contextlib import suppress

import hypothesis
import pytest

# Some machines set it, and unbuffered output hides what a full disk or a reader who leaves does to buffered output.
os.environ.pop("PYTHONUNBUFFERED", None)
# Some machines set this too, and then each worker compiles every test anew, for three seconds of its time.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
# A shell that starts the tests in the background has them, and the programs they start, ignore Ctrl-C.
with suppress(ValueError):  # not in the main thread, where no signal arrives
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    """Run each async test on asyncio and on trio."""
    return str(request.param)


def pytest_collection_finish() -> None:
    """Let each collection of garbage pass over what the suite has loaded, which takes it 0.1 s."""
    # On its arrival it counts who refers to trio's randomness, and nobody who is frozen is counted.
    assert hypothesis
    gc.collect()
    gc.freeze()
