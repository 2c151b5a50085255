"""python -m benchmarks NAME [options]: runs ssl_global's benchmark of that name, a file of this folder.

Prints tables, and writes all figures as JSON with --out. `python -m benchmarks NAME --help` shows the options.
"""

import importlib
import sys
from pathlib import Path

NOT_BENCHMARKS = {"__init__", "__main__", "measure", "images"}


def names() -> list[str]:
    return sorted(file.stem for file in Path(__file__).parent.glob("*.py") if file.stem not in NOT_BENCHMARKS)


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in names():
        print(f"usage: python -m benchmarks NAME; there are: {', '.join(names())}", file=sys.stderr)
        sys.exit(2)
    name = sys.argv.pop(1)
    importlib.import_module(f"benchmarks.{name}").main()


if __name__ == "__main__":
    main()
