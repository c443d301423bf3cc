"""The last sections of the page: what failed, and how to have it all again."""

from __future__ import annotations

import shlex
from collections import Counter
from pathlib import Path

from ekd_ray.data import short_name
from ekd_ray.results.report.content import Content
from ekd_ray.results.report.parts import Section, esc, label, several, table, value_text

LEFT_OUT = 200  # rows of a table beyond which the rest is only counted


def failures(content: Content) -> Section:
    """Trials and runs that failed, with their reasons."""
    rows = [
        [f"trial {r.number}", r.reason or "unknown",
         ", ".join(f"{k}={value_text(v)}" for k, v in r.params.items())]
        for r in content.ended if r.status == "failed"
    ] + [
        [f"{label(row['name'])}, seed {row['seed']} ({row['stage']})", row["reason"], ""]
        for row in content.confirmed if row.get("reason")
    ]  # fmt: skip
    if not rows:
        return Section(name="failures", title="Failures", takeaway="Nothing failed.")
    reasons = Counter(row[1] for row in rows).most_common(1)[0]
    takeaway = f"{several(len(rows), 'run')} failed; the most frequent reason: {reasons[0]}"
    rest = len(rows) - LEFT_OUT
    after = f'<p class="note">And {rest} more.</p>' if rest > 0 else ""
    return Section(
        name="failures", title="Failures", takeaway=takeaway,
        body=table(["run", "reason", "settings"], rows[:LEFT_OUT]), after=after,
    )  # fmt: skip


def reproduce(content: Content) -> Section:
    """The commands, and what the figures were made with."""
    run, header = _run_name(content.study.path), content.study.header
    shared = content.config.distill
    commands = [
        "# the figures of this page in the terminal",
        f"python launchers/show.py {run}",
        "# continue the study, or add trials",
        f"python launchers/tune_cifar.py --resume --out {run} --extend 16",
    ]
    if content.winner:
        data = "" if shared.dataset in ("digits", "synthetic") else " --data-root DATA"
        commands += [
            "# the winner's weights, configuration and evidence, also as programs",
            f"python launchers/export_best.py {run} --out best --format pt2,onnx",
            "# train the winner again and compare; a bundle elsewhere takes --teacher-weights FILE",
            f"python launchers/reproduce.py {run}/best{data}",
        ]
    environment = header.get("environment") or {}
    packages = environment.get("packages") or {}
    facts = [
        ("data set", short_name(shared.dataset)), ("student", shared.student),
        ("teacher", shared.teacher), ("teacher's SHA-256", shared.teacher_sha256),
        ("method", shared.method), ("epochs", shared.epochs),
        ("seed of the search", content.config.seed),
        ("study's fingerprint", header.get("fingerprint")),
        ("git revision", environment.get("git_revision")),
        ("processor", environment.get("processor")),
        ("GPUs", ", ".join(environment.get("gpus") or []) or "none"),
        ("packages", ", ".join(f"{k} {v}" for k, v in packages.items())),
    ]  # fmt: skip
    rows = [[name, str(value)] for name, value in facts if value not in (None, "")]
    return Section(
        name="reproduce", title="Reproduce",
        takeaway="The same seed on the same machine and number of threads gives the same bits.",
        body=f"<pre><code>{esc(chr(10).join(commands))}</code></pre>",
        after=table(["", ""], rows)
        + '<p class="note">Every setting of the study is in its study.yaml, every setting of the '
        "winner in best/distill.yaml.</p>",
    )  # fmt: skip


def _run_name(path: Path) -> str:
    """The study's folder as it is typed where the report is made; a page that may be shown to
    others names no folder above that."""
    path = path.absolute()
    inside = path.is_relative_to(Path.cwd()) and path != Path.cwd()
    return shlex.quote(str(path.relative_to(Path.cwd())) if inside else path.name)
