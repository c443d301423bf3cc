"""The report's page: its sentences, its figures, and that nothing in it can run or be loaded."""

from __future__ import annotations

import base64
import gzip
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import plotly.graph_objects as go
import pytest
import torch
from PIL import Image
from report_studies import CLASSES, EVIL, SPACE, final, finished, predictions, searched, select
from scipy.stats import binomtest
from sklearn.metrics import confusion_matrix

from ekd_ray.config import DistillConfig, StudyConfig
from ekd_ray.data import datasets
from ekd_ray.engine import rundata
from ekd_ray.engine.measure.gallery import FILE as GALLERY
from ekd_ray.engine.measure.gallery import Gallery
from ekd_ray.engine.measure.metrics import expected_calibration_error
from ekd_ray.engine.measure.predictions import FILE, Predictions
from ekd_ray.engine.measure.ranking import aurc
from ekd_ray.engine.pictures import reliability_bins
from ekd_ray.errors import UserError
from ekd_ray.results import Study
from ekd_ray.results.leaderboard import Lead, Leaderboard, Row
from ekd_ray.results.paired import Paired
from ekd_ray.results.report import script_json, search_figures, winner_figures, write_report
from ekd_ray.results.report.content import describe_parameters, gather_all, write_headline
from ekd_ray.results.report.measures import (
    correlation_gap,
    risk_over_coverage,
    wilson_interval,
)
from ekd_ray.results.templating import keep_flags
from ekd_ray.results.words import describe_lead
from ekd_ray.studies import pipeline

SECTIONS = ("certainty", "leaderboard", "curves-section", "parameters", "trade-off", "errors",
            "calibration", "teacher", "time-section", "failures", "reproduce")  # fmt: skip
CHARTS = ("validation-differences", "differences", "board", "curves", "importance", "parallel",
          "contour", "slice-0", "slice-2", "front", "confusion", "classes", "reliability", "risk",
          "correlation-0", "tsne-0", "tsne-1", "time")  # fmt: skip


def gather(study):
    return gather_all(study)


class Elements(HTMLParser):
    """Which elements and attributes the page has, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture
def page(reported):
    return reported[1]


def charts_of(page):
    text = re.search(r'<script type="application/json" id="charts">(.*?)</script>', page, re.S)
    return json.loads(text[1])


def test_every_part_of_the_report_is_there(page):
    for name in SECTIONS:
        assert f'<section id="{name}">' in page
    assert set(CHARTS) <= set(charts_of(page))
    for name in charts_of(page):
        assert f'id="{name}" role="img"' in page


def test_no_figure_is_empty(page):
    for name, chart in charts_of(page).items():
        figure = go.Figure(data=chart["data"], layout=chart["layout"])
        assert figure.data, name
        for trace in figure.data:
            shown = trace.z if trace.type in ("contour", "heatmap") else trace.x
            assert len(shown) > 0, name


def test_slices_show_our_trials_and_what_the_model_expects(reported):
    content = gather(reported[0])
    scores = {r.number: r.last["val_top1"] for r in content.ended if r.status == "complete"}
    for chart in search_figures.draw_slices(content):
        name, (*expected_there, trace) = chart.title, chart.figure.data
        shown = str if name == "optimizer" else float
        record = content.best_trial
        value = content.model.expect([record.params])[0][0]
        near = min(
            abs(y - value) for x, y in zip(expected_there[-1].x, expected_there[-1].y, strict=True)
            if x == record.params[name] or name != "optimizer"
        )  # fmt: skip
        assert near < 0.02 and "has not seen" in chart.summary
        expected = {(f"trial {r.number}", shown(r.params[name]), scores[r.number])
                    for r in content.ended if r.number in scores}  # fmt: skip
        assert set(zip(trace.text, trace.x, trace.y, strict=True)) == expected
    best = max(scores, key=lambda number: scores[number])
    strongest = next(search_figures.draw_parallel(content)).figure.data[-1]
    assert dict(strongest.customdata)["lr"] == f"{content.ended[best].params['lr']:.3g}"


def test_the_page_is_one_file_that_loads_nothing(page):
    found = Elements(page)
    packed = re.search(r'<script type="application/gzip" id="plotly">(.*?)</script>', page, re.S)
    assert b"plotly.js v" in gzip.decompress(base64.b64decode(packed[1]))[:2000]
    assert len(page) < 2_500_000
    loads = [v for k, v in found.attributes if k in ("src", "href", "action", "srcset")]
    assert all(v.startswith(("#", "data:")) for v in loads), loads
    assert "default-src 'none'" in page


def test_text_of_others_is_text(page):
    found = Elements(page)
    assert EVIL not in page
    assert EVIL in " ".join(found.text)  # the failure's reason, unescaped by the parser
    assert found.tags.count("script") == 3
    labels = json.dumps(charts_of(page))
    assert "<script" not in labels and "&lt;script" in labels  # a class's name


def test_a_flag_is_not_broken_at_the_end_of_a_line():
    text = keep_flags("<b> try --teacher-normalization.")
    assert text == '&lt;b&gt; try <span class="flag">--teacher-normalization</span>.'


@pytest.mark.parametrize("text", ["</script>", "<!--", "&amp;", "\u2028"])
def test_json_cannot_leave_its_script_element(text):
    written = script_json({"x": text})
    assert "<" not in written and ">" not in written
    assert json.loads(written) == {"x": text}


def test_a_data_sets_name_is_text_too(maker):
    study = searched(maker)
    evil = study.config.distill.replace(dataset=f"folder:/{EVIL}")
    changed = Study(path=study.path, config=study.config.replace(distill=evil), header={})
    text = write_report(changed).read_text(encoding="utf-8")
    assert EVIL not in text and Elements(text).tags.count("script") == 3


def test_the_headline_says_who_is_beaten_and_who_is_not(reported):
    content = gather(reported[0])
    sentence, lead = write_headline(content)
    assert (
        sentence.startswith(f"No gain shown over KD: {content.winner.name}") and "61.2" in sentence
    )
    assert (
        "better than the authors' values and the student alone and not told apart from KD"
        in sentence
    )
    assert "3 seeds" in lead and "3 fresh seeds" in lead and "Try more seeds" in lead


def test_a_winner_that_loses_is_not_praised(maker):
    study = maker.study()
    maker.trial(1, [0.5] * 9)
    maker.confirm(
        [select("trial 1", s, 0.5) for s in (1, 2, 3)]
        + [final("trial 1", s, v) for s, v in enumerate((0.50, 0.51, 0.52))]
        + [final("kd", s, v) for s, v in enumerate((0.60, 0.612, 0.62))]
    )
    sentence, _ = write_headline(gather(study))
    assert "worse than KD" in sentence
    text = write_report(study).read_text(encoding="utf-8")
    assert "not the best by test: KD is 10.07 points above" in text


def test_the_headline_names_once_what_the_winner_does_not_beat(maker):
    study = maker.study()
    maker.trial(1, [0.5] * 9)
    maker.confirm(
        [select("trial 1", s, 0.5) for s in (1, 2, 3)]
        + [final("trial 1", s, v) for s, v in enumerate((0.50, 0.51, 0.99))]
        + [final("kd", s, v) for s, v in enumerate((0.61, 0.50, 0.57))]
        + [final("none", s, v) for s, v in enumerate((0.62, 0.50, 0.55))]
    )
    content = gather(study)
    sentence, _ = write_headline(content)
    assert sentence.count("KD") == 1 and sentence.count("student alone") == 1
    assert "not told apart from them" in sentence
    chart = next(winner_figures.draw_leaderboard(content)).figure
    ends = [
        (mark.x[0] - mark.error_x.arrayminus[0], mark.x[0] + mark.error_x.array[0])
        for mark in chart.data
        if mark.error_x.array is not None
    ]
    assert len(ends) == 3 and all(-1e-9 <= low < high <= 1 + 1e-9 for low, high in ends)


def test_a_champion_that_wins_is_named_and_what_is_not_settled_is_said(maker):
    study = maker.study()
    confirm = [
        select(name, seed, 0.5 + better + 0.01 * seed * (-1) ** (seed + n), role="champion")
        for n, (name, better) in enumerate({"authors' values": 0.03, "defaults": 0.0}.items())
        for seed in (1, 2, 3)
    ]
    confirm += [final("authors' values", seed, 0.6, role="champion") for seed in (1, 2, 3)]
    confirm += [final("defaults", seed, 0.5, role="champion") for seed in (1, 2, 3)]
    for row in confirm:  # as confirm leaves them
        row |= {"trial": 0, "equals": json.dumps(["from other"])} if "auth" in row["name"] else {}
    maker.confirm(confirm)
    content = gather(study)
    assert write_headline(content)[0].startswith("The authors' values win with 60.0")
    assert (content.board[0].role, content.board[1].role) == ("winner", "champion")
    text = " ".join(Elements(write_report(study).read_text(encoding="utf-8")).text)
    assert "pictures: 3 seeds do not tell the winner from the next best, defaults (90 %" in text
    assert "authors' values (winner, also from other and trial 0 of this study)" in text


def test_a_champion_that_was_out_after_fewer_seeds_is_compared_over_these(maker):
    """On the test split it has all of them."""
    study = maker.study()
    scores = {"trial 0": (0.6, 0.5, 0.1), "authors' values": (0.3, 0.4)}
    confirm = [
        select(name, seed, value, role="champion" if "auth" in name else "finalist")
        for name, values in scores.items()
        for seed, value in enumerate(values)
    ]
    confirm += [
        final(name, seed, 0.5 - 0.1 * n, role="champion" if n else "finalist")
        for n, name in enumerate(scores)
        for seed in range(3)
    ]
    maker.confirm(confirm)
    (found,) = study.validation_differences().values()
    assert (found.mean, found.n, found.low) == (pytest.approx(0.2), 2, None)
    assert study.differences()["authors' values"].n == 3
    page = write_report(study).read_text(encoding="utf-8")
    assert "validation-differences" in charts_of(page)


@pytest.mark.parametrize(("n", "settled", "said"), [
    (1, False, "1 seed does not tell"), (3, False, "3 seeds do not tell"),
    (1, True, "1 seed tells"), (3, True, "3 seeds tell"),
])  # fmt: skip
def test_verb_and_number_agree(n, settled, said, monkeypatch):
    lead = Lead(over="kd", difference=Paired(mean=0.1, low=None, high=None, n=n), settled=settled)
    monkeypatch.setattr(Leaderboard, "lead", lead)
    rows = [Row(name=name, config=DistillConfig(), val=(0.5,)) for name in ("none", "kd")]
    assert f": {said} the winner" in describe_lead(Leaderboard(rows, StudyConfig()))


def test_a_trial_beyond_the_range_that_the_recipe_begins_with_is_drawn_and_modelled(maker):
    """The teacher places the range of `log_prior`: here -0.5 .. 1.5, of -3 .. 1 in the file."""
    space = {"log_prior": {"low": -3.0, "high": 1.0, "around_prior": 1.0}}
    study = maker.study(space=space, rungs=[1])
    for number in range(9):
        prior = number / 4 - 0.5
        maker.trial(number, [0.4 + (1.25 - prior) ** 2 / 9] * 9, status="complete", log_prior=prior)
    content = gather_all(Study.load(study.path))
    (chart,) = search_figures.draw_slices(content)
    low, high = chart.figure.layout.xaxis.range
    assert low < -3 and high > 1.5, "no dot lies outside of its axis"
    (one, other), *_ = content.model.expect([{"log_prior": 1.0}, {"log_prior": 1.5}])
    assert abs(one - other) > 1e-6, "1 and 1.5 are two places of the model"


def test_one_trial_is_no_chart_of_the_parameters_and_the_page_says_why(maker):
    study = maker.study(space=SPACE, rungs=[1])
    maker.trial(0, [0.5] * 9, status="complete", lr=0.01, momentum=0.5, optimizer="sgd")
    page = write_report(study).read_text(encoding="utf-8")
    assert "slice-0" not in charts_of(page) and "1 trial of full length: too few" in page


def test_few_trials_of_full_length_rank_no_parameter(maker):
    """Seven are too few, however many were stopped early; eight are not."""
    study = maker.study(space=SPACE, rungs=[1])
    for number in range(30):
        whole, score = number < 7, 0.5 + number / 100
        maker.trial(number, [score] * (9 if whole else 1), status="complete" if whole else "pruned",
                    lr=0.001 * (number + 1), momentum=number / 40, optimizer="sgd")  # fmt: skip
    charts = charts_of(write_report(study).read_text(encoding="utf-8"))
    assert not {"importance", "parallel", "contour"} & set(charts) and "slice-0" in charts
    found = describe_parameters(gather(study))
    assert found.startswith("7 trials of full length: too few")
    maker.trial(30, [0.99] * 9, lr=0.05, momentum=0.9, optimizer="adamw")
    content = gather(Study.load(study.path))
    assert "mattered most" in describe_parameters(content)
    (parallel,) = search_figures.draw_parallel(content)
    assert {row[0] for row in parallel.rows} == {*range(7), 30}


def test_a_running_study_has_a_report_without_test_figures(maker):
    study = searched(maker)
    folder = maker.path / "trials" / "0024"
    folder.mkdir()
    (folder / "config.yaml").write_text(study.config.distill.replace(lr=0.01).to_yaml())
    (folder / "history.jsonl").write_text(json.dumps({"epoch": 1, "val_top1": 0.2}) + "\n")
    page = write_report(study).read_text(encoding="utf-8")
    assert "The study is in its search stage" in page
    assert "23 of 16 trials" not in page and "24 of 16" in page
    names = charts_of(page)
    assert "curves" in names and "board" not in names and "reliability" not in names
    assert "running" in [trace["name"] for trace in names["curves"]["data"]]


@pytest.mark.parametrize("trials", [0, 1])
def test_the_least_study_has_a_report(maker, trials):
    study = maker.study()
    for number in range(trials):
        maker.trial(number, [], status="failed", reason="died")
    words = "no trial is complete" if trials else "no trial has ended"
    assert words in write_report(study).read_text(encoding="utf-8")


def test_no_image_is_read(maker, monkeypatch):
    def opened(*_, **__):
        raise AssertionError("images were opened")

    monkeypatch.setattr(rundata, "load_dataset", opened)
    monkeypatch.setattr(datasets, "load_dataset", opened)
    write_report(finished(maker))


def test_several_objectives_show_their_front(maker):
    study = finished(maker, objectives=("parameters",))
    (front,) = search_figures.draw_trade_off(gather(study))
    expected = {(r.last["parameters"], r.last["val_top1"]) for r in study.pareto()}
    line = front.figure.data[0]
    assert set(zip(line.x, line.y, strict=True)) == expected


def exported_folder(study):
    """Of the winner's first final run."""
    name = study.leaderboard()[0].name
    return next(r.folder for r in study.confirm_runs if r.stage == "final" and r.name == name)


def test_confusions_and_classes_are_those_of_the_exported_weights(reported):
    study = reported[0]
    found = Predictions.load(exported_folder(study) / FILE)
    content = gather(study)
    (matrix,) = winner_figures.draw_confusion(content)
    expected = confusion_matrix(found.labels, found.predicted, labels=range(len(CLASSES)))
    drawn = matrix.figure.data[0]
    np.testing.assert_array_equal(drawn.customdata, expected)
    shares = expected / expected.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(drawn.z, shares, atol=1e-4)
    np.fill_diagonal(expected, 0)
    assert sum(row[2] for row in matrix.rows) == expected.sum()
    assert [row[2] for row in matrix.rows] == sorted((row[2] for row in matrix.rows), reverse=True)
    (classes,) = winner_figures.draw_class_accuracy(content)
    by_name = {row[0]: row[2] for row in classes.rows}
    assert by_name == {name: f"{shares[i, i]:.1%}" for i, name in enumerate(CLASSES)}
    assert f"wrong on {expected.sum()} of {len(found.labels)} test images" in reported[1]


def test_of_many_classes_those_with_most_errors_are_drawn(reported, monkeypatch):
    monkeypatch.setattr(winner_figures, "MOST_CLASSES", 2)
    monkeypatch.setattr(winner_figures, "MOST_BARS", 2)
    content = gather(reported[0])
    found = content.exported[0]
    wrong = found.labels[found.predicted != found.labels]
    taken = found.predicted[found.predicted != found.labels]
    errors = torch.bincount(torch.cat((wrong, taken)), minlength=len(CLASSES))
    (matrix,) = winner_figures.draw_confusion(content)
    (classes,) = winner_figures.draw_class_accuracy(content)
    assert len(matrix.figure.data[0].x) == len(classes.figure.data[0].x) == 2
    chosen = [CLASSES.index(name) for name in matrix.figure.data[0].x]
    rest = [i for i in range(len(CLASSES)) if i not in chosen]
    assert min(errors[chosen]) >= max(errors[rest])
    assert len(classes.rows) == len(CLASSES)


def test_images_of_errors_are_small_parts_of_the_page(reported, tmp_path):
    study, page = reported
    found = Elements(page)
    kept = Gallery.load(exported_folder(study) / GALLERY, count=120, classes=len(CLASSES))
    sources = [v for k, v in found.attributes if k == "src"]
    assert len(sources) == len(kept.images) and all(v.startswith("data:image/") for v in sources)
    for source, pixels in zip(sources, kept.thumbnails, strict=True):
        shown = Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))
        assert shown.size == (40, 40)
        gap = np.abs(np.asarray(shown, float) - pixels.permute(1, 2, 0).numpy())
        assert gap.mean() < 60  # JPEG's, of noise; of another image it is 85
    without = write_report(study, tmp_path / "r.html", pictures=False).read_text()
    assert "<img" not in without and "Accuracy by class" in without


def test_a_damaged_gallery_is_left_out_with_a_warning(maker):
    study = finished(maker)
    path = exported_folder(study) / GALLERY
    whole = path.read_bytes()
    path.write_bytes(whole[:200])
    with pytest.warns(UserWarning, match="gallery.* is damaged"):
        assert gather(study).exported[1] is None
    found = Gallery.load(_written(path, whole), count=120, classes=len(CLASSES))
    for changed in (
        {"images": found.images + 1000}, {"mistakes": 99}, {"teacher": found.teacher + 50},
        {"distances": found.distances * float("nan")}, {"thumbnails": found.thumbnails.float()},
    ):  # fmt: skip
        Gallery(**{**vars(found), **changed}).save(path)
        with pytest.raises(UserError, match="is damaged"):
            Gallery.load(path, count=120, classes=len(CLASSES))
    path.unlink()
    assert "<img" not in write_report(study).read_text()


def _written(path, content):
    path.write_bytes(content)
    return path


def test_how_a_trial_ended_is_its_colour_and_only_whole_ones_are_on_the_front(maker):
    study = searched(maker)
    (chart,) = search_figures.draw_trade_off(gather(study))
    status = {record.number: record.status for record in study.records()}
    line, *traces = chart.figure.data
    whole = {r.seconds for r in study.records() if r.status == "complete"}
    assert set(line.x) <= whole
    names = dict(search_figures.STATUS.values())
    for trace in traces:
        ended = {status[int(text.split()[1])] for text in trace.text}
        assert [search_figures.STATUS[name][0] for name in ended] == [trace.name]
        assert trace.marker.color == names[trace.name]


@pytest.mark.parametrize(("reach", "step"), [(1, 1), (4, 1), (10, 1), (11, 2), (30, 5), (240, 50)])
def test_epochs_are_whole_numbers(maker, reach, step):
    study = maker.study(distill=DistillConfig(dataset="synthetic", student="resnet8",
                                              method="none", epochs=reach))  # fmt: skip
    maker.trial(0, [0.1] * reach)
    (chart,) = search_figures.draw_learning_curves(gather(study))
    assert (chart.figure.layout.xaxis.tick0, chart.figure.layout.xaxis.dtick) == (0, step)


def test_trials_that_break_a_constraint_are_crosses(maker):
    study = searched(maker, constraints=("parameters<=2500",))
    (front,) = search_figures.draw_trade_off(gather(study))
    for trace in front.figure.data[1:]:
        broken = [int(text.split()[1]) % 3 == 2 for text in trace.text]  # 3,000 parameters
        assert [symbol == "x" for symbol in trace.marker.symbol] == broken


def test_bins_of_few_predictions_are_in_the_table_only(reported):
    (chart,) = winner_figures.draw_reliability(gather(reported[0]))
    drawn = [int(text.split()[0]) for trace in chart.figure.data[1:] for text in trace.text]
    assert min(drawn) >= winner_figures.LEAST_IN_BIN > min(row[-1] for row in chart.rows)


def test_a_report_that_fails_is_no_failure_of_the_study(maker, monkeypatch):
    def broken(study):
        raise ValueError("no luck")

    monkeypatch.setattr("ekd_ray.results.report.write_report", broken)
    with pytest.warns(UserWarning, match="no report was made .ValueError: no luck.: try"):
        pipeline._report(maker.study())


# What is computed for figures, against what the engine computes.


def test_reliability_bins_are_those_of_the_calibration_error():
    found = predictions(2.0, 0)
    correct = (found.predicted == found.labels).numpy()
    count, mean, accuracy = reliability_bins(found.confidence.numpy(), correct)
    used = count > 0
    gap = float(np.sum(count[used] * np.abs(accuracy - mean)[used]) / count.sum())
    expected = expected_calibration_error(found.confidence, found.predicted, found.labels)
    assert gap == pytest.approx(float(expected), abs=1e-6)


def test_wilsons_interval_is_scipys():
    counts = [(0, 1), (1, 1), (3, 10), (50, 100), (999, 1000), (0, 40)]
    low, high = wilson_interval(*np.array(counts).T)
    for index, (right, count) in enumerate(counts):
        found = binomtest(right, count).proportion_ci(0.95, "wilson")
        assert (low[index], high[index]) == pytest.approx((found.low, found.high), abs=1e-6)
    assert [float(v[0]) for v in wilson_interval(np.array([0]), np.array([0]))] == [0.0, 1.0]
    for count in range(1, 60):
        low, high = wilson_interval(np.array([0, count]), np.array([count, count]))
        assert low[0] >= 0.0 and high[1] <= 1.0, "also where it is rounded"


def test_the_mean_of_risk_over_coverage_is_the_aurc():
    found = predictions(2.0, 0)
    coverage, risk = risk_over_coverage(found)
    wrong = found.predicted != found.labels
    assert risk.mean() == pytest.approx(aurc(found.uncertainty, wrong), abs=1e-9)
    assert (coverage[-1], risk[-1]) == (1.0, pytest.approx(float(wrong.double().mean())))


def test_correlation_gaps_do_not_see_scale_and_shift():
    logits = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    assert correlation_gap(logits, 3 * logits + 1).max() < 1e-6
    flipped = logits * torch.tensor([1.0, 1.0, 1.0, -1.0])
    gap = correlation_gap(logits, flipped)
    expected = 2 * np.abs(np.corrcoef(logits.numpy().T))[3, :3]
    assert gap[3, :3] == pytest.approx(expected, abs=1e-6)
    assert gap[:3, :3].max() < 1e-6
