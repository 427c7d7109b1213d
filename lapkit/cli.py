"""The command line: `lapkit demo`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lapkit import demo
from lapkit.version import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: those of the process by default.

    Returns:
        The exit status: 0, or 2 for an argument that cannot be served.
    """
    parser = argparse.ArgumentParser(prog="lapkit", description="Laplace approximations for PyTorch.")
    parser.add_argument("--version", action="version", version=f"lapkit {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    job = commands.add_parser("demo", help="train, fit, compare and prune on real handwritten digits")
    job.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    job.add_argument("--quick", action="store_true", help="train for a few epochs only")
    job.add_argument("--out", type=Path, default=Path("outputs"), metavar="DIR", help="folder for pictures and page")
    job.add_argument("--seed", type=int, default=0, help="of data, weights and batches")
    given = parser.parse_args(arguments)
    try:
        report = demo.run(device=given.device, quick=given.quick, out=given.out, seed=given.seed)
    except ValueError as error:
        print(f"lapkit: {error}", file=sys.stderr)
        return 2
    print(demo.table(report))
    return 0
