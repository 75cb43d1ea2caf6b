"""python -m kpx: the demo, the doctor, targets and compiling."""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import shlex
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape

from kpx._version import __version__
from kpx.errors import ConfigError, KpxError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; gives the exit code."""
    options = _parser().parse_args(arguments)
    # Progress goes to stderr, so that stdout holds the result alone.
    progress, output = Console(stderr=True), Console()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", category=UserWarning)
            warnings.simplefilter("ignore", category=FutureWarning)
            result, show = options.run(options, progress)
    except KpxError as error:
        progress.print(f"[red]{type(error).__name__}:[/red] {escape(str(error))}", highlight=False)
        return 1
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        show(output, result)
    if isinstance(result, dict) and "ok" in result:
        return int(not result["ok"])
    entries = result.get("targets", ()) if isinstance(result, dict) else result
    return int(any(entry.get("error") for entry in entries))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kpx", description="Any model, any framework, any chip, one optimizer.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, run: Callable, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.add_argument("--json", action="store_true", help="print JSON for machines, and nothing else")
        added.set_defaults(run=run)
        return added

    command("demo", _demo, "real sentences through MiniLM: eager, torch.compile and kpx side by side")
    doctor = command("doctor", _doctor, "versions, devices, what is missing and the command that installs it")
    doctor.add_argument(
        "--install", action="append", metavar="TARGET", help="install the compiler for a target, as tpu"
    )
    doctor.add_argument("--print", action="store_true", help="with --install: print the command, and run nothing")
    command("targets", _targets, "what can be run on here, and what can be compiled for")
    for name, run, text in (
        ("compile", _compile, "compile a function for targets, here or not: does it fit?"),
        ("explain", _explain, "where its time would go on targets, and what would help"),
        ("compare", _compare, "targets side by side: predicted time, memory, dollars"),
    ):
        added = command(name, run, text)
        added.add_argument("function", help="package.module:function")
        added.add_argument("--targets", required=True, help="comma-separated, as cuda:h100,tpu-v5e:2x2")
        added.add_argument(
            "--input", action="append", default=[], metavar="f32[8,128]", help="an input; may be repeated"
        )
        if name == "explain":
            added.add_argument("--html", metavar="FILE", help="write a page for a browser, too")
        if name == "compare":
            added.add_argument("--samples", type=int, help="a call's; by default the first input's first dimension")
            added.add_argument("--sort", default="seconds", choices=("seconds", "dollars", "memory"))
    tuning = command(
        "tune", _tune, "measure the implementations of a function's fused ops here, and keep what is fastest"
    )
    tuning.add_argument("function", help="package.module:function")
    tuning.add_argument("--cache", required=True, metavar="FILE", help="what is kept, for Config(kernel_cache=FILE)")
    tuning.add_argument("--seconds", type=float, default=2.0, help="how long each is measured; 2 by default")
    tuning.add_argument("--tries", type=int, help="how many implementations of each; all by default")
    tuning.add_argument(
        "--history", action="append", default=[], metavar="FILE", help="what else to learn the order from"
    )
    tuning.add_argument("--input", action="append", default=[], metavar="f32[8,128]", help="an input; may be repeated")
    for name, text in (
        ("validate", "compare what kpx makes of a function with the function itself, and both with f64"),
        ("bisect", "find the rewrite with which a function's results are wrong"),
    ):
        added = command(name, _validate, text)
        added.add_argument("function", help="package.module:function")
        added.add_argument(
            "--input", action="append", default=[], metavar="f32[8,128]", help="an input; may be repeated"
        )
        added.add_argument("--no-gradients", action="store_true", help="compare values alone")
    track = command("track", _track, "what has become slower since, by a history of measurements")
    track.add_argument("action", choices=("compare",), help="compare: the last run with those before it")
    track.add_argument("--history", required=True, metavar="FILE", help="the history that kpx.track.History writes")
    track.add_argument("--run", dest="which", metavar="ID", help="another run than the last")
    track.add_argument("--against", metavar="ID", help="one run to compare with, not the ten before")
    track.add_argument(
        "--fail-on", default="moderate", choices=("minor", "moderate", "severe"),
        help="from which regression on the exit code is 1",
    )  # fmt: skip
    track.add_argument("--junit", metavar="FILE", help="write JUnit's XML")
    track.add_argument("--markdown", metavar="FILE", help="write a table in Markdown")
    track.add_argument("--plot", metavar="FILE", help="draw what has moved for the worse most, over all runs")
    _launch_options(
        command("launch", _launch, "start a training script's processes: here, under SLURM, or as a JobSet")
    )
    program = command("run", _run, "run a JAX program that never heard of kpx, with every jax.jit of it optimized")
    program.add_argument("--precision", help="as Config(precision=...): bf16, say")
    program.add_argument("program", nargs=argparse.REMAINDER, help="script.py and its arguments, or -- -m module ...")
    discover = command("discover", _discover, "what a function computes over and over that no fusion pattern takes")
    discover.add_argument("function", help="package.module:function")
    discover.add_argument(
        "--target", default="cuda:h100", help="whose patterns are taken off first; cuda:h100 by default"
    )
    discover.add_argument(
        "--input", action="append", default=[], metavar="f32[8,128]", help="an input; may be repeated"
    )
    discover.add_argument(
        "--write", metavar="FILE", help="write the skeleton of a pattern for what would save the most"
    )
    return parser


def _launch_options(launch: argparse.ArgumentParser) -> None:
    launch.add_argument("--cluster", default="local", choices=("local", "slurm", "jobset"))
    launch.add_argument("--processes", type=int, default=1, help="(local) how many; 1 by default")
    launch.add_argument("--devices", type=int, default=1, help="(local) CPU devices of each; 1 by default")
    launch.add_argument("--restarts", type=int, default=3, help="how often the job may start again; 3 by default")
    launch.add_argument(
        "--elastic", type=int, metavar="LEAST", help="(local) go on with fewer processes, down to this many"
    )
    launch.add_argument("--target", help="(slurm, jobset) the machine, as tpu-v5p:8x8x8 or cuda:h100:32x8")
    launch.add_argument("--name", default="kpx", help="(slurm, jobset) the job's name")
    launch.add_argument("--image", help="(jobset) the container's image")
    launch.add_argument("--output", metavar="FILE", help="(slurm, jobset) write the manifest here, and start nothing")
    launch.add_argument("script", nargs=argparse.REMAINDER, help="the script and its arguments")


def _launch(options: argparse.Namespace, progress: Console) -> tuple[Any, Callable]:
    from kpx.train import launch

    command = tuple(options.script[1:] if options.script[:1] == ["--"] else options.script)
    if not command or min(options.processes, options.devices) < 1 or options.restarts < 0:
        raise ConfigError(
            "`launch` was given no script, or counts below 1. Write `kpx launch --processes 4 train.py ...`."
        )
    least = options.processes if options.elastic is None else options.elastic
    job = launch.Job(command, options.processes, options.devices, options.restarts, least)
    if options.cluster == "local":
        code = launch.local(job, lambda text: progress.print(escape(text), highlight=False, soft_wrap=True))
        return {"ok": code == 0, "code": code}, lambda console, _: None
    if options.target is None or (options.cluster == "jobset" and options.image is None):
        raise ConfigError(
            f"`--cluster {options.cluster}` needs `--target`"
            + (", and `--image`." if options.cluster == "jobset" else ".")
        )
    from kpx.hardware.target import Target

    given = job, Target(options.target), options.name
    text = launch.sbatch(*given) if options.cluster == "slurm" else launch.jobset(*given, options.image)
    suffix = ".sbatch" if options.cluster == "slurm" else ".yaml"
    path = pathlib.Path(options.output or f"{options.name}{suffix}")
    path.write_text(text)
    starts = launch.submitted(options.cluster, path) if options.output is None else None
    if starts is not None:
        done = subprocess.run(starts, check=False)
        return {"ok": done.returncode == 0, "manifest": str(path)}, lambda console, _: None
    told = (
        f"The manifest is {path}."
        if options.output
        else f"The manifest is {path}; what would start it is not installed here."
    )
    return {"ok": True, "manifest": str(path)}, lambda console, _: console.print(told, highlight=False, soft_wrap=True)


def _demo(options: argparse.Namespace, progress: Console) -> tuple[Any, Callable]:
    from kpx.observe import demo

    return demo.run(progress), demo.show


def _doctor(options: argparse.Namespace, progress: Console) -> tuple[Any, Callable]:
    if options.install:
        return _install(options, progress)
    from kpx.observe import doctor

    return doctor.examine(), doctor.show


def _install(options: argparse.Namespace, progress: Console) -> tuple[Any, Callable]:
    from kpx.hardware import plugins
    from kpx.hardware.target import Target

    done = []
    for platform in dict.fromkeys(Target(name).platform for name in options.install):
        command = plugins.pip_command(platform)
        if not options.print:
            plugins.install(platform, lambda text: progress.print(text, highlight=False))
        done.append({"platform": platform, "command": shlex.join(command), "folder": str(plugins.folder(platform))})

    def show(console: Console, result: list[dict[str, str]]) -> None:
        for entry in result:
            text = (
                entry["command"] if options.print else f"The compiler for {entry['platform']} is in {entry['folder']}."
            )
            console.print(escape(text), highlight=False, soft_wrap=True)

    return done, show


def _targets(options: argparse.Namespace, progress: Console) -> tuple[Any, Callable]:
    from kpx.observe import listing

    return listing.examine(), listing.show


def _compile(options: argparse.Namespace, progress: Console) -> tuple[Any, Callable]:
    from kpx.observe import compiling

    return compiling.run(options.function, options.input, _names(options), progress), compiling.show


def _explain(options: argparse.Namespace, progress: Console) -> tuple[Any, Callable]:
    from kpx.observe import compiling
    from kpx.observe.explain import explain

    fun, specs = compiling.load(options.function, options.input)
    with compiling.telling(progress) as tell:
        found = explain(fun, *specs, targets=_names(options), progress=tell)
    if options.html:
        progress.print(f"The page is {found.to_html(options.html)}.", highlight=False)
    return found.to_dict(), lambda console, _: console.print(found)


def _compare(options: argparse.Namespace, progress: Console) -> tuple[Any, Callable]:
    from kpx.observe import compiling
    from kpx.observe.compare import compare

    fun, specs = compiling.load(options.function, options.input)
    given = {"samples": options.samples, "sort": options.sort}
    with compiling.telling(progress) as tell:
        found = compare(fun, *specs, targets=_names(options), progress=tell, **given)
    return found.to_dict(), lambda console, _: console.print(found)


def _tune(options: argparse.Namespace, progress: Console) -> tuple[Any, Callable]:
    from kpx.observe import compiling
    from kpx.tuning import tune

    fun, specs = compiling.load(options.function, options.input)
    with progress.status("compiling") as status:
        given = {"seconds": options.seconds, "tries": options.tries, "history": options.history}
        found = tune(fun, *specs, cache=options.cache, progress=status.update, **given)
    return found.to_dict(), lambda console, _: console.print(found, soft_wrap=True)


def _validate(options: argparse.Namespace, progress: Console) -> tuple[Any, Callable]:
    from kpx.observe import compiling
    from kpx.observe.validate import bisect, validate

    fun, specs = compiling.load(options.function, options.input)
    with progress.status("comparing"):
        if options.command == "validate":
            found = validate(fun, None, *specs, gradients=not options.no_gradients)
            return found.to_dict(), lambda console, _: console.print(found, soft_wrap=True)
        found = bisect(fun, *specs)
        if found is None and not options.no_gradients:
            found = bisect(fun, *specs, gradients=True)
    told = "Nothing is wrong, with all rewrites." if found is None else found
    result = {"ok": found is None, "bisection": None if found is None else dataclasses.asdict(found)}
    return result, lambda console, _: console.print(told, soft_wrap=True)


def _track(options: argparse.Namespace, progress: Console) -> tuple[Any, Callable]:
    from kpx.observe import track_report
    from kpx.track import History

    history = History(options.history)
    report = history.compare(options.which, options.against)
    for path, contents in (
        (options.junit, track_report.as_junit(report, options.fail_on)),
        (options.markdown, track_report.as_markdown(report)),
    ):
        if path:
            pathlib.Path(path).write_text(contents)
    if options.plot and report.changes:
        worst = max(report.changes, key=lambda c: c.ratio or 0.0)
        track_report.plot(history, worst.name, worst.metric, report.machine, options.plot)
    result = {"ok": not report.fails(options.fail_on), **track_report.to_dict(report)}
    return result, lambda console, _: console.print(track_report.as_table(report))


def _run(options: argparse.Namespace, progress: Console) -> tuple[Any, Callable]:
    from kpx.config import Config
    from kpx.unmodified import run

    given = options.program[1:] if options.program[:1] == ["--"] else options.program
    if not given or given == ["-m"]:
        raise ConfigError("`run` was given no program. Write `kpx run train.py ...`.")
    told = run(given, Config(precision=options.precision))
    text = (
        f"kpx: {told.modules} modules rewritten, {told.left} left as they were, {sum(told.rewrites.values())} rewrites."
    )
    progress.print(text, highlight=False)
    return {"ok": True, **dataclasses.asdict(told)}, lambda console, _: None


def _discover(options: argparse.Namespace, progress: Console) -> tuple[Any, Callable]:
    from kpx.observe import discover

    given = options.function, options.input, options.target, options.write
    return discover.run(*given, progress), discover.show


def _names(options: argparse.Namespace) -> list[str]:
    return [name.strip() for name in options.targets.split(",") if name.strip()]


if __name__ == "__main__":
    sys.exit(main())
