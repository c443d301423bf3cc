"""Look after the teacher cache: list its tables, fill one ahead, verify, export or remove them.

What is heavy (torch, rich) is imported inside the functions, so that `--help` does not wait.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ekd_ray.cli import flags
from ekd_ray.cli.output import print_plan, print_text, set_up_ray
from ekd_ray.cli.request import run_request
from ekd_ray.config.phrases import size_text
from ekd_ray.errors import UserError, continue_with
from ekd_ray.files import remove_path

if TYPE_CHECKING:
    from ekd_ray.engine.teacher.table import TableInfo

EXAMPLES = (
    "ekd-ray cache ls",
    "ekd-ray cache fill --pair resnet56-resnet20 --teacher-weights FILE --data-root data",
    "ekd-ray cache rm --unused-days 30",
)
FIRST = (
    *("--dataset", "--pair", "--teacher-weights", "--method", "--seeds", "--data-root"),
    *("--threads", "--gpus-per-trial", "--dry-run"),
)
PROGRESS_SECONDS = 1.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("ls", help="tables, how full they are and what they take")
    fill = commands.add_parser("fill", help="compute the logits that runs will read")
    fill.set_defaults(home=None, config=None, resume=False)
    flags.add_pair(flags.add_run_settings(fill))
    fill.add_argument(
        "--seeds",
        dest="run_seeds",
        default="0",
        metavar="LIST",
        help="seeds of the runs (default: 0)",
    )
    flags.add_common(fill, "--data-root")
    fill.add_argument(
        "--threads", type=flags.whole_number, metavar="N", help="CPU threads (default: all)"
    )
    flags.add_setting(
        fill, "gpus_per_trial", "--gpus-per-trial", "--gpus-per-worker",
        doc="GPUs per process, of which there are as many as fit; a fraction shares one, 0: on the "
        "CPU, auto: takes all GPUs of this machine, each by a process of its own",
    )  # fmt: skip
    flags.add_common(fill, "--dry-run", "--quiet")
    flags.add_plugins(fill)
    verify = commands.add_parser("verify", help="compare every check word of a table")
    export = commands.add_parser("export", help="a table as one file, for other programs")
    export.add_argument("table", metavar="TABLE", help="name, or its beginning")
    export.add_argument(
        "--out", required=True, metavar="FILE", help="a new .parquet or .safetensors file"
    )
    remove = commands.add_parser("rm", help="remove tables")
    for command in (verify, remove):
        command.add_argument("tables", nargs="*", metavar="TABLE", help="name, or its beginning")
    remove.add_argument("--all", action="store_true", help="every table")
    remove.add_argument(
        "--unused-days", type=float, metavar="N", help="those not written to for so many days"
    )
    for command in commands.choices.values():
        flags.add_common(command, "--json")


def run(args: argparse.Namespace) -> int:
    """Do what `args.command` says; returns the exit code (1: a table has damaged rows)."""
    jobs = {"ls": _ls, "fill": _fill, "verify": _verify, "export": _export, "rm": _rm}
    return jobs[args.command](args)


def _ls(args: argparse.Namespace) -> int:
    from ekd_ray.cli.console import Console
    from ekd_ray.cli.terminal import plain_table
    from ekd_ray.engine.teacher.table import list_tables, table_folders, tables_dir

    tables = list(list_tables())
    known = {table.folder for table in tables}
    for folder in table_folders():
        if folder not in known:
            print_text(_left_out(folder), file=sys.stderr)
    if args.json:
        print_text(json.dumps([_plain(table) for table in tables], indent=2))
        return 0
    columns = ("table", "rows", "filled", "on disk", "when full", "days since written")
    shown = plain_table(*columns)
    for table in tables:
        share = table.filled / table.rows
        shown.add_row(
            table.folder.name, str(table.rows), f"{share:.1%}", size_text(table.bytes_used),
            size_text(table.bytes_full), f"{max(0.0, time.time() - table.modified) / 86400:.1f}",
        )  # fmt: skip
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)  # names whole, whatever reads them
    console.print(shown if tables else "no tables")
    print_text(f"in {tables_dir()}")
    return 0


def _left_out(folder: Path) -> str:
    return f"{folder.name} is no table of this version, or damaged: remove it with rm."


def _plain(table: TableInfo) -> dict[str, Any]:
    return {
        "table": table.folder.name,
        "rows": table.rows,
        "filled": table.filled,
        "bytes": table.bytes_used,
        "bytes_full": table.bytes_full,
        "modified": table.modified,
        **table.meta,
    }


def _fill(args: argparse.Namespace) -> int:
    request = run_request(args)
    from ekd_ray.cli.plan_text import fill_plan
    from ekd_ray.cli.terminal import Terminal
    from ekd_ray.config import StudyConfig
    from ekd_ray.config.study_config import Gpus
    from ekd_ray.engine.gpu_share import share_of_gpu
    from ekd_ray.engine.resolve import resolve
    from ekd_ray.engine.teacher.fill import fill_tables
    from ekd_ray.scale.cluster import (
        check_fits,
        connected,
        count_trials,
        gpus_per_worker,
        local_cpus,
        local_nodes,
    )
    from ekd_ray.scale.fill_tasks import fill_cache

    try:
        seeds = [flags.whole_number(text) for text in args.run_seeds.split(",")]
    except ValueError:
        raise UserError(
            f"--seeds takes whole numbers with commas between, got {args.run_seeds!r}."
        ) from None
    assert request.run is not None
    config = resolve(request.run.replace(teacher_cache="on"), data_root=request.data_root)
    if config.teacher is None:
        raise UserError(f"method {config.method!r} has no teacher: choose another --method.")
    started, shown = time.monotonic(), -math.inf

    def progress(done: int, total: int) -> None:
        nonlocal shown
        if done == total or time.monotonic() - shown > PROGRESS_SECONDS:
            shown = time.monotonic()
            terminal.filled(done, total)

    # The tables lie on this machine, whatever cluster there is. All its GPUs compute at once, each
    # asked by a process of its own; without one this process does.
    set_up_ray("local")
    cpus = local_cpus()
    gpus: Gpus = "auto" if args.gpus_per_trial is None else args.gpus_per_trial
    study = StudyConfig(distill=config, data_root=request.data_root, gpus_per_trial=gpus)
    nodes = local_nodes()
    slots = count_trials(study, nodes)
    check_fits(study)
    share = gpus_per_worker(study.gpus_per_trial, nodes)
    apart = share > 0 and slots > 1
    processes = slots if apart else 1
    threads = max(1, (args.threads or cpus) // processes)
    if args.dry_run:
        plan = fill_plan(study, seeds, processes=processes, threads=threads)
        print_plan(plan, config.to_dict(), as_json=args.json)
        return 0
    continue_with(shlex.join(args.typed))  # what is filled stays
    quiet = args.json or args.quiet
    with contextlib.closing(Terminal(quiet=quiet, unit="parts" if apart else "rows")) as terminal:
        if apart:
            study = study.replace(cpus_per_trial=threads)
            with connected(study):
                computed = int(fill_cache(study, config, seeds, terminal)["rows"])
        else:
            with share_of_gpu(share):
                computed = fill_tables(
                    config,
                    data_root=request.data_root,
                    seeds=seeds,
                    threads=threads,
                    on_progress=progress,
                )
    seconds = time.monotonic() - started
    if args.json:
        print_text(json.dumps({"computed": computed, "seconds": seconds}))
    elif not args.quiet:
        print_text(f"{computed} rows computed in {seconds:.1f} s")
    return 0


def _chosen(args: argparse.Namespace) -> list[Path]:
    from ekd_ray.engine.teacher.table import find_table, table_folders

    if args.tables:
        return [find_table(name) for name in args.tables]
    return table_folders()


def _verify(args: argparse.Namespace) -> int:
    from ekd_ray.engine.teacher.table import TeacherTable, read_spec

    found, damaged = {}, 0
    for folder in _chosen(args):
        spec = read_spec(folder)
        if spec is None:
            print_text(_left_out(folder), file=sys.stderr)
            damaged += 1
            continue
        table = TeacherTable(folder, spec)
        sound, bad = table.sound()
        table.close()
        found[folder.name] = {"sound": sound, "damaged": bad}
        damaged += bad
        if not args.json:
            print_text(
                f"{folder.name}: {sound} rows sound, {bad} damaged (computed again when read)"
            )
    if args.json:
        print_text(json.dumps(found, indent=2))
    return 1 if damaged else 0


def _export(args: argparse.Namespace) -> int:
    from ekd_ray.engine.teacher.table import find_table
    from ekd_ray.engine.teacher.table_export import export_table

    out = Path(args.out)
    count = export_table(find_table(args.table), out)
    if args.json:
        print_text(json.dumps({"file": str(out), "rows": count}))
    else:
        print_text(f"{out}: {count} rows, {size_text(out.stat().st_size)}")
    return 0


def _rm(args: argparse.Namespace) -> int:
    from ekd_ray.engine.teacher.table import list_tables

    if not (args.tables or args.all or args.unused_days is not None):
        raise UserError("rm removes named tables, or give --unused-days N or --all.")
    folders = _chosen(args)
    if args.unused_days is not None:
        newest = time.time() - 86400 * args.unused_days
        old = {table.folder for table in list_tables() if table.modified < newest}
        folders = [folder for folder in folders if folder in old]
    for folder in folders:
        remove_path(folder)
        if not args.json:
            print_text(f"removed {folder.name}")
    if args.json:
        print_text(json.dumps([folder.name for folder in folders]))
    return 0
