"""Runs the Python blocks of README.md, each in a process of its own: `python -m tests.readme`."""

import pathlib
import re
import subprocess
import sys


def blocks(text: str) -> list[str]:
    """The README's Python blocks."""
    return re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)


def main() -> int:
    found = blocks((pathlib.Path(__file__).parents[1] / "README.md").read_text())
    for i, block in enumerate(found, 1):
        print(f"README block {i} of {len(found)}:\n{block}", flush=True)
        if subprocess.run([sys.executable, "-c", block], check=False).returncode:
            print(f"README block {i} failed.")
            return 1
    print(f"{len(found)} passed, 0 failed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
