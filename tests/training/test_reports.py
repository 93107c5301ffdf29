"""Plots and sample sheets: which files appear, and what the pixels show."""

import math

import numpy as np
import pytest
from PIL import Image

from mplug_jax.training import reports
from mplug_jax.training.metrics import MetricsWriter


def write_run(workdir, lines):
    writer = MetricsWriter(workdir)
    for step, scalars in lines:
        writer.write(step, scalars)
    writer.close()


def names(paths):
    return [path.name for path in paths]


def test_a_single_line_is_enough(tmp_path):
    write_run(tmp_path, [(10, {"train/loss": 2.0})])
    (path,) = reports.plot_losses(tmp_path)
    assert path == tmp_path / "plots" / "losses.png"
    pixels = np.array(Image.open(path).convert("RGB"))
    # The one point is drawn in the first colour of the palette, #0072B2.
    assert np.any(np.all(np.abs(pixels.astype(int) - (0, 0x72, 0xB2)) < 8, axis=-1))


def test_each_kind_of_metric_has_its_file(tmp_path):
    lines = [
        (step, {"train/loss": 4 - step / 50, "train/loss_itc": 2.0, "train/learning_rate": 1e-3})
        for step in range(10, 130, 10)
    ]
    lines[4][1]["train/loss_itc"] = math.nan
    lines.append((120, {"retrieval/txt_r1": 30.0, "retrieval/img_r1": 29.0, "caption/a": 0.5}))
    write_run(tmp_path, lines)
    written = reports.plot_losses(tmp_path)
    assert names(written) == ["losses.png", "learning_rate.png", "evaluation.png"]
    assert all(Image.open(path).width > 500 for path in written)


def test_run_without_anything_to_draw(tmp_path):
    write_run(tmp_path, [(1, {"train/images_per_second": 3.0})])
    assert reports.plot_losses(tmp_path) == []


def test_folder_without_metrics(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"metrics\.jsonl"):
        reports.plot_losses(tmp_path)


def test_smoothing_keeps_a_line_and_lowers_noise():
    np.testing.assert_allclose(reports.smooth(np.full(50, 3.0), width=4), 3.0)
    ramp = reports.smooth(np.arange(100.0), width=4)
    np.testing.assert_allclose(ramp[12:-12], np.arange(100.0)[12:-12])  # no lag
    noise = np.random.default_rng(0).normal(size=400)
    assert reports.smooth(noise, width=4).std() < 0.4


def test_smoothing_steps_over_nan():
    values = np.full(40, 2.0)
    values[[0, 7, 39]] = math.nan, math.inf, math.nan
    np.testing.assert_allclose(reports.smooth(values, width=2), 2.0)
    assert np.isnan(reports.smooth(np.full(5, math.nan), width=1)).all()


def has_colour(picture, colour, tolerance=6):
    return np.any(np.all(np.abs(picture.astype(int) - colour) <= tolerance, axis=-1))


def test_sheet_shows_every_image_enlarged_pixel_for_pixel(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    path = reports.sample_sheet(tmp_path / "s" / "sheet.png", images, ["text"] * 5, columns=2)
    sheet = np.array(Image.open(path))
    found = 0
    for image in images:
        big = np.kron(image, np.ones((6, 6, 1), np.uint8))
        corners = np.argwhere(np.all(sheet[:-191, :-191] == big[0, 0], axis=-1))
        found += any(np.array_equal(sheet[y : y + 192, x : x + 192], big) for y, x in corners)
    assert found == 5
    assert sheet.shape[1] < 3 * 192  # two columns


def test_sheet_colours_right_and_wrong(tmp_path):
    images = np.zeros((1, 16, 16, 3), np.uint8)
    green, red = (0x13, 0x71, 0x3A), (0xB3, 0x26, 0x1E)
    for mark, seen in ((True, (True, False)), (False, (False, True)), (None, (False, False))):
        path = reports.sample_sheet(tmp_path / "sheet.png", images, ["a red circle"], ok=[mark])
        sheet = np.array(Image.open(path))
        assert (has_colour(sheet, green), has_colour(sheet, red)) == seen


def test_longer_text_makes_the_sheet_taller_not_wider(tmp_path):
    images = np.zeros((1, 32, 32, 3), np.uint8)
    short = Image.open(reports.sample_sheet(tmp_path / "a.png", images, ["short"]))
    long = Image.open(reports.sample_sheet(tmp_path / "b.png", images, ["word " * 30 + "x" * 99]))
    assert long.width == short.width and long.height > short.height + 80


@pytest.mark.parametrize(("shape", "scale", "width"), [((40, 640), None, 320), ((20, 30), 3, 192)])
def test_sheet_fits_large_pictures_and_takes_a_scale(tmp_path, shape, scale, width):
    images = np.zeros((1, *shape, 3), np.uint8)
    sheet = Image.open(reports.sample_sheet(tmp_path / "a.png", images, [""], scale=scale))
    assert sheet.width == width + 2 * (reports._PADDING + reports._MARGIN)


@pytest.mark.parametrize(
    ("images", "titles", "ok"),
    [
        (np.zeros((2, 8, 8, 3), np.uint8), ["one"], None),
        (np.zeros((1, 8, 8, 3), np.uint8), ["one"], [True, False]),
        (np.zeros((0, 8, 8, 3), np.uint8), [], None),
        (np.zeros((1, 8, 8, 3), np.float32), ["one"], None),
        (np.zeros((8, 8, 3), np.uint8), ["one"], None),
    ],
)
def test_sheet_refuses_what_does_not_fit(tmp_path, images, titles, ok):
    with pytest.raises(ValueError, match=r"as many|uint8"):
        reports.sample_sheet(tmp_path / "a.png", images, titles, ok=ok)


def test_wrapping_keeps_every_word_within_the_width():
    text = "a large red circle " * 5 + "x" * 80
    lines = reports._fold(text, 150, bold=True)
    assert all(reports._font(True).getlength(line) <= 150 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
