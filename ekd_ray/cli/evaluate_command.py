"""Measure an exported student on its test split: accuracy, calibration, uncertainty, intervals."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ekd_ray.cli import flags
from ekd_ray.cli.output import print_json, show_during

if TYPE_CHECKING:
    from rich.table import Table

EXAMPLES = (
    "ekd-ray evaluate best --ood-dataset digits --ood-dataset folder:textures",
    "ekd-ray evaluate best --score all --resamples 0",
)
FIRST = ("--data-root", "--dataset", "--ood-dataset", "--score", "--coverage", "--resamples")
RESAMPLES = 1000
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
    flags.add_common(parser, "--quiet", "--json")
    flags.add_plugins(parser)


def run(args: argparse.Namespace) -> int:
    """Read the test split once, and print what was measured."""
    # These load torch and rich.
    from ekd_ray.cli.console import Console
    from ekd_ray.engine.measure.assessment import COVERAGES
    from ekd_ray.engine.measure.uncertainty import SCORES, default_score
    from ekd_ray.results.bundle import Bundle
    from ekd_ray.studies.places import find_data_root

    bundle = Bundle.load(args.bundle)
    shares = args.coverage or COVERAGES
    with show_during("evaluating ...", quiet=args.quiet or args.json):
        found = bundle.evaluate(
            dataset=args.dataset, data_root=find_data_root(args.data_root),
            ood_datasets=args.ood_dataset, scores=args.score, coverages=shares,
            resamples=args.resamples,
        )  # fmt: skip
    if args.json:
        print_json(found)
        return 0
    values = {name.removeprefix("test_"): value for name, value in found.items()}
    default = default_score(bundle.weights.log_prior)
    table, console = table_of_figures(values, shares, default, list(SCORES)), Console()
    # A line that the terminal breaks is better than one cut short.
    wanted = console.measure(table, options=console.options.update(width=MOST_WIDTH)).maximum
    console.width = max(console.width, wanted)
    console.print(table)
    return 0


def table_of_figures(
    values: dict[str, float], coverages: Sequence[float], default: str, scores: Sequence[str]
) -> Table:
    """Figures in words, those of a ranking with a column a score, the default one first."""
    from rich import box
    from rich.table import Table

    others = [name for name in scores if name != default and f"{name}_aurc" in values]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("figure", default, *others):
        table.add_column(column, no_wrap=True)

    def add_rows(texts: dict[str, str]) -> None:
        table.add_section()
        for name, text in texts.items():
            if name in values:
                table.add_row(text, *(_cell(values, f"{p}{name}") for p in prefixes))

    prefixes = ["", *(f"{name}_" for name in others)]
    add_rows(FIGURES)
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
    if f"{name}_low" not in values:
        return f"{values[name]:.4f}"
    return f"{values[name]:.4f} [{values[f'{name}_low']:.4f}, {values[f'{name}_high']:.4f}]"
