"""Curves and pictures."""

import numpy as np
from PIL import Image

from igpt_jax import figures, storage


def test_figures(tmp_path):
    """Seen to fail with rows of images that overlap the gap."""
    metrics = [{"step": step, "train/nats_per_pixel": 3 / step} for step in (1, 2, 4)] + [
        {"step": 4, "eval/nats_per_pixel": 1.0}, {"step": 5, "train/nats_per_pixel": None}]
    figures.loss_curve(storage.path(tmp_path / "figures" / "loss.png"), metrics, palette_size=17)
    with Image.open(tmp_path / "figures" / "loss.png") as image:
        assert image.width > 800

    images = np.arange(5 * 2 * 2 * 3, dtype=np.uint8).reshape(5, 2, 2, 3)
    grid = figures.image_grid(images, columns=3, scale=4, gap=2)
    assert grid.size == (3 * 8 + 2 * 2, 2 * 8 + 2)
    pixels = np.asarray(grid)
    np.testing.assert_array_equal(pixels[10:18, 10:18], images[4].repeat(4, axis=0).repeat(4, axis=1))
    assert (pixels[:, 8:10] == 255).all() and (pixels[10:, 20:] == 255).all()
    figures.save_png(storage.path(tmp_path / "grid.png"), grid)
    with Image.open(tmp_path / "grid.png") as image:
        np.testing.assert_array_equal(np.asarray(image), pixels)
