"""Which pictures files, folders and patterns mean, and where their boxes go."""

from __future__ import annotations

import pytest

from mplug_jax.prediction.model import PredictionError
from mplug_jax.prediction.pictures import boxed_files, find_pictures


def test_folders_and_patterns_are_looked_up(tmp_path, monkeypatch):
    names = ["b.PNG", "a.jpg", "c.txt", "below/d.webp", "below/e.pdf", "odd[1].png"]
    (tmp_path / "below").mkdir()
    for name in names:
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    here = str(tmp_path)
    wanted = ["a.jpg", "b.PNG", "below/d.webp", "odd[1].png"]
    assert find_pictures([here]) == [f"{here}/{name}" for name in wanted]
    assert find_pictures(["*.*"]) == ["a.jpg", "b.PNG", "odd[1].png"]
    assert find_pictures(["**/*.[jw]*"]) == ["a.jpg", "below/d.webp"]
    # A file is taken at its word, once, whatever it is called and whether it is there.
    given = ["no.png", "odd[1].png", "c.txt", "gs://bucket/*.png", "*.jpg", "a.jpg"]
    assert find_pictures(given) == [*given[:4], "a.jpg"]
    with pytest.raises(PredictionError, match=r"\*\.gif fits no pictures"):
        find_pictures(["*.gif"])
    with pytest.raises(PredictionError, match="empty holds no pictures"):
        (tmp_path / "empty").mkdir()
        find_pictures(["empty"])


def test_boxes_go_to_a_file_or_a_folder_and_over_no_picture(tmp_path):
    pictures = [str(tmp_path / name) for name in ("in/a.png", "in/below/a.png", "in/b.psd")]
    out = tmp_path / "out"
    assert boxed_files(pictures[:1], f"{out}.png") == {pictures[0]: f"{out}.png"}
    places = [str(out / name) for name in ("a.png", "below/a.png", "b.psd.png")]
    assert list(boxed_files(pictures, str(out)).values()) == places
    out.mkdir()
    assert boxed_files(pictures[:1], str(out)) == {pictures[0]: places[0]}
    for place in (tmp_path / "in", tmp_path / "out" / ".." / "in"):
        with pytest.raises(PredictionError, match=r"would overwrite .*a\.png"):
            boxed_files(pictures, str(place))
