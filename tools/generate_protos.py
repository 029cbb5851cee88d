"""Generate protos/*_pb2*.py from protos/*.proto; with --check, say whether the committed files are current."""

import argparse
import sys
import tempfile
from pathlib import Path

from grpc_tools import protoc

PROTOS = Path(__file__).resolve().parents[1] / "protos"
SCHEMAS = ("fedge", "edge", "llm")
NAMES = [f"{schema}_pb2{ending}" for schema in SCHEMAS for ending in (".py", ".pyi", "_grpc.py")]


def generate(out: Path) -> None:
    """Write the generated modules into `out`, importing each other as fedge.protos."""
    flags = [f"--proto_path={PROTOS}", f"--python_out={out}", f"--pyi_out={out}", f"--grpc_python_out={out}"]
    if protoc.main(["protoc", *flags, *(f"{schema}.proto" for schema in SCHEMAS)]):
        raise SystemExit("protoc failed")
    for schema in SCHEMAS:
        stub = out / f"{schema}_pb2_grpc.py"
        module = f"import {schema}_pb2 as"
        stub.write_text(stub.read_text().replace(module, f"from fedge.protos {module}"))


def stale() -> list[str]:
    """The committed files that differ from what the schema gives."""
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        return [name for name in NAMES if (Path(folder) / name).read_text() != (PROTOS / name).read_text()]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    if not parser.parse_args().check:
        generate(PROTOS)
    elif files := stale():
        sys.exit(f"out of date: {', '.join(files)}; run `make protos`")
