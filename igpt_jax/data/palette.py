"""Palettes, the colors that are the model's vocabulary: fit, load, exact lookup, encode, decode. NumPy only.

A palette is float32 [V, 3] in [-1, 1]; an 8-bit channel p stands for p / 127.5 - 1 (paper, Section 3.2; scale as in
OpenAI's released code). A pixel's token is the index of its nearest color by squared distance; ties go to the lowest.

Shapes in names: B batch, T tokens, V palette, P pixels; Y rows, X columns, C channels; in the lookup table's
construction also G groups of 8x8x8 colors, K candidate colors of a group.
"""

import contextlib
import hashlib
import io
import os

import numpy as np
from etils import epath

from igpt_jax import storage
from igpt_jax.config import UserError

# A fit takes seconds. Twice the pixels and three times the rounds gain only 0.07 dB on CIFAR-10.
FIT_PIXELS, FIT_ROUNDS = 2**17, 30
LARGEST = 2**12  # colors; building the lookup table takes a matrix of all pairs, 128 MiB at this size
CACHE_VARIABLE = "IGPT_CACHE"


def fit(pixels_PC: np.ndarray, colors: int, seed: int) -> np.ndarray:
    """Fits a palette of `colors` colors by k-means, sorted from dark to light.

    The colors are sorted by luma (0.299 R + 0.587 G + 0.114 B), then by R, G and B. The same seed gives the same
    palette.

    Args:
      pixels_PC: uint8 [P, 3]; if there are more than 2^17, a seeded sample is used.
      colors: V, the length of the palette.
      seed: chooses the sample and the starting centers.

    Returns:
      float32 [V, 3] in [-1, 1].

    Raises:
      UserError: `colors` is out of range, or larger than the number of distinct colors.
    """
    from sklearn.cluster import KMeans  # takes a second to import, and few callers fit
    from threadpoolctl import threadpool_limits

    if len(pixels_PC) > FIT_PIXELS:
        pixels_PC = pixels_PC[np.random.default_rng(seed).choice(len(pixels_PC), FIT_PIXELS, replace=False)]
    index_P, count_P = np.unique(_index(pixels_PC), return_counts=True)
    if not 2 <= colors <= LARGEST:
        raise UserError(f"palette fit:{colors}: a palette has 2 to {LARGEST} colors.")
    if colors > len(index_P):
        raise UserError(f"palette fit:{colors}: the images have only {len(index_P)} distinct colors. "
                        f"Ask for at most fit:{len(index_P)}.")
    distinct_PC = _scaled(np.stack([index_P >> 16, index_P >> 8 & 255, index_P & 255], axis=-1))
    if colors == len(index_P):
        centers_VC = distinct_PC
    else:
        with threadpool_limits(limits=1):  # several threads would add up in a random order, and so give other palettes
            means = KMeans(colors, n_init=1, max_iter=FIT_ROUNDS, random_state=seed % 2**32)
            centers_VC = means.fit(distinct_PC.astype(np.float32), sample_weight=count_P).cluster_centers_
    palette_VC = np.clip(centers_VC, -1, 1).astype(np.float32)
    luma_V = palette_VC @ np.float32([0.299, 0.587, 0.114])
    return palette_VC[np.lexsort([*palette_VC.T[::-1], luma_V])]


def load(path: str | os.PathLike) -> np.ndarray:
    """The palette in an .npy file, float32 [V, 3]; OpenAI's kmeans_centers.npy is one.

    Raises:
      UserError: not readable, or not floats [V, 3] in [-1, 1] with 2 <= V <= LARGEST.
    """
    data = storage.read(storage.path(path))
    try:
        palette_VC = np.load(io.BytesIO(data), allow_pickle=False)
    except Exception as error:  # NumPy parses the header as Python: damaged ones raise SyntaxError and others
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"palette {path}: not a plain .npy array ({reason}). Save it with numpy.save.") from None
    rule = f"palette {path}: a palette is floats [V, 3] in [-1, 1] with 2 <= V <= {LARGEST}"
    if not (isinstance(palette_VC, np.ndarray) and palette_VC.dtype.kind == "f" and palette_VC.ndim == 2
            and palette_VC.shape[1] == 3 and 2 <= len(palette_VC) <= LARGEST):
        shape = f"{palette_VC.dtype} {list(palette_VC.shape)}" if isinstance(palette_VC, np.ndarray) else "an archive"
        raise UserError(f"{rule}; this is {shape}. Save such an array with numpy.save.")
    if not (np.abs(palette_VC) <= 1).all():  # not(...): a NaN compares false
        raise UserError(f"{rule}; this has values outside. Convert colors 0..255 with x / 127.5 - 1.")
    return np.ascontiguousarray(palette_VC, np.float32)


def save(path: epath.Path, palette_VC: np.ndarray) -> None:
    """Writes a palette as an .npy file."""
    array = io.BytesIO()
    np.save(array, palette_VC)
    storage.publish(path, array.getvalue())


def digest(palette_VC: np.ndarray) -> str:
    """SHA-256 of the float32 values in C order, hexadecimal. OpenAI's palette: 017426d1..."""
    return hashlib.sha256(np.ascontiguousarray(palette_VC, "<f4").tobytes()).hexdigest()


def encode(images_BYXC: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Tokens uint16 [B, Y*X] of images uint8 [B, Y, X, 3], row by row (paper, Section 2.1)."""
    # Unlike table[...], `take` releases Python's lock while it runs.
    return table.take(_index(images_BYXC).reshape(len(images_BYXC), -1))


def decode(tokens: np.ndarray, palette_VC: np.ndarray) -> np.ndarray:
    """Colors uint8 [..., 3] of tokens [...]: 127.5 (c + 1), rounded half to even, as in OpenAI's released code."""
    colors_VC = np.clip(np.rint(127.5 * (palette_VC.astype(np.float64) + 1)), 0, 255).astype(np.uint8)
    return colors_VC[tokens]


def lookup_table(palette_VC: np.ndarray) -> np.ndarray:
    """The token of every 8-bit color: uint16 [2^24], indexed by R << 16 | G << 8 | B.

    It equals the argmin over float64 squared distances for every color. It is built once per palette and cached in a
    file of 32 MiB in $IGPT_CACHE (default: ~/.cache/igpt_jax). A damaged file is built again.
    """
    folder = storage.path(os.environ.get(CACHE_VARIABLE) or "~/.cache/igpt_jax")
    file = folder / f"lookup-{digest(palette_VC)}.bin"
    with contextlib.suppress(OSError):
        data = file.read_bytes()
        table, checksum = data[:-32], data[-32:]
        if len(table) == 2**25 and hashlib.sha256(table).digest() == checksum:
            return np.frombuffer(table, "<u2")
    table = build_lookup_table(palette_VC)
    data = table.astype("<u2").tobytes()
    with contextlib.suppress(OSError):  # without a writable cache the next run builds it again, in two seconds
        storage.publish(file, data + hashlib.sha256(data).digest())
    return table


def build_lookup_table(palette_VC: np.ndarray) -> np.ndarray:
    """`lookup_table` without its cache.

    Comparing 2^24 colors with all V entries would take minutes. Instead the colors are divided into 32^3 groups of
    8x8x8, and most entries are excluded for a whole group at once. For palette entries u and v, the difference d_v -
    d_u of the squared distances is linear in the color. Within a group's box, v is therefore nowhere nearer than u if
    d_v(center) - d_u(center) > half_width * sum |gradient|, with gradient = 2 (c_u - c_v). With u as the entry nearest
    to the center, few candidates are left; these are compared exactly.
    """
    palette_VC = palette_VC.astype(np.float64)
    # Squared distance along one channel, from each of its 256 values to each palette entry.
    channel_CPV = (_scaled(np.arange(256))[None, :, None] - palette_VC.T[:, None, :]) ** 2
    # A group spans 8 values of each channel, 3.5 to either side of its center.
    half_width = 3.5 / 127.5
    centers = _scaled(np.arange(32) * 8 + 3.5)
    red_GV, green_GV, blue_GV = (centers[:, None] - palette_VC.T[:, None, :]) ** 2
    l1_VV = sum(np.abs(column[:, None] - column[None]) for column in palette_VC.T)

    table_RGB = np.empty((32, 8, 32, 8, 32, 8), np.uint16)
    for r in range(32):
        center_GV = (red_GV[r] + green_GV[:, None] + blue_GV[None]).reshape(32 * 32, -1)
        nearest_G = center_GV.argmin(1)
        excess_GV = center_GV - center_GV[np.arange(len(nearest_G)), nearest_G, None]
        # 1e-9 is far above float64's rounding error of distances up to 12, so ties remain candidates.
        candidate_GV = excess_GV <= 2 * half_width * l1_VV[nearest_G] + 1e-9
        count_G = candidate_GV.sum(1)
        # Groups with equally many candidates are compared in one array operation.
        for count in np.unique(count_G):
            group_G = np.flatnonzero(count_G == count)
            token_GK = np.nonzero(candidate_GV[group_G])[1].reshape(-1, count)  # ascending: ties go to the lowest
            green_G, blue_G = np.divmod(group_G, 32)
            best = _nearest_candidate(channel_CPV, r, green_G, blue_G, token_GK)
            table_RGB[r][:, green_G, :, blue_G, :] = best
    return table_RGB.reshape(-1)


def _nearest_candidate(channel_CPV, red, green_G, blue_G, token_GK) -> np.ndarray:
    """uint16 [G, 8, 8, 8]: for each color of each group, the nearest of the group's candidates."""
    steps = np.arange(8)
    red_GPK = channel_CPV[0][(red * 8 + steps)[None, :, None], token_GK[:, None, :]]
    green_GPK = channel_CPV[1][(green_G[:, None] * 8 + steps)[:, :, None], token_GK[:, None, :]]
    blue_GPK = channel_CPV[2][(blue_G[:, None] * 8 + steps)[:, :, None], token_GK[:, None, :]]
    best = np.empty((len(token_GK), 8, 8, 8), np.uint16)
    best[:] = token_GK[:, 0, None, None, None]
    if token_GK.shape[1] == 1:
        return best
    distance = red_GPK[:, :, None, None, 0] + green_GPK[:, None, :, None, 0] + blue_GPK[:, None, None, :, 0]
    for k in range(1, token_GK.shape[1]):
        # Summed in the order of the brute force, (R + G) + B, so that near ties are equal to the last bit.
        other = red_GPK[:, :, None, None, k] + green_GPK[:, None, :, None, k] + blue_GPK[:, None, None, :, k]
        nearer = other < distance
        np.copyto(best, token_GK[:, k, None, None, None].astype(np.uint16), where=nearer)
        np.copyto(distance, other, where=nearer)
    return best


def _scaled(values: np.ndarray) -> np.ndarray:
    """8-bit values on the palette's scale, float64."""
    return values / 127.5 - 1


def _index(colors: np.ndarray) -> np.ndarray:
    """R << 16 | G << 8 | B of uint8 [..., 3], int32."""
    red, green, blue = np.moveaxis(colors, -1, 0).astype(np.int32)
    return red << 16 | green << 8 | blue
