"""Run the benchmarks: every figure beside the one that it is compared with, in the same run.

python -m benchmarks.run --json out.json
python -m benchmarks.run step --pairs resnet56-resnet20 --json out.json
python -m benchmarks.run gpu --json out.json
python -m benchmarks.run search --seeds 8 --opponents none --json out.json
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import crowd, gpu, launches, leaks, memory, search_race, startup, step, study
from benchmarks.measure import machine
from ekd_ray.engine.resolve import check_compiler
from ekd_ray.errors import UserError
from ekd_ray.files import write_json
from ekd_ray.models import model_names
from ekd_ray.scale.cluster import local_cpus

STEPS = ("step", "peer", "compile")  # parts of one measurement, taking turns
THEMES = (*STEPS, "launches", "startup", "study", "memory")
LONG = ("crowd", "leaks", "methods", "search")  # take minutes, and run only when asked for
GPU = "gpu"  # has checks that can fail, and runs alone
ROUNDS = 5
RESULTS = Path(__file__).parent / "results"


def parse() -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0] if __doc__ else None,
        epilog="peer adds torchdistill to step, compile our own step under compile=on; launches "
        "counts operations, crowd measures studies of 5,000 trials, leaks what 1,000 leave behind, "
        "methods a step under each method beside KD's; search races searches on recorded curves; "
        "study reports the overhead share as well; gpu checks the GPU paths and times a step "
        "there, at sizes of its own.",
    )
    parser.add_argument(
        "themes",
        nargs="*",
        metavar="THEME",
        help=f"of {', '.join(THEMES)} (all), {', '.join(LONG)} or {GPU}",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    parser.add_argument(
        "--save", action="store_true", help=f"also keep the result in benchmarks/{RESULTS.name}/"
    )
    parser.add_argument("--pairs", default=",".join(step.PAIRS), metavar="T-S,...")
    parser.add_argument("--steps", type=int, default=8, metavar="N", help="steps a round (8)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, metavar="N", help="rounds (5)")
    parser.add_argument("--study-rounds", type=int, default=ROUNDS, metavar="N", help="(5)")
    parser.add_argument("--threads", type=int, default=local_cpus(), metavar="N", help="(all)")
    study.flags(parser)
    search_race.flags(parser.add_argument_group("search"))
    args = parser.parse_args()
    if GPU in args.themes and len(args.themes) > 1:
        parser.error(f"{GPU} runs alone, got {' '.join(args.themes)}")
    unknown = sorted(set(args.themes) - {*THEMES, *LONG, GPU})
    if unknown:
        parser.error(f"unknown theme {unknown[0]!r}: choose of {', '.join((*THEMES, *LONG, GPU))}")
    args.pairs = args.pairs.split(",")
    for pair in args.pairs:
        names = pair.split("-")
        wrong = [name for name in names if name not in model_names()]
        if len(names) != 2 or wrong:
            parser.error(f"--pairs takes TEACHER-STUDENT of the model zoo, got {pair!r}")
    for name in ("steps", "rounds", "study_rounds", "threads", "train_subset"):
        if getattr(args, name) < 1:
            flag = "--" + name.replace("_", "-")
            parser.error(f"{flag} must be >= 1, got {getattr(args, name)}")
    search_race.check_flags(args, parser.error)
    if GPU in args.themes:
        return args
    everything, args.themes = not args.themes, args.themes or list(THEMES)
    study.find_teacher(args)
    for theme, needs in _lacking(args).items():
        if theme in args.themes:
            if not everything:
                parser.error(needs)
            _note(f"{needs}; it is left out")
            args.themes.remove(theme)
    if "peer" in args.themes and not importlib.util.find_spec("torchdistill"):
        parser.error("peer needs torchdistill: pip install '.[bench]'")
    return args


def _lacking(args: argparse.Namespace) -> dict[str, str]:
    """Themes that cannot be measured here, and what they need."""
    found = {}
    if not args.teacher_weights:
        found["study"] = (
            "study needs CIFAR-10 and its teacher: give --data-root and --teacher-weights"
        )
    try:
        check_compiler()
    except UserError as error:
        found["compile"] = str(error).rstrip(".")
    return found


def main() -> None:
    """Run the themes asked for, print the ratios, write the result; exit 1 if a check failed."""
    args = parse()
    if GPU in args.themes:
        checked = _check_gpu()
        _write(args, checked)
        sys.exit(1 if checked["failed"] else 0)
    result: dict[str, Any] = {"machine": machine(args.threads), "ratios": {}}
    with tempfile.TemporaryDirectory() as folder:
        # Nothing of the user's cache is used or left behind.
        os.environ["EKD_CACHE_DIR"] = folder + "/cache"
        if set(STEPS) & set(args.themes):
            found = {
                pair: step.measure_pair(
                    pair, Path(folder), steps=args.steps, rounds=args.rounds,
                    threads=args.threads, peer="peer" in args.themes,
                    compiled="compile" in args.themes, note=_note,
                )
                for pair in args.pairs
            }  # fmt: skip
            result["step"], ratios = step.summary(found)
            result["ratios"] |= ratios
        if "methods" in args.themes:
            result["methods"], ratios = step.measure_methods(
                args.pairs[0], Path(folder), steps=args.steps, rounds=args.rounds,
                threads=args.threads, note=_note,
            )  # fmt: skip
            result["ratios"] |= ratios
        if "launches" in args.themes:
            result["launches"] = launches.measure()
            for part, counts in result["launches"].items():
                for name, count in counts.items():
                    print(f"{'operations of the ' + part + ' ' + name:50s} {count}")
        if "startup" in args.themes:
            result["startup"], ratios = startup.measure(args.rounds, _note)
            result["ratios"] |= ratios
            for name, found in result["startup"].items():
                print(f"{'seconds of ' + name:50s} {found['median']:.3g}")
        if "memory" in args.themes:
            result["memory"], ratios = memory.measure(Path(folder), _note)
            result["ratios"] |= ratios
        if "crowd" in args.themes:
            result["crowd"], ratios = crowd.measure(Path(folder), _note)
            result["ratios"] |= ratios
        if "leaks" in args.themes:
            result["leaks"] = leaks.measure(Path(folder), trials=1000, slots=40)
            for name, count in result["leaks"]["after"].items():
                before = result["leaks"]["before"][name]
                print(f"{name + ' before and after 1,000 trials':50s} {before} {count}")
        if "search" in args.themes:
            result |= search_race.measure(args, _note)
            for name, value in result["figures"].items():
                print(f"{name:50s} {'-' if value is None else format(value, '.4g')}")
        if "study" in args.themes:
            result["study"], ratios = study.measure(args, _note)
            result["ratios"] |= ratios
    for name, value in result["ratios"].items():
        print(f"{name:50s} {value:.3g}")
    _write(args, result)


def _check_gpu() -> dict[str, Any]:
    """The findings of the checks of the GPU paths, which are printed."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["EKD_CACHE_DIR"] = folder + "/cache"
        result = gpu.measure(Path(folder), _note)
    gpu.print_table(result, Console(width=None if sys.stdout.isatty() else 200))
    return result


def _write(args: argparse.Namespace, result: dict[str, Any]) -> None:
    if args.json:
        write_json(args.json, result)
    if args.save:
        found = result["machine"]
        on_gpu = GPU in args.themes
        if on_gpu and not found["gpus"]:
            _note("nothing was checked: nothing is saved")
            return
        processor = found["gpus"][0] if on_gpu else found["processor"]
        hardware = re.sub(r"\W+", "-", processor).strip("-").lower()
        name = f"{'-'.join(args.themes)}_{hardware}_{datetime.now(UTC):%Y-%m-%d}.json"
        write_json(RESULTS / name, result)


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
