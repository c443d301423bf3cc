"""URIs that may name a study's folder."""

from pathlib import Path

import pytest

from ekd_ray.errors import UserError
from ekd_ray.remote.location import Location, is_uri, parse_location, working_copy


@pytest.mark.parametrize(
    ("uri", "location"),
    [
        ("s3://bucket/run", Location("s3", "bucket", "run")),
        ("s3://bucket/a/b/", Location("s3", "bucket", "a/b")),
        ("gs://bucket/a", Location("gs", "bucket", "a")),
        ("gcs://bucket/a", Location("gs", "bucket", "a")),
    ],
)
def test_locations(uri, location):
    assert parse_location(uri) == location
    assert is_uri(uri) and not is_uri(f"/{uri}")
    assert location.child("pair/ekd").root == f"{location.root}/pair/ekd"


def test_a_file_uri_is_a_folder():
    assert parse_location("file:///data/my%20runs/x") == Path("/data/my runs/x")


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("s3://AKIA:canary@bucket/run", "may not hold credentials"),
        ("s3://AKIA:can/ary@bucket/run", "may not hold credentials"),
        ("s3://[x", "is no URI"),
        ("ftp://u:can/ary@bucket/run", "cannot keep a study"),
        ("s3://bucket/run?access_key=canary", "may not hold options"),
        ("ftp://bucket/run", r"give a folder, or one of s3://, gs://, file://"),
        ("file://host/run", "give a folder, or one of"),
        ("s3://bucket", "must name a bucket and a folder in it"),
        ("s3:///run", "must name a bucket and a folder in it"),
        ("s3://bucket/a/../b", "without '.' and '..'"),
    ],
)
def test_others_are_refused_in_a_sentence_without_the_secret(uri, words):
    with pytest.raises(UserError, match=words) as refused:
        parse_location(uri)
    assert "canary" not in str(refused.value)
    assert "\n" not in str(refused.value)


def test_each_location_has_a_working_copy_of_its_own(monkeypatch, tmp_path):
    monkeypatch.setenv("EKD_STUDIES_DIR", str(tmp_path))
    one, two = (working_copy(Location("s3", bucket, "a/run")) for bucket in ("x", "y"))
    assert one != two
    assert one.parent == two.parent == tmp_path
    assert one == working_copy(parse_location("s3://x/a/run/"))
    assert one.name.startswith("run-")
    monkeypatch.delenv("EKD_STUDIES_DIR")
    monkeypatch.setenv("EKD_CACHE_DIR", str(tmp_path / "cache"))
    assert working_copy(Location("s3", "x", "a/run")) == tmp_path / "cache" / "studies" / one.name
