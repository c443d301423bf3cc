"""Which method distils best: rows of configurations under the same seeds, on real pictures.

python -m benchmarks.evidence methods --pair resnet56a-resnet8 --train-subset 10000 --epochs 15 \\
    --seeds 5 --json out.json

Every row trains under every seed, with one split for all, and reads the test split once at its
end; differences to the first row are paired by seed. Nothing is chosen by what is found here;
`--tuned kd=runs/kd` adds a row at the values that a study has chosen on its validation split.
`--evidential-teacher FILE` adds the forms of EKD under that teacher. With `--keep FILE` a run that
was cut off goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.measure import machine
from ekd_ray.config import DistillConfig
from ekd_ray.files import sha256_file, write_json
from ekd_ray.losses.methods import METHODS, with_method
from ekd_ray.results import Study
from ekd_ray.results.paired import LEVEL, Paired, mean_interval, paired_difference
from ekd_ray.scale.cluster import local_cpus
from ekd_ray.studies.recipes import load_recipe

Row = dict[str, Any]  # the settings in which a row differs
FORMS: dict[str, Row] = {
    "first order": {"method": "ekd", "ekd_weight": 0.0},  # it has no evidence function
    **{
        f"{evidence}, {orders}": {"method": "ekd", "evidence": evidence, **weights}
        for evidence in ("softplus", "log1p_softplus")
        for orders, weights in {"both orders": {}, "second order": {"kd_weight": 0.0}}.items()
    },
}
UNDER_EVIDENTIAL = ", evidential teacher"  # ends the name of a row with that teacher
PUBLISHED: dict[str, Row] = {
    "kd": {"method": "kd"},
    "dkd": {"method": "dkd"},
    "kd-standardized": {"method": "kd", "standardize": True},
}
ALONE: dict[str, Row] = {  # `evidential` is EKD with neither order
    "none": {"method": "none"},
    "evidential": {"method": "evidential"},
}
# The first row is what the others are compared with.
TABLES: dict[str, dict[str, Row]] = {
    "methods": {
        "kd": {"method": "kd"},
        **{name: {"method": name} for name in METHODS if name != "kd"},
        **{
            f"{name}-standardized": {"method": name, "standardize": True}
            for name, method in METHODS.items()
            if "standardize" in method.setting_names
        },
    },
    "forms": {
        **PUBLISHED,
        **ALONE,
        **FORMS,
        **{f"{name}{UNDER_EVIDENTIAL}": row for name, row in FORMS.items()},
    },
    # The cost of speed in accuracy.
    "arithmetic": {
        "bfloat16, cached logits": {"precision": "bfloat16", "teacher_cache": "on"},
        "float32, live teacher": {"precision": "float32", "teacher_cache": "off"},
    },
}
FIGURES = {  # as the table heads them
    "val_top1": "validation top-1, %", "test_top1": "test top-1, %", "test_nll": "NLL",
    "test_ece": "ECE", "test_aurc": "AURC", "test_ood_noise_auroc": "AUROC, noise",
    "test_ood_auroc": "AUROC, other data",
}  # fmt: skip
TEACHER_FILE = "teachers/cifar10_resnet56a_jpeg.th"  # below the data root


def parse() -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--rows", metavar="'NAME; ...'", help="these, beside the first (all)")
    parser.add_argument("--pair", default="resnet56a-resnet8", metavar="T-S")
    parser.add_argument("--dataset", default="cifar10", metavar="NAME")
    parser.add_argument("--method", metavar="NAME", help="of rows that name none (the recipe's)")
    parser.add_argument("--data-root", default=os.environ.get("EKD_DATA_ROOT"), metavar="DIR")
    parser.add_argument("--teacher-weights", metavar="FILE", help=f"(DIR/{TEACHER_FILE})")
    parser.add_argument("--teacher-normalization", default="imagenet", metavar="NAME")
    parser.add_argument("--evidential-teacher", metavar="FILE", help="weights as we write them")
    parser.add_argument(
        "--tuned",
        action="append",
        default=[],
        metavar="ROW=RUN",
        help="also ROW at what the study RUN found; repeatable",
    )
    parser.add_argument("--ood-dataset", default="digits", metavar="NAME")
    parser.add_argument("--train-subset", type=int, default=10_000, metavar="N")
    parser.add_argument("--validation-fraction", type=float, default=0.2, metavar="X")
    parser.add_argument("--epochs", type=int, default=15, metavar="N")
    parser.add_argument("--lr", type=float, metavar="X", help="(the recipe's)")
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="at least 3 (5)")
    parser.add_argument("--keep", type=Path, metavar="FILE", help="figures of runs as JSON lines")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    args = parser.parse_args()
    find_teacher(parser, args)
    if args.seeds < 3:
        parser.error(f"--seeds must be >= 3 for an interval, got {args.seeds}")
    there = {
        name: row for name, row in TABLES[args.table].items()
        if args.evidential_teacher or not name.endswith(UNDER_EVIDENTIAL)
    }  # fmt: skip
    names = args.rows.split("; ") if args.rows else [*there]
    if wrong := [text for text in args.tuned if "=" not in text]:
        parser.error(f"--tuned takes ROW=RUN, got {wrong[0]!r}")
    tuned = dict(text.split("=", 1) for text in args.tuned)
    if unknown := [name for name in (*names, *tuned) if name not in there]:
        parser.error(f"there is no row {unknown[0]!r}: {'; '.join(there)}")
    first = next(iter(there))
    args.rows = {name: there[name] for name in dict.fromkeys([first, *names])}
    for name, study in tuned.items():
        args.rows[f"{name}, tuned"] = {**there[name], **values_found(study)}
    return args


def find_teacher(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Set `args.teacher_weights` to those of the data root, unless others are given."""
    if args.data_root and not args.teacher_weights:
        args.teacher_weights = os.path.join(args.data_root, TEACHER_FILE)
    if not (args.teacher_weights and os.path.exists(args.teacher_weights)):
        parser.error("needs a teacher: give --teacher-weights, or --data-root with one in it")


def values_found(study: str) -> Row:
    """The searched settings of a study's winner, or of its best trial before it is confirmed."""
    found = Study.load(study)
    return {name: getattr(found.best().config, name) for name in found.config.space or {}}


def configuration(args: argparse.Namespace, name: str, seed: int) -> DistillConfig:
    """The run of a row under a seed: the pair's recipe, its solver, and the method's defaults."""
    recipe = load_recipe(f"{args.dataset}/{args.pair}")["distill"]
    teacher, _, student = args.pair.partition("-")
    given = {
        "dataset": args.dataset, "teacher": teacher, "student": student,
        "teacher_weights": args.teacher_weights, "ood_dataset": args.ood_dataset,
        "teacher_normalization": args.teacher_normalization, "train_subset": args.train_subset,
        "validation_fraction": args.validation_fraction, "epochs": args.epochs,
        "seed": seed, "split_seed": 0,
    }  # fmt: skip
    if name.endswith(UNDER_EVIDENTIAL):  # its file says how it was normalised
        given |= {"teacher_weights": args.evidential_teacher, "teacher_normalization": None}
    solver = {name: recipe[name] for name in ("batch_size", "lr", "schedule") if name in recipe}
    solver |= {"lr": args.lr} if args.lr else {}
    settings = dict(args.rows[name])
    method = settings.pop("method", args.method or recipe["method"])
    return with_method(DistillConfig(**given, **solver), method, **settings)


def name_run(config: DistillConfig, args: argparse.Namespace) -> str:
    """The fingerprint of a run's settings, and of the evidential teacher where it has that one.

    Fingerprints say nothing of weights, and an evidential teacher can be trained anew.
    """
    given = args.evidential_teacher
    if given is None or config.teacher_weights != given:
        return config.fingerprint()
    return f"{config.fingerprint()}-{sha256_file(Path(given))[:8]}"


def run(settings: dict[str, Any], data_root: str) -> dict[str, float]:
    """Train one configuration on one thread; figures of its last epoch and of the test split."""
    import ekd_ray

    with tempfile.TemporaryDirectory() as folder:
        result = ekd_ray.distill(
            config=DistillConfig.from_dict(settings), out=Path(folder) / "run",
            data_root=data_root, test=True, progress=False, cpus_per_trial=1,
        )  # fmt: skip
        return {name: result.metrics[name] for name in FIGURES}


def read_kept(path: Path | None) -> dict[tuple[str, int], dict[str, float]]:
    """Figures by fingerprint and seed; a line that a kill cut off is trained again."""
    known = {}
    if path and path.exists():
        text = path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        path.write_text(whole, encoding="utf-8")  # what comes next begins a line
        for line in whole.splitlines():
            entry = json.loads(line)
            known[entry["run"], entry["seed"]] = entry["figures"]
    return known


def measure(args: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """The figures of each row, in the order of the seeds."""
    known = read_kept(args.keep)
    jobs = {
        (name, seed): configuration(args, name, seed)
        for seed in range(args.seeds)  # all rows under a seed, then the next
        for name in args.rows
    }
    keys = {job: (name_run(config, args), job[1]) for job, config in jobs.items()}
    due = {job: config for job, config in jobs.items() if keys[job] not in known}
    # The runs are many and small: one thread each, as many at once as there are cores.
    with ProcessPoolExecutor(local_cpus(), mp_context=get_context("spawn")) as pool:
        begun = {
            pool.submit(run, config.to_dict(), args.data_root): job for job, config in due.items()
        }
        for count, ended in enumerate(as_completed(begun), start=1):
            job = begun[ended]
            known[keys[job]] = ended.result()
            if args.keep:
                entry = {"run": keys[job][0], "row": job[0], "seed": job[1],
                         "figures": known[keys[job]]}  # fmt: skip
                with open(args.keep, "a", encoding="utf-8") as file:
                    file.write(json.dumps(entry) + "\n")
            print(f"{count}/{len(due)} {job[0]}, seed {job[1]}", file=sys.stderr, flush=True)
    return {name: [known[keys[name, seed]] for seed in range(args.seeds)] for name in args.rows}


def summarize(found: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Values, mean, interval, and difference to the first row, of each row and figure."""
    first = next(iter(found.values()))
    return {
        name: {
            figure: {
                "values": (values := [run[figure] for run in runs]),
                "mean": statistics.fmean(values),
                "interval": mean_interval(values),
                "difference": vars(paired_difference(values, [run[figure] for run in first])),
            }
            for figure in FIGURES
        }
        for name, runs in found.items()
    }


def write_table(rows: dict[str, Any]) -> str:
    """The rows as a table in Markdown, by test accuracy: mean ± half of its interval; * differs
    from the first row."""
    lines = [f"| row | {' | '.join(FIGURES.values())} |", "|---" * (1 + len(FIGURES)) + "|"]
    for name in sorted(rows, key=lambda name: -rows[name]["test_top1"]["mean"]):
        cells = []
        for figure in FIGURES:
            scale, digits = (100, 1) if figure.endswith("top1") else (1, 2)
            entry = rows[name][figure]
            apart = "*" if Paired(**entry["difference"]).sign else ""
            low, high = entry["interval"]
            cells.append(
                f"{scale * entry['mean']:.{digits}f} ± {scale * (high - low) / 2:.{digits}f}{apart}"
            )
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Train all rows under all seeds, print the table and write the figures."""
    args = parse()
    rows = summarize(measure(args))
    print(write_table(rows))
    if args.json:
        write_json(args.json, {
            "machine": machine(1), "level": LEVEL, "seeds": list(range(args.seeds)),
            "command": f"python -m benchmarks.evidence {shlex.join(_typed(sys.argv[1:]))}",
            "settings": {name: configuration(args, name, 0).without_places().to_dict()
                         for name in args.rows},
            "rows": rows,
        })  # fmt: skip


def _typed(words: list[str]) -> list[str]:
    """The command's words without places of this machine; of a study its folder's name."""
    places = ("--data-root", "--teacher-weights", "--evidential-teacher", "--keep", "--json")
    return [
        f"{word.partition('=')[0]}={Path(word).name}" if before == "--tuned" else word
        for before, word in zip(["", *words], words, strict=False)
        if before not in places and word not in places
    ]


if __name__ == "__main__":
    main()
