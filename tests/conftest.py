"""What every test shares: both async backends, and an environment like a newcomer's."""

import os

import pytest

# Some machines set it, and unbuffered output hides what a full disk or a reader who leaves does to buffered output.
os.environ.pop("PYTHONUNBUFFERED", None)


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    """Run each async test on asyncio and on trio."""
    return str(request.param)
