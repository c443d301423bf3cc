"""A home folder that nothing can be written to."""

import os
import stat

import pytest

from ekd_ray.scale.cluster import _token_kept

PATH = "RAY_AUTH_TOKEN_PATH"


@pytest.fixture
def ray_folder(tmp_path, monkeypatch):
    for name in (PATH, "RAY_AUTH_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "private" / "r"


def test_rays_token_lies_in_the_private_folder_where_home_takes_none(ray_folder, monkeypatch):
    monkeypatch.setenv("HOME", "/dev/null/home")
    ray_folder.parent.mkdir()
    with _token_kept(ray_folder):
        token = ray_folder.parent / "auth_token"
        assert os.environ[PATH] == str(token) and len(token.read_text()) >= 32
        assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert PATH not in os.environ


def test_a_home_that_takes_it_and_a_place_that_was_given_stay(ray_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with _token_kept(ray_folder):
        assert PATH not in os.environ
    monkeypatch.setenv("HOME", "/dev/null/home")
    monkeypatch.setenv(PATH, "elsewhere")
    with _token_kept(ray_folder):
        assert os.environ[PATH] == "elsewhere"
    assert os.environ[PATH] == "elsewhere"
