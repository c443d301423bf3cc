"""Export the confirmed winner of a study as a bundle: weights, configuration, evidence."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ekd_ray.cli import flags
from ekd_ray.cli.output import print_json, print_text
from ekd_ray.errors import UserError, continue_with
from ekd_ray.remote.location import is_uri

if TYPE_CHECKING:
    from ekd_ray.results.bundle import Bundle


EXAMPLES = (
    "ekd-ray export runs/quickstart --out best",
    "ekd-ray export runs/quickstart --out best --verify --format pt2,onnx",
)
FIRST = ("--out", "--format", "--verify", "--data-root", "--dry-run")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="folder of a finished study")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the bundle to write")
    parser.add_argument(
        "--format", metavar="LIST",
        help="also write programs, pt2 of torch.export, onnx, or pt2,onnx (default: those that the "
        "bundle which is replaced has; '' for none)",
    )  # fmt: skip
    parser.add_argument(
        "--normalized-input",
        action="store_true",
        help="these take normalised images (default: images in [0, 1])",
    )
    parser.add_argument(
        "--license",
        default="unknown",
        metavar="NAME",
        help="of the weights, for the card: mit, ...",
    )
    parser.add_argument(
        "--hub", metavar="OWNER/NAME[@BRANCH]",
        help="also push the bundle to the Hugging Face hub (a new repository is private)",
    )  # fmt: skip
    parser.add_argument(
        "--public", action="store_true", help="a repository that --hub makes is seen by everyone"
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="replace the bundle of another study, and files beside a bundle",
    )
    flags.add_common(parser, "--data-root")
    parser.add_argument(
        "--verify", action="store_true", help="also evaluate the stored weights on the test split"
    )
    flags.add_common(parser, "--require-gain")
    parser.add_argument("--dry-run", action="store_true", help="say what would be exported")
    flags.add_common(parser, "--quiet", "--json")
    flags.add_plugins(parser)


def run(args: argparse.Namespace) -> int:
    """Export a study's winner; with `--verify`, say whether the weights give what is stated."""
    # These load torch.
    from ekd_ray.cli.terminal import Terminal
    from ekd_ray.remote.hub import check_login, parse_hub_name
    from ekd_ray.results.bundle_export import check_replaceable, export_bundle
    from ekd_ray.results.card import check_license
    from ekd_ray.results.exports import check_exports
    from ekd_ray.results.study import Study
    from ekd_ray.results.words import refuse_without_gain

    if is_uri(args.out):
        raise UserError(
            f"--out must be a folder of this machine for a bundle, got {args.out}: give one here."
        )
    continue_with(shlex.join(args.typed), keeps=False)
    study = Study.load(args.run)
    formats = (
        None if args.format is None else tuple(filter(None, dict.fromkeys(args.format.split(","))))
    )
    if args.normalized_input and not formats:
        raise UserError("--normalized-input is about exported programs: add --format pt2,onnx.")
    if args.public and not args.hub:
        raise UserError("--public is about a repository of the hub: add --hub OWNER/NAME.")
    check_license(args.license)
    target = parse_hub_name(args.hub) if args.hub else None
    if target:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # beside the terminal's own
        check_login("--hub")
    reason = refuse_without_gain(study.leaderboard()) if args.require_gain else ""
    if reason:
        if args.json:
            print_json({"bundle": None, "ok": False, "problems": [reason]})
        print_text(f"--require-gain: nothing is exported: {reason}", file=sys.stderr)
        return 1
    if args.dry_run:
        check_exports(formats or ())
        check_replaceable(Path(args.out), study, force=args.force)
        winner = study.best()
        further = f", and push that to {target}" if target else ""
        print_text(f"would export {winner.name} of {args.run} to {args.out}{further}")
        return 0
    with contextlib.closing(Terminal(quiet=args.quiet)) as terminal:
        terminal.stage("export", 1, 0)
        bundle = export_bundle(
            study, Path(args.out), formats=formats, normalized_input=args.normalized_input,
            license=args.license, force=args.force,
        )  # fmt: skip
        if args.verify:
            terminal.stage("test split", 1, 0)
        data_root = args.data_root or study.config.data_root
        dataset = study.config.distill.dataset
        found = bundle.verify(evaluate=args.verify, data_root=data_root, dataset=dataset)
        pushed = None
        if target and found.ok:
            terminal.stage(f"push to {target}", 1, 0)
            pushed = bundle.push_to_hub(
                target.repo, revision=target.revision, private=not args.public
            )
    if args.json:
        problems = list(found.problems)
        hub = {"hub": pushed} if target else {}
        print_json({"bundle": str(bundle.path), "ok": found.ok, "problems": problems, **hub})
    elif not args.quiet:
        _print_export(bundle, verified=args.verify and found.ok)
        if pushed:
            print_text(f"hub: {pushed}")
    if not found.ok:
        raise UserError(f"{bundle.path}: {' '.join(found.problems)}")
    return 0


def _print_export(bundle: Bundle, *, verified: bool) -> None:
    stated = bundle.metrics["model"]["test_top1"]
    note = ", reproduced by the stored weights" if verified else ""
    print_text(f"bundle: {bundle.path} ({bundle.config.student}, test top-1 {stated:.2%}{note})")
    for name, program in bundle.metrics.get("exports", {}).items():
        gap = program["largest_difference"]
        print_text(f"{name}: differs from the PyTorch model by {gap:.1g} at most")
