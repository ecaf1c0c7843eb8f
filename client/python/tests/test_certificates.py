"""The script that makes certificates for a lab."""

from __future__ import annotations

import subprocess
from pathlib import Path

from conftest import LAB_CERTIFICATES


def test_keys_are_private(certificates: Path) -> None:
    modes = {path.name: path.stat().st_mode & 0o777 for path in certificates.iterdir()}
    assert modes == {
        **{f"{name}.key": 0o600 for name in ("ca", "server", "client")},
        **{f"{name}.pem": 0o644 for name in ("ca", "server", "client")},
    }


def test_nothing_is_overwritten(certificates: Path) -> None:
    before = {path: path.read_bytes() for path in certificates.iterdir()}
    (certificates / "server.pem").rename(certificates / "aside")
    again = subprocess.run([LAB_CERTIFICATES, certificates, "localhost"], capture_output=True, text=True)
    (certificates / "aside").rename(certificates / "server.pem")
    assert again.returncode == 1
    assert "exists" in again.stderr
    assert {path: path.read_bytes() for path in certificates.iterdir()} == before


def test_names_cannot_smuggle_extensions(tmp_path: Path) -> None:
    for name in ("a,DNS:b", "a\nbasicConstraints=CA:TRUE", "-x", ""):
        refused = subprocess.run([LAB_CERTIFICATES, tmp_path / "lab", name], capture_output=True, text=True)
        assert refused.returncode == 2, name
    assert not (tmp_path / "lab").exists()
