"""The daemon that the tests talk to: the one named by PAGEWALK_TARGET, or one started here from the build."""

from __future__ import annotations

import os
import re
import selectors
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import pytest

import pagewalk

if TYPE_CHECKING:
    from collections.abc import Iterator

REPOSITORY = Path(__file__).resolve().parents[3]
LAB_CERTIFICATES = REPOSITORY / "deploy/make-lab-certs.sh"
START_SECONDS = 30
STOP_SECONDS = 15


def missing(reason: str) -> NoReturn:
    """Skip, or fail where the bed `python` is required."""
    if "python" in os.environ.get("PAGEWALK_REQUIRE", "").split(","):
        pytest.fail(f"the bed python is required: {reason}")
    pytest.skip(f"SKIPPED python: {reason}")


def daemon_binary() -> Path:
    """Find pagewalkd, PAGEWALKD or the newest build, or skip."""
    if named := os.environ.get("PAGEWALKD"):
        return Path(named)
    target = Path(os.environ.get("CARGO_TARGET_DIR", REPOSITORY / "target"))
    builds = [target / profile / "pagewalkd" for profile in ("release", "debug")]
    found = max((path for path in builds if path.exists()), key=lambda path: path.stat().st_mtime, default=None)
    return found or missing("no pagewalkd: cargo build -p pagewalkd, or name one in PAGEWALKD")


class Daemon:
    """A daemon of the demo machine, with a TCP port and a Unix socket."""

    def __init__(self, directory: Path, *options: str | Path) -> None:
        binary = daemon_binary()
        self.socket = directory / "pagewalk.sock"
        self.log = directory / "log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [binary, "serve", "--machine", "demo", "--listen", "127.0.0.1:0", "--uds", self.socket, *options],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self.target = self._await_address()

    def _await_address(self) -> str:
        assert self.process.stdout is not None
        deadline = time.monotonic() + START_SECONDS
        with selectors.DefaultSelector() as waiting:
            waiting.register(self.process.stdout, selectors.EVENT_READ)
            while waiting.select(max(0.0, deadline - time.monotonic())):
                line = self.process.stdout.readline()
                if found := re.search(r"listening on (127\.0\.0\.1:\d+)", line):
                    return found[1]
                if not line:
                    break
        self.stop()
        pytest.fail(f"pagewalkd did not come up:\n{self.log.read_text()}")

    def stop(self) -> None:
        """Ask it to stop, and make it."""
        self.process.terminate()
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            pytest.fail(f"pagewalkd did not stop within {STOP_SECONDS} s of SIGTERM")


@pytest.fixture(scope="session")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """Start a daemon of our own."""
    started = Daemon(tmp_path_factory.mktemp("daemon"))
    yield started
    started.stop()
    assert started.process.returncode == 0, started.log.read_text()


@pytest.fixture(scope="session")
def target(request: pytest.FixtureRequest) -> str:
    """Give the address of the daemon to test against."""
    if named := os.environ.get("PAGEWALK_TARGET"):
        return named
    daemon: Daemon = request.getfixturevalue("daemon")
    return daemon.target


@pytest.fixture
def client(target: str) -> Iterator[pagewalk.Client]:
    """Connect."""
    with pagewalk.connect(target) as connected:
        yield connected


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make lab certificates for this host."""
    directory = tmp_path_factory.mktemp("certificates") / "lab"
    subprocess.run([LAB_CERTIFICATES, directory, "localhost", "127.0.0.1"], check=True, stdout=subprocess.DEVNULL)
    return directory
