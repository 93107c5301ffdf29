"""Frames of arrays, folders and video files."""

import sys

import numpy as np
import pytest
from PIL import Image

from mplug_jax.data.clips import frame_indices, load_clip
from mplug_jax.data.records import BadSample, SourceError


def shades(frames):
    return [round(float(frame.mean())) for frame in frames]


def array(total):
    """Frame i is of shade 20 i."""
    return np.broadcast_to(
        20 * np.arange(total, dtype=np.uint8)[:, None, None, None], (total, 32, 64, 3)
    )


@pytest.mark.parametrize(("total", "frames"), [(16, 8), (12, 12), (30, 12), (300, 16), (64, 1)])
def test_frames_are_uniform(total, frames):
    expected = np.floor(np.arange(frames) * (total / frames) + 1e-9)
    assert frame_indices(total, frames) == expected.tolist()
    if total % frames == 0:
        assert frame_indices(total, frames) == list(range(0, total, total // frames))


def test_every_number_of_frames_is_met():
    # arange(0, n, n / frames) has one too many for some of these.
    for total in range(1, 130):
        for frames in range(1, 33):
            found = frame_indices(total, frames)
            assert len(found) == frames and found[0] == 0 and max(found) < total
            assert found == sorted(found)


def test_short_clips_repeat_frames():
    assert frame_indices(3, 7) == [0, 0, 0, 1, 1, 2, 2]
    assert shades(load_clip(array(2), 5)) == [0, 0, 0, 20, 20]
    with pytest.raises(ValueError, match="at least 1"):
        load_clip(array(2), 0)


def test_arrays():
    shown = load_clip(array(10), 4)
    assert shades(shown) == [0, 40, 100, 140]
    assert {(frame.shape, frame.dtype.name) for frame in shown} == {((32, 64, 3), "uint8")}
    for wrong in (array(0), array(3)[0], array(3)[..., :1], array(3).astype(np.float32)):
        with pytest.raises(BadSample, match=r"<array>: .* no uint8 clip"):
            load_clip(wrong, 4)


def test_folders_are_read_in_the_order_of_their_numbers(tmp_path):
    for number in (10, 2, 9, 1):
        Image.new("L", (6, 4), 20 * number).save(tmp_path / f"f{number}.png")
    (tmp_path / "notes.txt").write_text("no frame")
    assert shades(load_clip(tmp_path, 4)) == [20, 40, 180, 200]
    assert shades(load_clip(str(tmp_path), 2)) == [20, 180]
    assert load_clip(tmp_path, 1)[0].shape == (4, 6, 3)


def test_padded_and_mixed_names_sort(tmp_path):
    for shade, name in enumerate(("01_00.png", "01_05.png", "1_6.png", "02.png", "a.png")):
        Image.new("L", (4, 4), 20 * shade).save(tmp_path / name)
    assert shades(load_clip(tmp_path, 5)) == [0, 20, 40, 60, 80]


def test_missing_empty_and_broken_clips_name_their_path(tmp_path):
    with pytest.raises(BadSample, match=r"gone\.mp4: no such video file or folder"):
        load_clip(tmp_path / "gone.mp4", 4)
    with pytest.raises(BadSample, match=rf"{tmp_path}: the folder holds no frames"):
        load_clip(tmp_path, 4)
    (tmp_path / "empty.mp4").touch()
    with pytest.raises(BadSample, match=r"empty\.mp4: the file is empty"):
        load_clip(tmp_path / "empty.mp4", 4)
    (tmp_path / "0.jpg").write_bytes(b"no picture")
    with pytest.raises(BadSample, match=r"0\.jpg: cannot be decoded"):
        load_clip(tmp_path, 4)


def hide(monkeypatch, *names):
    """Makes the packages appear not to be installed."""
    for name in names:
        monkeypatch.setitem(sys.modules, name, None)


def write_video(path, total):
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        for pixels in array(total):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


# Matroska files do not tell how many frames they hold.
@pytest.mark.parametrize("extension", ["mp4", "mkv"])
@pytest.mark.parametrize("decoder", ["av", "decord"])
def test_video_files(tmp_path, monkeypatch, extension, decoder):
    path = tmp_path / f"clip.{extension}"
    write_video(path, 10)
    pytest.importorskip(decoder)
    if decoder == "decord":
        hide(monkeypatch, "av")
    for frames in (1, 4, 12):
        shown = load_clip(path, frames)
        expected = [20 * (i * 10 // frames) for i in range(frames)]
        np.testing.assert_allclose(shades(shown), expected, atol=6)
        assert {(frame.shape, frame.dtype.name) for frame in shown} == {((32, 64, 3), "uint8")}


def test_broken_video_files(tmp_path):
    write_video(tmp_path / "whole.mkv", 10)
    whole = (tmp_path / "whole.mkv").read_bytes()
    broken = {"cut.mkv": whole[:600], "page.mp4": b"<html></html>", "noise.mp4": b"\0" * 500}
    for name, content in broken.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BadSample, match=name):
            load_clip(tmp_path / name, 4)


def test_without_a_decoder_the_message_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "clip.mp4").write_bytes(b"a video")
    hide(monkeypatch, "av", "decord")
    with pytest.raises(SourceError, match=r"clip\.mp4 needs PyAV: pip install av"):
        load_clip(tmp_path / "clip.mp4", 4)
