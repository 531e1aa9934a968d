"""Palettes: k-means, files, the exact lookup table, encode and decode."""

import hashlib
import itertools

import numpy as np
import pytest
from conftest import patience

from igpt_jax import storage
from igpt_jax.config import UserError
from igpt_jax.data import color_sample, palette
from igpt_jax.data.order import Component


def brute_force(colors_PC, palette_VC):
    """Nearest palette entries by float64 squared distance; ties go to the lowest."""
    scaled_P1C = colors_PC[:, None] / 127.5 - 1
    distance_PV = ((scaled_P1C - palette_VC.astype(np.float64)) ** 2).sum(-1)
    return distance_PV.argmin(1)


def colors_of(index_P):
    return np.stack([index_P >> 16, index_P >> 8 & 255, index_P & 255], -1)


def random_palette(colors, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (colors, 3)).astype(np.float32)


def palette_with_ties():
    """Each entry twice, and entries mirrored at an 8-bit color: exact and near ties over whole planes."""
    some_VC = palette.decode(np.arange(40), random_palette(40)) / np.float32(127.5) - 1
    pair_VC = np.float32([[51, 51, 51], [51, 51, 153], [153, 51, 51]]) / np.float32(127.5) - 1
    return np.concatenate([some_VC, some_VC[::-1], pair_VC]).astype(np.float32)


@pytest.mark.parametrize("palette_VC", [random_palette(2), random_palette(512), palette_with_ties()],
                         ids=["2", "512", "ties"])
def test_lookup_table_equals_brute_force(palette_VC):
    """For random colors, the cube's corners and edges, and all grays. Seen to fail with a quarter of the bound in
    build_lookup_table, and with `<=` for `<` between candidates (ties)."""
    table = palette.build_lookup_table(palette_VC)
    assert table.dtype == np.uint16 and table.shape == (2**24,)
    edges = np.array(list(itertools.product((0, 1, 7, 8, 127, 128, 254, 255), repeat=3))) @ [2**16, 2**8, 1]
    planted = np.concatenate([edges, np.arange(256) * 0x010101, [0x333366, 0x663333, 0x663366]])
    index_P = np.concatenate([np.random.default_rng(1).integers(2**24, size=40_000), planted])
    for slice_P in np.array_split(index_P, 8):
        np.testing.assert_array_equal(table[slice_P], brute_force(colors_of(slice_P), palette_VC))


@pytest.mark.slow
@pytest.mark.timeout(patience(400))
def test_lookup_table_equals_brute_force_on_every_color():
    palette_VC = random_palette(512, seed=3)
    table = palette.build_lookup_table(palette_VC)
    for start in range(0, 2**24, 2**14):
        index_P = np.arange(start, start + 2**14)
        np.testing.assert_array_equal(table[index_P], brute_force(colors_of(index_P), palette_VC))


def test_lookup_table_cache(tmp_path, monkeypatch):
    """Seen to fail without the checksum."""
    monkeypatch.setenv(palette.CACHE_VARIABLE, str(tmp_path))
    palette_VC = random_palette(5)
    table = palette.lookup_table(palette_VC)
    (file,) = tmp_path.iterdir()
    data = bytearray(file.read_bytes())
    built = []
    monkeypatch.setattr(palette, "build_lookup_table", lambda palette_VC: built.append(1) or table)
    np.testing.assert_array_equal(palette.lookup_table(palette_VC), table)
    assert not built
    data[1000] ^= 1
    file.write_bytes(data)
    np.testing.assert_array_equal(palette.lookup_table(palette_VC), table)
    assert built and file.read_bytes() != data


def test_lookup_table_without_a_cache(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv(palette.CACHE_VARIABLE, str(file / "folder"))
    assert palette.lookup_table(random_palette(2)).shape == (2**24,)


def test_encode_is_row_by_row_and_decode_returns():
    """Seen to fail with Y and X swapped in encode."""
    palette_VC = np.float32([[-1, -1, -1], [1, -1, -1], [-1, -1, 1]])
    images_BYXC = np.array([[[[0, 0, 0], [255, 0, 0]], [[0, 0, 255], [9, 9, 9]]]], np.uint8)
    tokens_BT = palette.encode(images_BYXC, palette.build_lookup_table(palette_VC))
    assert tokens_BT.dtype == np.uint16 and tokens_BT.tolist() == [[0, 1, 2, 0]]
    decoded = palette.decode(tokens_BT, palette_VC)
    assert decoded.dtype == np.uint8 and decoded[0].tolist() == [[0, 0, 0], [255, 0, 0], [0, 0, 255], [0, 0, 0]]


def test_decode_rounds_half_to_even_like_the_release():
    """127.5 (0 + 1) = 127.5 -> 128; OpenAI's first two colors as 8-bit values. Seen to fail with floor."""
    palette_VC = np.float32([[0, 0, 0], [0.886644, 0.661883, 0.389175], [-0.604256, -0.022950, 0.542380]])
    assert palette.decode(np.arange(3), palette_VC).tolist() == [[128] * 3, [241, 212, 177], [50, 125, 197]]


class Images:
    """The parts of a store's split that `color_sample` reads."""

    def __init__(self, images_BYXC):
        self.read, self.count = images_BYXC.__getitem__, len(images_BYXC)
        self.components = (Component(self.count),)


def report(images_BYXC, palette_VC):
    return color_sample.report(Images(images_BYXC), palette_VC, seed=0)


def test_report(tmp_path, monkeypatch):
    """One of three channels off by 10: 20 log10(255) - 10 log10(100 / 3) dB. Half of the pixels black, half white:
    ln 2 nats. Seen to fail with sum for mean."""
    monkeypatch.setenv(palette.CACHE_VARIABLE, str(tmp_path))
    palette_VC = np.float32([[-1, -1, -1], [0, 0, 0], [1, 1, 1]])
    pixels = np.zeros((2, 4, 4, 3), np.uint8)
    assert report(pixels, palette_VC) == color_sample.Report(3, 1, None, 2, 1.0, 0.0)
    pixels[..., 0] = 10
    assert report(pixels, palette_VC).psnr_db == pytest.approx(20 * np.log10(255) - 10 * np.log10(100 / 3))
    pixels[1] = 255
    assert report(pixels, palette_VC).entropy_nats == pytest.approx(np.log(2))


def test_fit_is_seeded_sorted_and_better_than_chance():
    """Seen to fail with a fixed random_state, and without the sort."""
    pixels_PC = np.random.default_rng(0).normal(128, 40, (5000, 3)).clip(0, 255).astype(np.uint8)
    palette_VC = palette.fit(pixels_PC, 32, seed=1)
    assert palette_VC.dtype == np.float32 and palette_VC.shape == (32, 3) and np.abs(palette_VC).max() <= 1
    np.testing.assert_array_equal(palette_VC, palette.fit(pixels_PC, 32, seed=1))
    assert not np.array_equal(palette_VC, palette.fit(pixels_PC, 32, seed=2))
    luma_V = palette_VC @ np.float32([0.299, 0.587, 0.114])
    assert (np.diff(luma_V) >= 0).all()
    images_BYXC = pixels_PC.reshape(1, 50, 100, 3)
    fitted, chance = (report(images_BYXC, each_VC).psnr_db for each_VC in (palette_VC, random_palette(32)))
    assert fitted > chance + 3


def test_fit_with_a_color_each_is_exact():
    pixels_PC = np.repeat(np.arange(0, 255, 15, dtype=np.uint8)[:, None], 3, axis=1)[[3, 1, 2, *range(17)]]
    palette_VC = palette.fit(pixels_PC, 17, seed=0)
    np.testing.assert_array_equal(palette.decode(np.arange(17), palette_VC)[:, 0], np.arange(0, 255, 15))
    with pytest.raises(UserError, match="only 17 distinct colors"):
        palette.fit(pixels_PC, 18, seed=0)


def test_digest_and_round_trip(tmp_path):
    palette_VC = random_palette(7)
    np.save(tmp_path / "palette.npy", palette_VC)
    loaded_VC = palette.load(tmp_path / "palette.npy")
    np.testing.assert_array_equal(loaded_VC, palette_VC)
    assert palette.digest(loaded_VC) == hashlib.sha256(palette_VC.tobytes()).hexdigest()


class Canary:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("array", [
    np.zeros((4, 4), np.float32), np.zeros((512, 3), np.uint8), np.zeros((1, 3), np.float32), np.zeros(3, np.float32),
    np.full((4, 3), 1.5, np.float32), np.full((4, 3), np.nan, np.float32)],
    ids=["shape", "bytes", "one", "flat", "range", "nan"])
def test_bad_palettes(tmp_path, array):
    np.save(tmp_path / "palette.npy", array)
    with pytest.raises(UserError, match="palette.npy"):
        palette.load(tmp_path / "palette.npy")


def test_bad_palette_files(tmp_path):
    canary = tmp_path / "canary"
    np.save(tmp_path / "pickled.npy", np.array([Canary(canary)], object), allow_pickle=True)
    np.savez(tmp_path / "archive.npz", random_palette(4))
    storage.publish(storage.path(tmp_path / "text.npy"), "0.5 0.5 0.5")
    storage.publish(storage.path(tmp_path / "empty.npy"), "")
    for name in ("pickled.npy", "archive.npz", "text.npy", "empty.npy", "missing.npy"):
        with pytest.raises(UserError, match=name) as raised:
            palette.load(tmp_path / name)
        assert "\n" not in str(raised.value)
    assert not canary.exists()
