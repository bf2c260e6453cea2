"""Where the command lines keep compiled programs: the user's word first, a limit, and one line where it cannot be."""

import importlib.util

import jax
import pytest

from train.compilation_cache import MOST_BYTES, keep_programs

KEYS = ("jax_enable_compilation_cache", "jax_compilation_cache_dir", "jax_compilation_cache_max_size")


@pytest.fixture
def settings(monkeypatch, tmp_path):
    """A function from no arguments to JAX's settings, which are its defaults at first and put back at the end."""
    before = {key: getattr(jax.config, key) for key in KEYS}
    for key, value in zip(KEYS, (True, None, -1)):
        jax.config.update(key, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield lambda: tuple(getattr(jax.config, key) for key in KEYS[1:])
    for key, value in before.items():
        jax.config.update(key, value)


def test_programs_are_kept_in_the_users_cache(settings, tmp_path, monkeypatch):
    keep_programs(pytest.fail)
    directory = tmp_path / "cache" / "twomamba_jax" / "programs"
    assert settings() == (str(directory), MOST_BYTES)
    assert directory.stat().st_mode & 0o777 == 0o700
    assert list(directory.iterdir()) == []
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    keep_programs(pytest.fail)
    assert settings()[0] == str(tmp_path / "home" / ".cache" / "twomamba_jax" / "programs")


@pytest.mark.parametrize(("key", "value"), [(KEYS[0], False), (KEYS[1], "elsewhere")])
def test_jax_settings_of_the_user_are_left_alone(settings, tmp_path, key, value):
    jax.config.update(key, value)
    before = settings()
    keep_programs(pytest.fail)
    assert settings() == before
    assert not (tmp_path / "cache").exists()


def test_a_place_that_cannot_be_written_is_one_line(settings, tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file")
    lines = []
    keep_programs(lines.append)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    keep_programs(lines.append)
    assert settings() == (None, -1)
    assert "compiled programs are not kept ([Errno 20] Not a directory" in lines[0]
    assert "set XDG_CACHE_HOME to a directory that can be written to" in lines[0]
    assert "needs the package 'filelock': pip install filelock" in lines[1]
    assert "\n" not in "".join(lines)
