"""Measure an exported student on its test split: accuracy, calibration, uncertainty, intervals."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from ekd_ray.cli import flags
from ekd_ray.cli.output import print_json, show_during
from ekd_ray.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

    from ekd_ray.results.bundle import Bundle

EXAMPLES = (
    "ekd-ray evaluate best --ood-dataset digits --ood-dataset folder:textures",
    "ekd-ray evaluate best --score all --resamples 0",
    "ekd-ray evaluate best --corruptions --images 2000",
)
FIRST = ("--data-root", "--dataset", "--ood-dataset", "--score", "--coverage", "--resamples",
         "--corruptions")  # fmt: skip
RESAMPLES = 1000
MADE = ""  # in the place of a folder of corrupted pictures
MOST_WIDTH = 1000
# Of the first table: name -> words.
FIGURES = {
    "top1": "accuracy",
    "top5": "accuracy, five guesses",
    "balanced_top1": "balanced accuracy",
    "nll": "negative log-likelihood (nats)",
    "brier": "Brier score",
    "ece": "ECE, 15 equal-width bins",
    "ece_adaptive": "ECE, 15 bins of equally many images",
    "ece_classwise": "ECE, mean over the classes",
}
ORDER = {"aurc": "AURC", "eaurc": "E-AURC", "error_auroc": "AUROC of errors"}
APART = {"auroc": "AUROC", "aupr_in": "AUPR in", "aupr_out": "AUPR out", "fpr95": "FPR at 95 % TPR"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", metavar="BUNDLE", help="folder that ekd-ray export wrote")
    flags.add_common(parser, "--data-root")
    parser.add_argument(
        "--dataset", metavar="NAME",
        help="where its data are (folder:PATH), or others, of classes that it knows by name",
    )  # fmt: skip
    parser.add_argument(
        "--ood-dataset", action="append", metavar="NAME",
        help="out-of-distribution set: a data set (its test split), folder:PATH of any pictures, "
        "noise or constant; repeatable (default: the study's, noise and constant)",
    )  # fmt: skip
    parser.add_argument(
        "--score", action="append", default=[], metavar="NAME",
        help="further ranking of the images: max_probability, entropy, energy; of an evidential "
        "student expected_entropy, mutual_information, vacuity, differential_entropy; or all; "
        "repeatable",
    )  # fmt: skip
    parser.add_argument(
        "--coverage", action="append", type=float, metavar="SHARE",
        help="the accuracy on this share of the images, the most certain; repeatable (default: "
        "0.5, 0.8, 0.9, 0.95)",
    )  # fmt: skip
    parser.add_argument(
        "--resamples", type=flags.whole_number, default=RESAMPLES, metavar="N",
        help=f"resamples of the images for the 95 %% intervals, 0 for none (default: {RESAMPLES})",
    )  # fmt: skip
    flags.add_common(parser, "--calibrated")
    parser.add_argument(
        "--set-coverage", action="append", default=[], type=float, metavar="SHARE",
        help="how often the class is in a set of this coverage (predict --set-coverage), and how "
        "large the sets are; repeatable",
    )  # fmt: skip
    group = parser.add_argument_group("under corruptions, in place of the above")
    group.add_argument(
        "--corruptions", nargs="?", const=MADE, metavar="FOLDER",
        help="the 15 corruptions of CIFAR-10-C at 5 severities: made from the test pictures, or "
        "read from a FOLDER of published files (fog.npy, ..., labels.npy)",
    )  # fmt: skip
    group.add_argument(
        "--images", type=flags.whole_number, metavar="N",
        help="so many test pictures, evenly spaced (default: all)",
    )  # fmt: skip
    group.add_argument(
        "--seed", type=flags.whole_number, default=0, metavar="N",
        help="of what the corruptions draw (default: 0)",
    )  # fmt: skip
    flags.add_common(parser, "--quiet", "--json")
    flags.add_plugins(parser)


def run(args: argparse.Namespace) -> int:
    """Read the test split once, and print what was measured."""
    # These load torch and rich.
    from ekd_ray.engine.measure.assessment import COVERAGES
    from ekd_ray.engine.measure.uncertainty import SCORES, default_score
    from ekd_ray.results.bundle import Bundle
    from ekd_ray.studies.places import find_data_root

    bundle = Bundle.load(args.bundle)
    if args.corruptions is not None:
        return _corrupt(bundle, args)
    if args.images is not None:
        raise UserError("--images is about --corruptions: give that too, or leave it out.")
    shares = args.coverage or COVERAGES
    with show_during("evaluating ...", quiet=args.quiet or args.json):
        found = bundle.evaluate(
            dataset=args.dataset, data_root=find_data_root(args.data_root),
            ood_datasets=args.ood_dataset, scores=args.score, coverages=shares,
            resamples=args.resamples, calibrated=args.calibrated, set_coverages=args.set_coverage,
        )  # fmt: skip
    if args.json:
        print_json(found)
        return 0
    values = {name.removeprefix("test_"): value for name, value in found.items()}
    default = default_score(bundle.weights.log_prior)
    sets = {
        f"set_{figure}_{100 * share:g}": f"{text} at {share:g}"
        for share in args.set_coverage
        for figure, text in (("coverage", "class in its set"), ("size", "classes in a set"))
    }
    table = table_of_figures(values, FIGURES | sets, shares, default, list(SCORES))
    _print_whole(table)
    return 0


def _print_whole(table: Table) -> None:
    """Print it as wide as it is: a line that the terminal breaks is better than one cut short."""
    from ekd_ray.cli.console import Console  # loads rich

    console = Console()
    wanted = console.measure(table, options=console.options.update(width=MOST_WIDTH)).maximum
    console.width = max(console.width, wanted)
    console.print(table)


def _corrupt(bundle: Bundle, args: argparse.Namespace) -> int:
    """Measure and print what is left under corruptions."""
    # As above.
    from rich import box
    from rich.progress import Progress
    from rich.table import Table

    from ekd_ray.cli.console import Console
    from ekd_ray.data.corruptions import SEVERITIES
    from ekd_ray.engine.measure.shift import METRICS
    from ekd_ray.results.robustness import measure_corruptions
    from ekd_ray.studies.places import find_data_root

    for name, value, usual in (
        ("--ood-dataset", args.ood_dataset, None), ("--score", args.score, []),
        ("--coverage", args.coverage, None), ("--set-coverage", args.set_coverage, []),
        ("--calibrated", args.calibrated, False), ("--resamples", args.resamples, RESAMPLES),
    ):  # fmt: skip
        if value != usual:
            raise UserError(f"{name} is not for --corruptions, got {value}: leave one out.")
    console = Console(stderr=True)
    silent = args.quiet or args.json or not console.is_terminal
    with Progress(console=console, transient=True, disable=silent) as bar:
        task = bar.add_task("corruptions", total=None)
        found = measure_corruptions(
            bundle, dataset=args.dataset, data_root=find_data_root(args.data_root),
            images=args.images, seed=args.seed, published=args.corruptions or None,
            on_progress=lambda done, total: bar.update(task, completed=done, total=total),
        )  # fmt: skip
    if args.json:
        print_json({**asdict(found), "mean_corruption_error": found.mean_corruption_error})
        return 0
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("severity", "clean", *map(str, SEVERITIES), "mean error"):
        table.add_column(column, no_wrap=True, justify="left" if column == "severity" else "right")
    for name, error in found.corruption_errors.items():
        accuracies = [row.top1 for row in found.rows if row.corruption == name]
        table.add_row(name.replace("_", " "), "", *(f"{v:.2%}" for v in accuracies), f"{error:.2%}")
    table.add_section()
    for metric, text in zip(METRICS, ("accuracy", "NLL (nats)", "ECE", "AURC"), strict=True):
        mean = found.mean_corruption_error if metric == "top1" else None
        values = (f"{value:.4f}" for value in found.by_severity(metric))
        table.add_row(text, *values, "" if mean is None else f"{mean:.2%}")
    _print_whole(table)
    return 0


def table_of_figures(
    values: dict[str, float],
    figures: dict[str, str],
    coverages: Sequence[float],
    default: str,
    scores: Sequence[str],
) -> Table:
    """Figures in words, those of a ranking with a column a score, the default one first."""
    from rich import box
    from rich.table import Table

    others = [name for name in scores if name != default and f"{name}_aurc" in values]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("figure", *(f"by {name}" for name in (default, *others))):
        table.add_column(column, no_wrap=True)

    def add_rows(texts: dict[str, str]) -> None:
        table.add_section()
        for name, text in texts.items():
            if name in values:
                table.add_row(text, *(_cell(values, f"{p}{name}") for p in prefixes))

    prefixes = ["", *(f"{name}_" for name in others)]
    add_rows(figures)
    add_rows(ORDER)
    add_rows(
        {f"top1_at_{100 * share:g}": f"accuracy at coverage {share:.3g}" for share in coverages}
    )
    end = "_fpr95"
    for outside in (n[4 : -len(end)] for n in values if n.startswith("ood_") and n.endswith(end)):
        add_rows({f"ood_{outside}_{name}": f"{outside}: {text}" for name, text in APART.items()})
    return table


def _cell(values: dict[str, float], name: str) -> str:
    if name not in values:
        return ""
    shown = ".2%" if "top1" in name or name.endswith("recall") else ".4f"
    text = format(values[name], shown)
    if f"{name}_low" not in values:
        return text
    return f"{text} [{values[f'{name}_low']:{shown}}, {values[f'{name}_high']:{shown}}]"
