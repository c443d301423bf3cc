"""A search at a URI whose driver is lost between any two uploads, continued elsewhere."""

from __future__ import annotations

import json
import random
import warnings

import optuna
import pytest
from fake_store import LOCATION, FakeStore
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from search_runs import EPOCHS, run, score, study_of

from ekd_ray.engine.history import HISTORY
from ekd_ray.engine.resolve import resolve
from ekd_ray.remote import lease as leases
from ekd_ray.remote import session
from ekd_ray.remote.lease import LEASE, Lease
from ekd_ray.remote.mirror import Mirror
from ekd_ray.remote.session import mirrored
from ekd_ray.results.records import RESULT, RunRecord, read_record
from ekd_ray.scale.searcher import OptunaSearcher
from ekd_ray.scale.storage import drop_unknown_trials
from ekd_ray.scale.worker import RUN

TRIALS = 4
STATES = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED}


class Hasty(FakeStore):
    """While one file goes up, the study goes on."""

    meanwhile = staticmethod(lambda: None)

    def write(self, name, content):
        super().write(name, content)
        if name != LEASE:
            self.meanwhile()


def steps(folder, config):
    """The search of `search_runs.run`, one change of its files at a time."""
    searcher = OptunaSearcher(folder, config, resolve(config.distill))
    yield
    running = []
    for index in range(TRIALS + 2):
        suggested = searcher.suggest(f"t{index}")
        if isinstance(suggested, dict):
            running.append((f"t{index}", RunRecord.from_dict(suggested[RUN])))
            yield
        if running and (len(running) == 2 or not isinstance(suggested, dict)):
            trial_id, job = running.pop(0)
            epochs = 3 if job.number % 3 == 2 else EPOCHS
            with open(f"{job.folder}/{HISTORY}", "a") as file:
                for epoch in range(1, epochs + 1):
                    value = score(job.config) * epoch / EPOCHS
                    row = {"epoch": epoch, "val_top1": value, "seconds": 1.0}
                    row |= {"val_ece": job.config["lr"]}
                    row |= {"parameters": job.config["batch_size"]}
                    file.write(json.dumps(row) + "\n")
            yield
            searcher.on_trial_complete(trial_id, {"epoch": epochs})
            yield


@pytest.fixture(scope="module")
def uploads(tmp_path_factory):
    """(config, what was at the URI after each change there, and what after each whole pass)."""
    folder = tmp_path_factory.mktemp("search") / "run"
    folder.mkdir()
    config = study_of("random", trials=TRIALS)
    (folder / "study.yaml").write_text("study: {}\n")
    store, draw, going = Hasty(), random.Random(0), steps(folder, config)
    store.meanwhile = lambda: next(going, None) if draw.random() < 0.5 else None
    mirror = Mirror(store, folder, {}, Lease())
    whole = []
    for _ in going:
        if draw.random() < 0.5:
            mirror.upload()
            whole.append((len(store.moments), dict(store.content)))
    mirror.upload(final=True)
    return config, store.moments, whole


def records_of(content):
    return {n: c for n, c in content.items() if n.endswith(RESULT)}


@pytest.mark.quick_ids("cut")
@pytest.mark.parametrize("journal", ["as it was", "missing", "cut"])
def test_a_driver_lost_after_any_upload_loses_no_record(uploads, journal, tmp_path, monkeypatch):
    monkeypatch.setattr(leases, "SETTLE_SECONDS", 0.0)
    monkeypatch.setenv("EKD_MIRROR_SECONDS", "1e6")
    config, moments, whole = uploads
    assert len(moments) >= 12 and len(whole) >= 3
    lacking = 0
    for index, moment in enumerate(moments):
        if "study.yaml" not in moment:  # nothing but the lease is there
            continue
        folder = tmp_path / str(index)
        store = FakeStore(without_journal(moment, journal))
        store.now += int(leases.STALE_SECONDS)
        monkeypatch.setattr(session, "open_store", lambda location, store=store: store)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            with mirrored(LOCATION, folder, resume=True, settle=drop_unknown_trials):
                before = records_of({p.relative_to(folder).as_posix(): p.read_bytes()
                                     for p in folder.rglob(RESULT)})  # fmt: skip
                run(folder, config, TRIALS + 2)
        assert before == records_of(moment)
        lacking += any("made anew" in str(warning.message) for warning in said)
        # What the last whole pass had brought there is kept, byte for byte.
        safe = [content for count, content in whole if count <= index + 1][-1:]
        for name, content in records_of(safe[0] if safe else {}).items():
            assert before[name] == content
        after = records_of(store.content)
        assert {name: after[name] for name in before} == before
        (tmp_path / "journal").write_bytes(store.content["optuna.journal"])
        storage = JournalStorage(JournalFileBackend(str(tmp_path / "journal")))
        trials = optuna.load_study(study_name=None, storage=storage).get_trials()
        assert len(trials) == len(after) == TRIALS
        for trial in trials:
            record = read_record(folder / "trials" / f"{trial.number:04d}")
            assert (trial.state, trial.params) == (STATES[record.status], record.params)
            # (A real run writes its history anew; these append to what was fetched.)
            values = {row["epoch"]: row["val_top1"] for row in record.history}
            assert values == trial.intermediate_values
    assert lacking, "no moment had a trial that the journal did not know"


def without_journal(content, journal):
    if journal == "as it was" or "optuna.journal" not in content:
        return content
    kept = content["optuna.journal"].splitlines(keepends=True)
    found = {name: text for name, text in content.items() if name != "optuna.journal"}
    return found | (
        {"optuna.journal": b"".join(kept[: len(kept) // 2])} if journal == "cut" else {}
    )
