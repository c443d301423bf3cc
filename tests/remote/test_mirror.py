"""A working copy and its URI: what goes up when, who wins, who may drive. Storage in memory."""

import math
import os
import shutil

import pytest
from fake_store import LOCATION, FakeStore

from ekd_ray.engine.checkpoint import CHECKPOINT
from ekd_ray.errors import UserError
from ekd_ray.remote import lease as leases
from ekd_ray.remote import mirror as mirrors
from ekd_ray.remote import session
from ekd_ray.remote.lease import LEASE, Lease
from ekd_ray.remote.location import working_copy
from ekd_ray.remote.mirror import Mirror, study_files
from ekd_ray.remote.session import StaleCopy, header_folder, mirrored, reading_copy
from ekd_ray.results.records import FAILURE, JOURNAL, RESULT


@pytest.fixture
def store(monkeypatch, tmp_path):
    """The objects at `LOCATION`; the mirrors' threads upload only at the end."""
    store = FakeStore()
    monkeypatch.setattr(session, "open_store", lambda location: store)
    monkeypatch.setattr(leases, "SETTLE_SECONDS", 0.0)
    monkeypatch.setenv("EKD_MIRROR_SECONDS", "1e6")
    monkeypatch.setenv("EKD_STUDIES_DIR", str(tmp_path / "studies"))
    return store


def write(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def read(folder):
    return {name: (folder / name).read_text() for name in study_files(folder)}


def study(store):
    """The study's files at the URI."""
    return {n: c.decode() for n, c in store.content.items() if not n.startswith(".ekd_ray/")}


def drive(folder, files=None, *, resume=False, then=lambda folder: None, **options):
    """Add files to a study; what the folder held before."""
    with mirrored(LOCATION, folder, resume=resume, **options):
        before = read(folder)
        write(folder, files or {})
        then(folder)
    return before


def goes_down(store):
    def then(folder):
        store.left = 0

    return then


def start_mirror(store, folder):
    """The mirror of a working copy of which nothing is at the URI; its thread does not run."""
    return Mirror(store, folder, {}, Lease())


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
    names = (mirrors.RESULT, mirrors.JOURNAL, mirrors.CHECKPOINT, mirrors.FAILURE)
    assert names == (RESULT, JOURNAL, CHECKPOINT, FAILURE)


def test_there_and_back_in_an_empty_folder(store, tmp_path):
    assert drive(tmp_path / "a", FILES) == {}
    assert study(store) == FILES
    # What is pointed to goes first.
    assert [name for what, name in store.calls if what == "put" and name in FILES] == [
        "study.yaml", "trials/0000/config.yaml", "trials/0000/result.json", JOURNAL,
        "best/model.safetensors", "confirm.parquet", "best/MANIFEST",
    ]  # fmt: skip
    assert drive(tmp_path / "b", {"trials/0001/config.yaml": "n"}, resume=True) == FILES
    assert study(store) == {**FILES, "trials/0001/config.yaml": "n"}


def test_scratch_locks_and_unfinished_files_are_neither_sent_nor_fetched(store, tmp_path):
    names = (
        ".ray/tune/state.pkl", ".lock", "trials/0000/.a.tmp", "x.tmp", f"{JOURNAL}.lock",
        "trials/0000/train/run/snapshot.json", "a/.b/c",
    )  # fmt: skip
    scratch = dict.fromkeys(names, "x")
    drive(tmp_path / "a", {**FILES, **scratch})
    assert study(store) == FILES
    for name in (*scratch, mirrors.STATE):
        store.write(name, b"x")
    drive(tmp_path / "b", resume=True)
    there = {p.relative_to(tmp_path / "b").as_posix() for p in (tmp_path / "b").rglob("*")}
    assert not there & scratch.keys()
    assert (tmp_path / "b" / mirrors.STATE).read_bytes() != b"x"


def test_the_journal_is_sent_as_it_was_before_the_records_were_looked_at(
    store, tmp_path, monkeypatch
):
    """A trial that ends while a pass looks around: its record waits, and so does its line, and
    one that is half written."""
    write(tmp_path / "a", {**FILES, JOURNAL: "a\nb\nhal"})
    real = mirrors.read_stamp

    def meanwhile(path):
        if path.name == RESULT:
            with open(tmp_path / "a" / JOURNAL, "a") as file:
                file.write("f a line\ntrial 1 has ended\n")
        return real(path)

    monkeypatch.setattr(mirrors, "read_stamp", meanwhile)
    start_mirror(store, tmp_path / "a").upload()
    assert study(store)[JOURNAL] == "a\nb\n"


def test_a_resumed_copy_sends_only_what_is_new(store, tmp_path):
    drive(tmp_path / "a", FILES)
    (tmp_path / "a/study.yaml").write_text("x: 3")  # after the end, as `report` may
    for folder in ("a", "b"):
        del store.calls[:]
        drive(tmp_path / folder, {"new": folder}, resume=True)
        expected = {LEASE, "new", "study.yaml"} if folder == "a" else {LEASE, "new"}
        assert {name for what, name in store.calls if what != "get"} == expected


def test_a_clock_that_was_set_back_leaves_no_change_behind(store, tmp_path):
    """A file that was written after the end has then an older time than the end."""
    changed = tmp_path / "a/study.yaml"
    drive(tmp_path / "a", FILES)
    changed.write_text("x: 3")
    before = changed.stat().st_mtime_ns - 3600 * 10**9
    os.utime(changed, ns=(before, before))
    drive(tmp_path / "a", resume=True)
    assert study(store)["study.yaml"] == "x: 3"


def test_a_storage_whose_clock_was_set_back_has_no_lease_of_the_future(store, tmp_path):
    write(tmp_path / "a", FILES)
    start_mirror(store, tmp_path / "a").upload()
    store.now -= 3600
    with pytest.raises(UserError, match=r"heard of 0 s ago"):
        drive(tmp_path / "b", resume=True)


def test_checkpoints_go_up_and_leave_with_their_trial(store, tmp_path):
    folder, name = tmp_path / "a", f"trials/0003/{CHECKPOINT}"
    mirror = start_mirror(store, folder)
    write(folder, {name: "1"})
    mirror.upload()
    assert study(store) == {name: "1"}
    (folder / name).unlink()
    mirror.upload()
    assert study(store) == {}
    # A driver that was lost as a trial ended has left its checkpoint there.
    store.now += int(leases.STALE_SECONDS)
    drive(tmp_path / "b", {**FILES, "trials/0001/config.yaml": "n"})
    for trial in ("0000", "0001"):
        store.write(f"trials/{trial}/{CHECKPOINT}", b"big")
    drive(tmp_path / "b", resume=True)
    assert [n for n in study(store) if n.endswith(CHECKPOINT)] == [f"trials/0001/{CHECKPOINT}"]


def test_the_uri_replaces_a_copy_only_if_that_was_uploaded(store, tmp_path):
    drive(tmp_path / "a", FILES)
    with pytest.raises(StaleCopy):
        drive(tmp_path / "a", {"report/x": "never uploaded"}, resume=True, then=goes_down(store))
    store.left = math.inf
    store.now += int(leases.STALE_SECONDS)
    drive(tmp_path / "b", {JOURNAL: "a\nb\nc\n"}, resume=True)
    with pytest.raises(UserError, match=r"never brought to .* move that folder away"):
        drive(tmp_path / "a", resume=True)
    assert (tmp_path / "a/report/x").exists()
    shutil.rmtree(tmp_path / "a")
    assert drive(tmp_path / "a", resume=True) == {**FILES, JOURNAL: "a\nb\nc\n"}
    # A copy that was uploaded to its end is replaced when it is behind.
    drive(tmp_path / "b", {"study.yaml": "x: 2"}, resume=True)
    assert drive(tmp_path / "a", resume=True)["study.yaml"] == "x: 2"


def test_a_cleaner_of_old_files_here_removes_nothing_there(store, tmp_path):
    def cleaner(folder):
        for name in list(study_files(folder)):
            (folder / name).unlink()

    drive(tmp_path / "a", FILES)
    drive(tmp_path / "a", resume=True, then=cleaner)
    assert study(store) == FILES
    assert drive(tmp_path / "a", resume=True) == FILES


def test_the_copy_of_the_last_driver_wins_over_the_uri(store, tmp_path):
    """--resume brings there what an endpoint that went away has not taken."""
    folder = tmp_path / "a"

    with pytest.raises(StaleCopy, match=r"stale \(no answer\).*--resume on this machine") as stale:
        drive(folder, FILES, then=goes_down(store))
    assert (stale.value.exit_code, study(store)) == (1, {})
    store.left = math.inf
    with pytest.raises(UserError, match="holds no study to resume"):
        drive(tmp_path / "other", resume=True)
    store.now += int(leases.STALE_SECONDS)
    drive(folder, {"study.yaml": "x: 1"})  # nothing has ever arrived: begun again
    with pytest.raises(StaleCopy):
        drive(folder, FILES, resume=True, then=goes_down(store))
    store.left = math.inf
    assert drive(folder, resume=True) == FILES
    assert study(store) == FILES


def test_a_fetch_that_was_cut_is_completed(store, tmp_path):
    drive(tmp_path / "a", FILES)
    drive(tmp_path / "b", {"study.yaml": "x: 2"}, resume=True)
    store.left = 10
    with pytest.raises(UserError, match="no answer"):
        drive(tmp_path / "a", resume=True)
    store.left = math.inf
    assert 0 < len(read(tmp_path / "a")) < len(FILES)
    assert drive(tmp_path / "a", resume=True) == {**FILES, "study.yaml": "x: 2"}
    assert study(store) == {**FILES, "study.yaml": "x: 2"}


def test_failing_storage_is_told_of_once_and_tried_again(store, tmp_path, capsys):
    folder = tmp_path / "a"
    write(folder, FILES)
    mirror = start_mirror(store, folder)
    store.left = 6  # what went up before the failure is not sent again
    for _ in range(3):
        mirror.attempt()
    assert 0 < len(study(store)) < len(FILES)
    sent = set(study(store))
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "no answer" in err and str(folder) in err
    del store.calls[:]
    store.left = math.inf
    mirror.attempt()
    assert not sent & {name for _, name in store.calls}
    assert study(store) == FILES and capsys.readouterr().err == ""


def test_a_damaged_state_loses_nothing(store, tmp_path):
    drive(tmp_path / "a", FILES)
    for text in ("", "[]", '{"session": 1}', "\x00"):
        (tmp_path / "a" / mirrors.STATE).write_text(text)
        with pytest.raises(UserError, match="move that folder away"):
            drive(tmp_path / "a", resume=True)
    assert read(tmp_path / "a") == study(store) == FILES


def test_start_and_resume_are_not_confused(store, tmp_path):
    with pytest.raises(UserError, match="holds no study to resume: check --out"):
        drive(tmp_path / "a", resume=True)
    drive(tmp_path / "a", FILES)
    for folder in ("a", "b"):
        with pytest.raises(UserError, match="holds a study already: add --resume"):
            drive(tmp_path / folder, FILES)
    assert study(store) == FILES


def test_dropped_trials_are_dropped_there_too(store, tmp_path):
    drive(tmp_path / "a", FILES)
    drive(tmp_path / "b", resume=True, settle=lambda folder: shutil.rmtree(folder / "trials"))
    assert study(store) == {n: c for n, c in FILES.items() if not n.startswith("trials/")}


OTHER = Lease("s", "elsewhere", 7)


def test_a_second_driver_is_refused_with_who_and_when(store, tmp_path):
    def second(folder):
        with pytest.raises(UserError, match=r"being run by process \d+ on .*, heard of \d+ s ago"):
            drive(tmp_path / "b", resume=True)
        with pytest.raises(UserError, match="being run by another process of this machine"):
            drive(folder, resume=True)

    drive(tmp_path / "a", FILES)
    drive(tmp_path / "a", resume=True, then=second)
    store.write(LEASE, OTHER.encode())
    with pytest.raises(UserError, match="being run by process 7 on elsewhere"):
        drive(tmp_path / "b", resume=True)
    store.now += int(leases.STALE_SECONDS)
    drive(tmp_path / "b", resume=True)
    assert Lease.parse(store.content[LEASE]).released


def test_of_two_that_begin_at_once_one_stays(store, tmp_path, monkeypatch):
    drive(tmp_path / "a", FILES)
    monkeypatch.setattr(leases.time, "sleep", lambda seconds: store.write(LEASE, OTHER.encode()))
    with pytest.raises(UserError, match="taken at the same moment by process 7 on elsewhere"):
        drive(tmp_path / "b", resume=True)
    assert study(store) == FILES


def test_a_driver_that_was_taken_over_uploads_nothing_more(store, tmp_path, capsys):
    with pytest.raises(StaleCopy, match=r"taken over by process 7 on elsewhere.*move that folder"):
        drive(tmp_path / "a", FILES, then=lambda _: store.write(LEASE, OTHER.encode()))
    mirror = start_mirror(store, tmp_path / "a")
    mirror.attempt()
    assert "was taken over by process 7 on elsewhere" in capsys.readouterr().err
    mirror.thread.start()  # ends at once
    assert "taken over by process 7" in mirror.close()
    assert study(store) == {}
    assert Lease.parse(store.content[LEASE]) == OTHER


def test_a_long_pass_renews_the_lease_and_notices_its_loss(store, tmp_path, monkeypatch):
    monkeypatch.setattr(mirrors, "SECONDS", -1.0)
    write(tmp_path / "a", FILES)
    real = store.write

    def write_and_lose(name, content):
        real(name, content)
        if name.endswith(RESULT):
            real(LEASE, OTHER.encode())

    store.write = write_and_lose
    start_mirror(store, tmp_path / "a").attempt()
    assert set(study(store)) == {"study.yaml", "trials/0000/config.yaml", "trials/0000/result.json"}


def test_reading_takes_what_changed_and_leaves_the_working_copy_alone(store):
    folder = working_copy(LOCATION)
    drive(folder, {**FILES, f"trials/0001/{CHECKPOINT}": "big"})
    copy = reading_copy(LOCATION)
    assert copy != folder and read(copy) == FILES
    store.write(JOURNAL, b"a\nb\nc\n")
    store.delete("confirm.parquet")
    del store.calls[:]
    assert reading_copy(LOCATION) == copy
    assert store.calls == [("get", JOURNAL)]
    left = {name: text for name, text in FILES.items() if name != "confirm.parquet"}
    assert read(copy) == {**left, JOURNAL: "a\nb\nc\n"}
    assert read(folder)[JOURNAL] == FILES[JOURNAL]


def test_what_resume_continues_is_said_by_the_newer_header(store, tmp_path):
    with pytest.raises(UserError, match="holds no study to resume"):
        header_folder(LOCATION)
    folder = working_copy(LOCATION)
    drive(folder, FILES)
    assert header_folder(LOCATION) == folder
    drive(tmp_path / "b", {"study.yaml": "x: 2"}, resume=True)
    assert (header_folder(LOCATION) / "study.yaml").read_text() == "x: 2"
    assert (folder / "study.yaml").read_text() == "x: 1"


def test_the_sources_of_plugins_are_there_before_the_header_that_names_them(store, tmp_path):
    header = f"plugins: [parts@{'0' * 64}]"
    drive(tmp_path / "a", {"study.yaml": header, "plugins/parts.py": "x = 1", "trials/0/a": ""})
    sent = [name for kind, name in store.calls if kind == "put" and name in study(store)]
    assert sent.index("plugins/parts.py") < sent.index("study.yaml")
    there = header_folder(LOCATION)
    assert read(there) == {"study.yaml": header, "plugins/parts.py": "x = 1"}
