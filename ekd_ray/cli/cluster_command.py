"""Say what a Ray cluster lacks before a study is sent there.

What is heavy (ray, rich) is imported inside the functions, so that `--help` does not wait.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import threading
from typing import TYPE_CHECKING, Any

from ekd_ray.cli import flags
from ekd_ray.cli.output import print_json, print_text, set_up_ray, show_passing
from ekd_ray.config.phrases import size_text
from ekd_ray.errors import UserError, end_process

if TYPE_CHECKING:
    from ekd_ray.scale.cluster_check import ClusterReport

EXAMPLES = (
    "ekd-ray cluster check --address auto --out /shared/runs/one",
    "ekd-ray cluster check --address http://127.0.0.1:8265 --out /shared/runs/one",
)
FIRST = ("--address", "--out", "--timeout", "--json")
EXIT_LACKING = 1
JOIN_SECONDS = 60.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    check = commands.add_parser(
        "check", help="ask every node: versions, token, --out, GPUs, free disk, /dev/shm"
    )
    check.add_argument(
        "--address", metavar="HOST:PORT|URL",
        help="the cluster of which this is a node (auto: of this machine), or the dashboard of "
        "another, http://HOST:8265 (default: $RAY_ADDRESS)",
    )  # fmt: skip
    check.add_argument(
        "--out", metavar="RUN", help="folder of the study to come, or s3://BUCKET/FOLDER"
    )
    check.add_argument(
        "--timeout", type=float, default=30.0, metavar="S",
        help="seconds for the nodes to answer a question (30)",
    )  # fmt: skip
    flags.add_common(check, "--json")


def run(args: argparse.Namespace) -> int:
    """Print the table and a sentence for each fault; 1 if there is one."""
    from ekd_ray.scale.cluster import on_cluster

    if not 1 <= args.timeout <= 600:
        raise UserError(f"--timeout must be >= 1 and <= 600 seconds, got {args.timeout:g}.")
    if "://" in (args.address or ""):
        from ekd_ray.scale.remote_check import check_from_outside

        values = check_from_outside(args.address, args.out, seconds=args.timeout)
    else:
        set_up_ray(args.address)
        if not on_cluster():
            raise UserError(
                "cluster check needs a cluster: give --address HOST:PORT, auto, or "
                "http://HOST:8265."
            )
        values = dataclasses.asdict(_check_here(args))
    if args.json:
        print_json(values)
    else:
        _print(values)
    return EXIT_LACKING if values["faults"] else 0


def _check_here(args: argparse.Namespace) -> ClusterReport:
    from ekd_ray.scale.cluster import ADDRESS
    from ekd_ray.scale.cluster_check import QUESTIONS, check_cluster
    from ekd_ray.studies.places import locate

    out, location = locate(args.out) if args.out else (None, None)
    if not args.json:
        show_passing(f"joining the Ray cluster at {os.environ[ADDRESS]} ...")
    limit = JOIN_SECONDS + QUESTIONS * args.timeout
    sentence = f"error: the Ray cluster at {os.environ[ADDRESS]} did not answer in {limit:g} s."
    watch = threading.Timer(limit, end_process, (sentence, EXIT_LACKING))
    watch.daemon = True
    watch.start()
    try:
        found = check_cluster(out and out.absolute(), seconds=args.timeout)
        if location is not None:
            from ekd_ray.remote.object_store import open_store

            open_store(location).list_objects()  # says in a sentence what is wrong
        return found
    finally:
        watch.cancel()
        if not args.json:
            show_passing("")


def _print(values: dict[str, Any]) -> None:
    from ekd_ray.cli.console import Console
    from ekd_ray.cli.terminal import plain_table

    own = values["versions"]
    print_text(f"driver: {', '.join(f'{name} {own[name] or None}' for name in own)}")
    table = plain_table("node", "CPUs", "GPUs", "versions", "cache free", "/dev/shm")
    for node in values["nodes"]:
        found, cells = node["found"], ["no answer", "", ""]
        if found:
            there = found["versions"]
            other = [f"{name} {there[name] or 'none'}" for name in own if there[name] != own[name]]
            rooms = [size_text(room[at]) if room else "none"
                     for room, at in ((found["cache"], 0), (found["shm"], 1))]  # fmt: skip
            cells = [", ".join(other) or "the driver's", *rooms]
        table.add_row(node["address"], f"{node['cpus']:g}", f"{node['gpus']:g}", *cells)
    Console().print(table)
    token = {
        True: "token: asked for, and accepted",
        False: "token: none is asked for: who reaches the cluster can run code on it; see "
        "docs/guide/cluster.md",
        None: "token: the dashboard did not say whether it asks for one",
    }
    print_text(token[values["token"]])
    for fault in values["faults"]:
        print_text(f"!! {fault}")
    if not values["faults"]:
        print_text("nothing is missing")
    sys.stdout.flush()
