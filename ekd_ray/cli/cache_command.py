"""The commands of `launchers/cache.py`."""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ekd_ray.cli.terminal import Terminal
from ekd_ray.config import DistillConfig
from ekd_ray.engine.resolve import resolve
from ekd_ray.engine.teacher.fill import fill_tables
from ekd_ray.engine.teacher.table import (
    TableInfo,
    TeacherTable,
    find_table,
    list_tables,
    read_spec,
    table_folders,
    tables_dir,
)
from ekd_ray.errors import UserError
from ekd_ray.scale.cluster import local_cpus

PROGRESS_SECONDS = 1.0


def run(args: argparse.Namespace, config: DistillConfig | None) -> int:
    """Do what `args.command` says; returns the exit code (1: a table has damaged rows)."""
    if args.command == "ls":
        return _ls(args)
    if args.command == "verify":
        return _verify(args)
    if args.command == "rm":
        return _rm(args)
    assert config is not None
    return _fill(args, config)


def _gigabytes(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**29 else f"{size / 2**20:.1f} MiB"


def _ls(args: argparse.Namespace) -> int:
    tables = list(list_tables())
    if args.json:
        print(json.dumps([_plain(table) for table in tables], indent=2))
        return 0
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    shown.add_column("table", no_wrap=True)
    for column in ("rows", "filled", "on disk", "when full", "days since written"):
        shown.add_column(column, justify="right", no_wrap=True)
    for table in tables:
        share = table.filled / table.rows
        shown.add_row(
            table.folder.name, str(table.rows), f"{share:.1%}", _gigabytes(table.bytes_used),
            _gigabytes(table.bytes_full), f"{(time.time() - table.modified) / 86400:.1f}",
        )  # fmt: skip
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=160)  # names whole, whatever reads them
    console.print(shown if tables else "no tables", markup=False)
    print(f"in {tables_dir()}")
    return 0


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


def _fill(args: argparse.Namespace, config: DistillConfig) -> int:
    try:
        seeds = [int(text) for text in args.run_seeds.split(",")]
    except ValueError:
        raise UserError(
            f"--seeds takes whole numbers with commas, got {args.run_seeds!r}."
        ) from None
    config = resolve(config.replace(teacher_cache="on"), data_root=args.data_root)
    if config.teacher is None:
        raise UserError(f"method {config.method!r} has no teacher: choose another --method.")
    started, shown = time.monotonic(), -math.inf
    terminal = Terminal(quiet=args.json or args.quiet, unit="rows")

    def progress(done: int, total: int) -> None:
        nonlocal shown
        if done == total or time.monotonic() - shown > PROGRESS_SECONDS:
            shown = time.monotonic()
            terminal.filled(done, total)

    try:
        computed = fill_tables(
            config,
            data_root=args.data_root,
            seeds=seeds,
            threads=args.threads or local_cpus(),
            on_progress=progress,
        )
    finally:
        terminal.close()
    seconds = time.monotonic() - started
    if args.json:
        print(json.dumps({"computed": computed, "seconds": seconds}))
    elif not args.quiet:
        print(f"{computed} rows computed in {seconds:.1f} s")
    return 0


def _chosen(args: argparse.Namespace) -> list[Path]:
    if args.tables:
        return [find_table(name) for name in args.tables]
    return table_folders()


def _verify(args: argparse.Namespace) -> int:
    found, damaged = {}, 0
    for folder in _chosen(args):
        spec = read_spec(folder)
        if spec is None:
            raise UserError(f"{folder} is no table of this version: remove it with rm.")
        table = TeacherTable(folder, spec)
        sound, bad = table.sound()
        table.close()
        found[folder.name] = {"sound": sound, "damaged": bad}
        damaged += bad
        if not args.json:
            print(f"{folder.name}: {sound} rows sound, {bad} damaged (computed anew when read)")
    if args.json:
        print(json.dumps(found, indent=2))
    return 1 if damaged else 0


def _rm(args: argparse.Namespace) -> int:
    if not (args.tables or args.all or args.unused_days is not None):
        raise UserError("rm removes named tables, or give --unused-days N or --all.")
    folders = _chosen(args)
    if args.unused_days is not None:
        newest = time.time() - 86400 * args.unused_days
        old = {table.folder for table in list_tables() if table.modified < newest}
        folders = [folder for folder in folders if folder in old]
    for folder in folders:
        shutil.rmtree(folder)
        if not args.json:
            print(f"removed {folder.name}")
    if args.json:
        print(json.dumps([folder.name for folder in folders]))
    return 0
