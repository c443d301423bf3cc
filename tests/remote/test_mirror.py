"""A working copy and its URI: what goes up when, who wins, who may drive. Storage in memory."""

import json
import os
import shutil
from dataclasses import asdict

import pytest
from fake_store import FakeStore

from ekd_ray.engine.checkpoint import CHECKPOINT
from ekd_ray.errors import UserError
from ekd_ray.remote import lease as leases
from ekd_ray.remote import mirror as mirrors
from ekd_ray.remote.lease import LEASE, Lease, new_lease
from ekd_ray.remote.location import Location
from ekd_ray.remote.mirror import Mirror, State, changes
from ekd_ray.remote.objects import StorageError
from ekd_ray.remote.session import StaleCopy, header_folder, mirrored, reading_copy
from ekd_ray.results.records import JOURNAL, RESULT

PLACE = Location("s3", "bucket", "runs/one")


@pytest.fixture(autouse=True)
def _no_wait(monkeypatch, tmp_path):
    monkeypatch.setattr(leases, "SETTLE_SECONDS", 0.0)
    monkeypatch.setenv("EKD_STUDIES_DIR", str(tmp_path / "studies"))


@pytest.fixture
def store():
    return FakeStore()


def write(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def study(store):
    """What is at the URI but for what the copy needs itself."""
    return {n: c.decode() for n, c in store.content.items() if not n.startswith(".ekd_ray/")}


def drive(store, folder, files=None, *, resume=False, then=None, **options):
    with mirrored(PLACE, folder, resume=resume, objects=store, seconds=1e6, **options):
        seen = {
            p.relative_to(folder).as_posix(): p.read_text()
            for p in folder.rglob("*")
            if p.is_file() and not p.name.startswith(".")
        }
        write(folder, files or {})
        if then:
            then(folder)
    return seen


FILES = {
    "study.yaml": "x: 1",
    "trials/0000/config.yaml": "lr: 1",
    "trials/0000/result.json": "{}",
    JOURNAL: "a\nb\n",
    "best/MANIFEST": "m",
    "best/model.safetensors": "w",
    "confirm.parquet": "p",
}


def test_names_are_those_of_the_rooms_above():
    assert (mirrors.RESULT, mirrors.JOURNAL, mirrors.CHECKPOINT) == (RESULT, JOURNAL, CHECKPOINT)


def test_there_and_back_in_an_empty_folder(store, tmp_path):
    assert drive(store, tmp_path / "a", FILES) == {}
    assert study(store) == FILES
    assert drive(store, tmp_path / "b", {"trials/0001/config.yaml": "n"}, resume=True) == FILES
    assert study(store) == {**FILES, "trials/0001/config.yaml": "n"}


def test_scratch_locks_and_unfinished_files_stay_here(store, tmp_path):
    left = {
        ".ray/tune/state.pkl": "x", ".lock": "", "trials/0000/.a.tmp": "x", "x.tmp": "x",
        f"{JOURNAL}.lock": "x", "trials/0000/train/run/snapshot.json": "x",
    }  # fmt: skip
    drive(store, tmp_path / "a", {**FILES, **left})
    assert study(store) == FILES


def test_what_is_pointed_to_goes_first(store, tmp_path):
    drive(store, tmp_path / "a", FILES)
    order = [name for what, name in store.calls if what == "put" and name in FILES]
    assert order == [
        "study.yaml", "trials/0000/config.yaml", "trials/0000/result.json", JOURNAL,
        "best/model.safetensors", "confirm.parquet", "best/MANIFEST",
    ]  # fmt: skip


def test_the_journal_is_sent_as_it_was_before_the_records_were_looked_at(
    store, tmp_path, monkeypatch
):
    """A trial that ends while a pass looks around: its record waits, and so does its line."""
    folder = tmp_path / "a"
    write(folder, FILES)
    real = mirrors.study_files

    def meanwhile(found, *, late=False):
        names = list(real(found, late=late))
        if not late:
            with open(folder / JOURNAL, "a") as file:
                file.write("trial 1 has ended\n")
        return names

    monkeypatch.setattr(mirrors, "study_files", meanwhile)
    Mirror(store, PLACE, folder, State(), new_lease()).upload(final=False)
    assert study(store)[JOURNAL] == "a\nb\n"


def test_half_a_line_of_the_journal_waits(store, tmp_path):
    drive(store, tmp_path / "a", {**FILES, JOURNAL: "a\nhal"})
    assert study(store)[JOURNAL] == "a\n"


def test_nothing_is_sent_twice(store, tmp_path):
    drive(store, tmp_path / "a", FILES)
    del store.calls[:]
    drive(store, tmp_path / "a", resume=True)
    assert {name for _, name in store.calls} == {LEASE}


def test_checkpoints_of_running_trials_go_up_now_and_then(store, tmp_path):
    folder, name = tmp_path / "a", f"trials/0003/{CHECKPOINT}"
    mirror = Mirror(store, PLACE, folder, State(), new_lease(), checkpoint_seconds=1e6)
    write(folder, {name: "1"})
    mirror.upload(final=False)
    assert study(store) == {}
    mirror.upload(final=True)
    assert study(store) == {name: "1"}
    often = Mirror(store, PLACE, folder, mirror._state, new_lease(), checkpoint_seconds=0.0)
    write(folder, {name: "new"})
    often.upload(final=False)
    assert study(store) == {name: "new"}
    (folder / name).unlink()
    often.upload(final=False)
    assert study(store) == {}


def test_a_cleaner_of_old_files_here_removes_nothing_there(store, tmp_path):
    def cleaner(folder):
        for path in folder.rglob("*"):
            if path.is_file() and not path.name.startswith("."):
                path.unlink()

    drive(store, tmp_path / "a", FILES)
    drive(store, tmp_path / "a", resume=True, then=cleaner)
    assert study(store) == FILES
    assert drive(store, tmp_path / "a", resume=True) == FILES


def test_the_uri_wins_over_a_copy_that_another_machine_has_left_behind(store, tmp_path, capsys):
    drive(store, tmp_path / "a", FILES)
    drive(store, tmp_path / "b", {JOURNAL: "a\nb\nc\n"}, resume=True)
    write(tmp_path / "a", {"trials/0000/result.json": "never uploaded"})
    assert drive(store, tmp_path / "a", resume=True) == {**FILES, JOURNAL: "a\nb\nc\n"}
    (aside,) = tmp_path.glob("a.aside-*")
    assert (aside / "trials/0000/result.json").read_text() == "never uploaded"
    assert str(aside) in capsys.readouterr().err


def test_the_copy_of_the_last_driver_wins_over_the_uri(store, tmp_path):
    """What an endpoint that went away has not taken is brought there by --resume."""
    folder = tmp_path / "a"

    def goes_down(folder):
        store.down = True

    with pytest.raises(StaleCopy, match=r"stale \(no answer\).*--resume on this machine") as stale:
        drive(store, folder, FILES, then=goes_down)
    assert (stale.value.exit_code, study(store)) == (1, {})
    store.down = False
    with pytest.raises(UserError, match="holds no study to resume"):
        drive(store, tmp_path / "other", resume=True)
    drive(store, folder, {"study.yaml": "x: 1"})  # nothing has ever arrived: begun again
    store.down = False
    with pytest.raises(StaleCopy):
        drive(store, folder, FILES, resume=True, then=goes_down)
    store.down = False
    assert drive(store, folder, resume=True) == FILES
    assert study(store) == FILES


def test_an_endpoint_that_comes_back_is_told_of_once(store, tmp_path):
    said = []
    folder = tmp_path / "a"
    write(folder, FILES)
    mirror = Mirror(store, PLACE, folder, State(), new_lease(), say=said.append)
    store.down = True
    for _ in range(3):
        mirror._attempt(final=False)
    assert len(said) == 1 and "no answer" in said[0] and str(folder) in said[0]
    store.down = False
    mirror._attempt(final=False)
    assert len(said) == 2 and "again" in said[1]
    assert study(store) == FILES


@pytest.mark.parametrize("name", ["../out", "a/../../out", "/out", "a//b", "a\\b"])
def test_a_name_that_leaves_the_folder_is_refused(name):
    from ekd_ray.remote.objects import _inside

    with pytest.raises(UserError, match="would lie outside of the study"):
        _inside(name, "bucket/run")


def test_a_damaged_state_is_no_state(store, tmp_path):
    drive(store, tmp_path / "a", FILES)
    for text in ("", "[]", '{"files": {"x": 1}}', '{"files": {}, "sessions": 3}'):
        (tmp_path / "a" / mirrors.STATE).write_text(text)
        assert drive(store, tmp_path / "a", resume=True) == FILES


def test_start_and_resume_are_not_confused(store, tmp_path):
    with pytest.raises(UserError, match="holds no study to resume: check --out"):
        drive(store, tmp_path / "a", resume=True)
    drive(store, tmp_path / "a", FILES)
    for folder in ("a", "b"):
        with pytest.raises(UserError, match="holds a study already: add --resume"):
            drive(store, tmp_path / folder, FILES)
    assert study(store) == FILES


def test_dropped_trials_are_dropped_there_too(store, tmp_path):
    drive(store, tmp_path / "a", FILES)

    def settle(folder):
        shutil.rmtree(folder / "trials" / "0000")
        return ["trials/0000"]

    drive(store, tmp_path / "b", resume=True, settle=settle)
    assert study(store) == {n: c for n, c in FILES.items() if not n.startswith("trials/0000/")}


def other(**values):
    return Lease(**{"session": "s", "host": "elsewhere", "pid": 7, **values})


def test_a_second_driver_is_refused_with_who_and_when(store, tmp_path):
    drive(store, tmp_path / "a", FILES)
    store.write(LEASE, json.dumps(asdict(other())).encode())
    with pytest.raises(UserError, match=r"being run by process 7 on elsewhere, heard of \d+ s ago"):
        drive(store, tmp_path / "b", resume=True)
    store.now += int(leases.STALE_SECONDS)
    drive(store, tmp_path / "b", resume=True)
    assert json.loads(store.content[LEASE])["released"] is True


def test_a_dead_driver_of_this_machine_holds_nothing(store, tmp_path):
    drive(store, tmp_path / "a", FILES)
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    mine = new_lease()
    for pid, free in ((child, True), (os.getpid(), False)):
        store.write(LEASE, json.dumps(asdict(other(host=mine.host, pid=pid))).encode())
        if free:
            drive(store, tmp_path / "b", resume=True)
        else:
            with pytest.raises(UserError, match="being run by"):
                drive(store, tmp_path / "c", resume=True)


def test_of_two_that_begin_at_once_one_stays(store, tmp_path, monkeypatch):
    drive(store, tmp_path / "a", FILES)
    taken = json.dumps(asdict(other())).encode()
    monkeypatch.setattr(leases.time, "sleep", lambda seconds: store.write(LEASE, taken))
    with pytest.raises(UserError, match="taken at the same moment by process 7 on elsewhere"):
        drive(store, tmp_path / "b", resume=True)
    assert study(store) == FILES


def test_a_driver_that_was_taken_over_uploads_nothing_more(store, tmp_path, capsys):
    def taken(folder):
        store.write(LEASE, json.dumps(asdict(other())).encode())

    with pytest.raises(StaleCopy, match="taken over by process 7 on elsewhere"):
        drive(store, tmp_path / "a", FILES, then=taken)
    assert study(store) == {}
    assert json.loads(store.content[LEASE])["host"] == "elsewhere"


def test_an_interrupted_driver_uploads_and_releases(store, tmp_path):
    def interrupt(folder):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        drive(store, tmp_path / "a", FILES, then=interrupt)
    assert study(store) == FILES
    assert json.loads(store.content[LEASE])["released"] is True


def test_storage_that_is_down_is_one_sentence_before_anything_begins(store, tmp_path):
    store.down = True
    for resume in (True, False):
        with pytest.raises(UserError, match=r"s3://bucket/runs/one cannot be reached \(no answer"):
            drive(store, tmp_path / "a", resume=resume)


def test_reading_takes_what_changed_and_leaves_the_working_copy_alone(store, tmp_path):
    drive(store, tmp_path / "a", {**FILES, f"trials/0001/{CHECKPOINT}": "big"})
    folder = reading_copy(PLACE, store)
    files = {
        p.relative_to(folder).as_posix(): p.read_text()
        for p in folder.rglob("*")
        if p.is_file() and not p.name.startswith(".")
    }
    assert files == FILES
    fetched = []
    real = store.download
    store.download = lambda name, path: (fetched.append(name), real(name, path))
    store.write(JOURNAL, b"a\nb\nc\n")
    store.delete("confirm.parquet")
    assert reading_copy(PLACE, store) == folder
    assert fetched == [JOURNAL]
    assert not (folder / "confirm.parquet").exists()


def test_what_resume_continues_is_said_by_the_newer_header(store, tmp_path, monkeypatch):
    from ekd_ray.remote.location import working_copy

    with pytest.raises(UserError, match="holds no study to resume"):
        header_folder(PLACE, store)
    folder = working_copy(PLACE)
    drive(store, folder, FILES)
    assert header_folder(PLACE, store) == folder
    drive(store, tmp_path / "b", {"study.yaml": "x: 2"}, resume=True)
    assert (header_folder(PLACE, store) / "study.yaml").read_text() == "x: 2"
    assert (folder / "study.yaml").read_text() == "x: 1"


def test_a_failed_upload_is_known_as_such(store, tmp_path):
    """What went up before the failure is not sent again, what did not is."""
    folder, state = tmp_path / "a", State()
    write(folder, FILES)
    real, left = store.upload, [3]

    def sometimes(path, name):
        left[0] -= 1
        if left[0] < 0:
            raise StorageError("gone")
        return real(path, name)

    store.upload = sometimes
    mirror = Mirror(store, PLACE, folder, state, new_lease())
    with pytest.raises(StorageError):
        mirror.upload(final=False)
    sent = {name for _, name in store.calls}
    assert {name for name, _ in changes(folder, state)} == set(FILES) - sent
