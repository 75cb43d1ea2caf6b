"""python -m kpx: the demo and the doctor."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape

from kpx._version import __version__
from kpx.errors import KpxError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; gives the exit code."""
    parser = argparse.ArgumentParser(prog="kpx", description="Any model, any framework, any chip, one optimizer.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("demo", "real sentences through MiniLM: eager, torch.compile and kpx side by side"),
        ("doctor", "versions, devices, what is missing and the command that installs it"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--json", action="store_true", help="print JSON for machines, and nothing else")
    options = parser.parse_args(arguments)
    # Progress goes to stderr, so that stdout holds the result alone.
    progress, output = Console(stderr=True), Console()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", category=UserWarning)
            warnings.simplefilter("ignore", category=FutureWarning)
            module = _command(options.command)
            result = module.run(progress) if options.command == "demo" else module.examine()
    except KpxError as error:
        progress.print(f"[red]{type(error).__name__}:[/red] {escape(str(error))}", highlight=False)
        return 1
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        module.show(output, result)
    return 0


def _command(name: str):
    if name == "demo":
        from kpx.observe import demo

        return demo
    from kpx.observe import doctor

    return doctor


if __name__ == "__main__":
    sys.exit(main())
