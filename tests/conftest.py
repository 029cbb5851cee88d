"""What all tests share: optimised pieces go to a folder of the session, never to the user's cache; Ctrl-C works; a
thread that keeps the tests' process from its end fails them, with the stacks of all threads.
"""

import faulthandler
import os
import signal
import tempfile
from collections.abc import Iterator

import pytest

EXIT_S = 60  # that the process may take to end once all tests have


def pytest_unconfigure() -> None:
    faulthandler.dump_traceback_later(EXIT_S, exit=True)


@pytest.fixture(scope="session", autouse=True)
def _own_cache() -> Iterator[None]:
    """Child processes inherit it. Tests of the cache itself set it anew."""
    before = os.environ.get("XDG_CACHE_HOME")
    with tempfile.TemporaryDirectory(prefix="fedge-cache-", ignore_cleanup_errors=True) as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        yield
    if before is None:
        del os.environ["XDG_CACHE_HOME"]
    else:
        os.environ["XDG_CACHE_HOME"] = before


@pytest.fixture(scope="session", autouse=True)
def _ctrl_c() -> Iterator[None]:
    """As in a terminal, here and in child processes, also where the tests run in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
