"""Writes the generated modules of `pagewalk.v1`, or checks that the committed ones are fresh.

Needs the exact tools of the extra `generate`: `pip install './client/python[generate]'`.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import sysconfig
import tempfile
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path

HERE = Path(__file__).resolve().parent
PROTO = HERE.parents[1] / "proto"
PACKAGE = Path("pagewalk/v1")
COMMITTED = HERE / "src" / PACKAGE
# As pinned in pyproject.toml: other versions write other bytes.
TOOLS = {"grpcio-tools": "1.76.0", "mypy-protobuf": "3.7.0"}


def main() -> int:
    """Generate, then write or compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; fail when the committed files are stale")
    check: bool = parser.parse_args().check

    for tool, wanted in TOOLS.items():
        try:
            found = version(tool)
        except PackageNotFoundError:
            found = "none"
        if found != wanted:
            print(f"needs {tool} {wanted}, found {found}: pip install '{HERE}[generate]'", file=sys.stderr)
            return 2

    with tempfile.TemporaryDirectory() as scratch:
        if not generate(Path(scratch)):
            return 1
        fresh = Path(scratch) / PACKAGE
        if check:
            return compare(fresh)
        shutil.rmtree(COMMITTED, ignore_errors=True)
        shutil.copytree(fresh, COMMITTED)
    return 0


def generate(out: Path) -> bool:
    """Run protoc on every file of the contract; say whether it succeeded."""
    from grpc_tools import protoc

    sources = sorted((PROTO / PACKAGE).glob("*.proto"))
    if not sources:
        print(f"no .proto files in {PROTO / PACKAGE}", file=sys.stderr)
        return False
    plugins = Path(sysconfig.get_path("scripts"))
    failed = protoc.main(
        [
            "protoc",
            f"--proto_path={PROTO}",
            f"--proto_path={files('grpc_tools') / '_proto'}",
            f"--python_out={out}",
            f"--grpc_python_out={out}",
            f"--plugin=protoc-gen-mypy={plugins / 'protoc-gen-mypy'}",
            f"--plugin=protoc-gen-mypy_grpc={plugins / 'protoc-gen-mypy_grpc'}",
            f"--mypy_out=quiet:{out}",
            f"--mypy_grpc_out=quiet:{out}",
            *map(str, sources),
        ]
    )
    if failed:
        return False
    # A file without a service gets empty stubs of one, which say nothing.
    for source in sources:
        if "\nservice " not in source.read_text(encoding="utf-8"):
            for suffix in (".py", ".pyi"):
                (out / PACKAGE / f"{source.stem}_pb2_grpc{suffix}").unlink(missing_ok=True)
    (out / PACKAGE / "__init__.py").write_text(
        '"""Messages and stubs of the gRPC package `pagewalk.v1`, generated: see `generate.py`."""\n',
        encoding="utf-8",
    )
    return True


def compare(fresh: Path) -> int:
    """Report every committed file that differs from what was generated."""
    names = {path.name for path in [*fresh.iterdir(), *COMMITTED.glob("*.py*")] if path.is_file()}
    stale = sorted(name for name in names if read(fresh / name) != read(COMMITTED / name))
    for name in stale:
        print(f"stale: {COMMITTED / name}", file=sys.stderr)
    if stale:
        print(f"run: {sys.executable} {Path(__file__)}", file=sys.stderr)
    return 1 if stale else 0


def read(path: Path) -> bytes | None:
    """Give the contents of a file, or None where there is none."""
    return path.read_bytes() if path.is_file() else None


if __name__ == "__main__":
    sys.exit(main())
