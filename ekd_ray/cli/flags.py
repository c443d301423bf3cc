"""Flags that several commands share.

A flag that is a setting (`add_setting`) has its type, help and bounds from the setting's field
and is stored under the setting's name, where `ekd_ray.cli.request` finds it.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Collection
from typing import Any

from ekd_ray.cli.help_text import ListSettings
from ekd_ray.config import DistillConfig, StudyConfig
from ekd_ray.config.plugins import load_plugin, module_in_name, trust_files
from ekd_ray.config.setting_list import default_text
from ekd_ray.config.settings import Settings, hints_of, limits_in_words, value_type, words_of
from ekd_ray.errors import UserError

Group = argparse.ArgumentParser | argparse._ArgumentGroup


def add_setting(
    group: Group,
    name: str,
    *flags: str,
    metavar: str | None = None,
    doc: str | None = None,
    in_recipe: bool = False,
) -> None:
    """A flag for a setting of `DistillConfig` or `StudyConfig`; repeatable where that is a list.

    Args:
        flags: its names; without any, the setting's own.
        in_recipe: the command has a recipe, whose value goes before the default.
        doc: what it means to this command, if that is not what the setting's field says.
    """
    # Not names(): those of the methods' settings, which have no flag of their own, need torch.
    cls = DistillConfig if name in DistillConfig.__dataclass_fields__ else StudyConfig
    field = cls.__dataclass_fields__[name]
    kind = value_type(cls, name)
    several = isinstance(field.default, tuple)
    notes = [*limits_in_words(field), *(["repeatable"] if several else [])]
    if default := default_text(field):
        notes.append(f"default: {'the recipe, else ' * in_recipe}{default}")
    flags = flags or (f"--{name.replace('_', '-')}",)
    text = (doc or field.metadata["doc"]) + (f" ({'; '.join(notes)})" if notes else "")
    if kind is bool:
        group.add_argument(*flags, dest=name, action="store_const", const=True, help=text)
        return
    options: dict[str, Any] = {}
    if number := _NUMBERS.get(kind):
        words = words_of(hints_of(cls)[name])
        read = functools.partial(_number_or_word, number) if words else number
        options = {"type": read if several else _within(read, name, "/".join(flags), cls)}
    group.add_argument(
        *flags,
        dest=name,
        action="append" if several else "store",
        metavar=metavar or {int: "N", float: "X"}.get(kind, flags[0].strip("-").upper()),
        help=text.replace("%", "%%"),
        **options,
    )


def whole_number(text: str) -> int:
    """A whole number, as `1_000` or `1e3` too; raises ValueError, as argparse expects."""
    try:
        return int(text)
    except ValueError:
        number = float(text)
        if not number.is_integer():
            raise
        return int(number)


whole_number.__name__ = "int"  # by which argparse names it to the user
_NUMBERS: dict[Any, Callable[[str], float]] = {int: whole_number, float: float}


def _within(number: Callable[[str], Any], name: str, flag: str, cls: type[Settings]) -> Any:
    """`number`, which refuses what its setting would, under the name of the flag."""

    def read(text: str) -> Any:
        value = number(text)
        try:
            cls.check_value(name, value)
        except UserError as error:
            raise UserError(f"{flag}{str(error).removeprefix(name)}") from None
        return value

    read.__name__ = getattr(number, "__name__", "text")
    return read


def _number_or_word(number: Callable[[str], float], text: str) -> float | str:
    """A number, or the text, which the configuration refuses unless it knows it."""
    try:
        return number(text)
    except ValueError:
        return text


def add_run_settings(
    parser: argparse.ArgumentParser,
    *,
    study: bool = False,
    in_recipe: bool = True,
    without: Collection[str] = (),
) -> argparse._ArgumentGroup:
    """Flags that say which run is meant; returns their group.

    Args:
        study: the command has the settings of a study, too.
        in_recipe: it has a recipe.
        without: settings that it refuses.
    """
    group = parser.add_argument_group("what to train")
    add_setting(group, "dataset", "--dataset", "--data", metavar="NAME", in_recipe=in_recipe)
    group.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="any setting, or a range to search it (log:LOW:HIGH, range:LOW:HIGH[:STEP], "
        "choice:A,B), or where in its range to look first (prior:CENTER:CONFIDENCE); repeatable"
        if study
        else "any setting; repeatable",
    )
    group.add_argument(
        "--list-settings",
        action=ListSettings,
        classes=(DistillConfig, StudyConfig) if study else (DistillConfig,),
        without=without,
        help="all settings that --set takes, the most used first",
    )
    add_setting(group, "epochs", in_recipe=True)  # own pictures have one, whatever the command
    for name in ("train_subset", "seed"):
        add_setting(group, name, in_recipe=in_recipe)
    add_setting(group, "ood_dataset", metavar="NAME")
    for name in ("check_images", "skip_damaged", "exclude_duplicates"):
        add_setting(group, name)
    return group


def add_pair(group: argparse._ArgumentGroup) -> None:
    """Flags that name a teacher, a student and a method."""
    group.add_argument(
        "--pair", metavar="T-S", help="T-S pair that has a recipe, see ekd-ray space list"
    )
    add_setting(group, "teacher")
    add_setting(group, "student", in_recipe=True)
    add_setting(group, "teacher_weights", metavar="FILE")
    add_setting(group, "student_weights", metavar="FILE")
    group.add_argument(
        "--teacher-zoo",
        metavar="DIR",
        help="folder of teachers by name, e.g. mdistiller's cifar_teachers",
    )
    add_setting(group, "teacher_normalization", metavar="NAME")
    add_setting(group, "teacher_key", metavar="NAME")
    add_setting(group, "min_teacher_accuracy", metavar="X")
    add_common(group, "--method")
    group.add_argument(
        "--space",
        dest="recipe",
        metavar="RECIPE",
        help="recipe instead of the pair's own: a file, or a name of ekd-ray space list "
        "(default: the pair's)",
    )


# Flags that are no settings and mean the same in every command that has them.
_COMMON: dict[str, dict[str, Any]] = {
    "--address": {
        "metavar": "HOST:PORT",
        "help": "Ray cluster to run on, or auto for one of this machine (default: $RAY_ADDRESS, "
        "else a Ray of its own)",
    },
    "--assume": {
        "metavar": "gpus=NxM",
        "help": "with --dry-run: plan for N nodes with M GPUs each, cpus=NxM for CPUs, or both "
        "with a comma between",
    },
    "--calibrated": {
        "action": "store_true",
        "help": "probabilities by the temperature that was fitted on validation images",
    },
    "--data-root": {"metavar": "DIR", "help": "folder of the data sets (default: $EKD_DATA_ROOT)"},
    "--download": {"action": "store_true", "help": "fetch missing CIFAR archives"},
    "--dry-run": {"action": "store_true", "help": "print the resolved plan and stop"},
    "--json": {"action": "store_true", "help": "results as JSON on standard output"},
    "--keep-ray-logs": {
        "action": "store_true",
        "help": "leave the folder of a Ray of its own, and say where it is (EKD_KEEP_RAY_LOGS)",
    },
    "--method": {
        "help": "the recipe under another method: a name of ekd-ray space methods, "
        "kd-standardized and the like, or any, which is searched too (default: the recipe's)",
    },
    "--quiet": {"action": "store_true", "help": "no progress, results only"},
    "--require-gain": {
        "action": "store_true",
        "help": "exit with 1 unless the winner's gain over the student alone is settled: the 95 %% "
        "interval of their difference under the fresh seeds, on the test split, is above zero",
    },
    "--resume": {"action": "store_true", "help": "continue an interrupted run"},
    "--test": {"action": "store_true", "help": "read the test split once, after the last epoch"},
}


def add_common(group: Group, *names: str) -> None:
    """Flags that several commands have."""
    for name in names:
        group.add_argument(name, **_COMMON[name])


def add_plugins(parser: argparse.ArgumentParser) -> None:
    """Flags by which the user allows other people's code to run."""
    group = parser.add_argument_group("plugins")
    group.add_argument(
        "--plugin",
        action="append",
        default=[],
        metavar="MODULE|FILE.py",
        help="code that registers models, data sets or methods; repeatable",
    )
    group.add_argument(
        "--trust-plugins",
        action="store_true",
        help="run the plugins that recipes, studies and bundles name, too",
    )


def load_plugins(args: argparse.Namespace) -> None:
    """Load what the flags name as code; keeps the stamps of the plugins as `args.plugins`."""
    models = (getattr(args, side, None) for side in ("student", "teacher", "model"))
    modules = [module for name in models if name and (module := module_in_name(name))]
    named = [*getattr(args, "plugin", ()), *modules]
    trust_files(trust=getattr(args, "trust_plugins", False))
    args.plugins = [load_plugin(name).stamp for name in dict.fromkeys(named)] or None


def add_output(parser: argparse.ArgumentParser) -> None:
    """Where the results go and how the command behaves."""
    group = parser.add_argument_group("where and how")
    group.add_argument(
        "--out",
        metavar="RUN",
        help="folder or s3://BUCKET/FOLDER to write (default: below runs/)",
    )
    add_common(group, "--data-root", "--download")
    add_setting(group, "cpus_per_trial", "--cpus-per-trial", "--cpus-per-worker")
    add_setting(group, "decode_threads")
    add_common(group, "--resume", "--dry-run", "--quiet", "--json")
    add_plugins(parser)


def add_workers(parser: argparse.ArgumentParser) -> None:
    """The flags of a command that trains one configuration on several Ray Train workers."""
    group = parser.add_argument_group("several workers")
    group.add_argument(
        "--workers",
        default="1",
        metavar="N",
        help="data-parallel Ray Train workers; MIN:MAX takes as many as there is room for "
        "(default: 1)",
    )
    add_setting(group, "gpus_per_trial", "--gpus-per-trial", "--gpus-per-worker")
    add_common(group, "--address", "--assume", "--keep-ray-logs")
