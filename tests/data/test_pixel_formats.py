"""Every pixel format of docs/pictures.md is decoded to the RGB that arithmetic gives, or refused by name."""

import io
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import tifffile
from PIL import Image

from featsharp.data import decode_image
from featsharp.errors import DataError

PAGE = Path(__file__).resolve().parents[2] / "docs" / "pictures.md"
H, W = 21, 34
GREY = 128  # what shows through
Case = tuple[Any, np.ndarray | None]  # a file or a Pillow image, and its colours from 0 to 255 (None: refused)


def levels(bits: int, channels: int = 1, seed: int = 0) -> np.ndarray:
    """Random whole levels [H, W, channels], the least and the largest among them."""
    values = np.random.default_rng(seed).integers(0, 2**bits, (H, W, channels))
    values[0, 0], values[-1, -1] = 0, 2**bits - 1
    return values.astype(np.uint8 if bits <= 8 else np.uint16)


def colours(values: np.ndarray, bits: int) -> np.ndarray:
    """From levels [H, W, c] of grey, grey and alpha, RGB or RGBA to colours over grey, from 0 to 255."""
    shares = values.astype(float) / (2**bits - 1)
    alpha = 1.0
    if shares.shape[-1] in (2, 4):
        shares, alpha = shares[..., :-1], shares[..., -1:]
    return np.broadcast_to(255 * shares * alpha + GREY * (1 - alpha), (H, W, 3))


def premultiplied(values: np.ndarray, bits: int) -> np.ndarray:
    alpha = values[..., -1:] / (2**bits - 1)
    return np.concatenate([(values[..., :-1] * alpha).round(), values[..., -1:]], -1).astype(values.dtype)


def from_cmyk(values: np.ndarray, bits: int) -> np.ndarray:
    ink = values / (2**bits - 1)
    return 255 * (1 - ink[..., :3]) * (1 - ink[..., 3:])


def from_ycbcr(values: np.ndarray) -> np.ndarray:
    y, cb, cr = (values[..., i].astype(float) for i in range(3))
    cb, cr = cb - 128, cr - 128
    return np.clip(np.stack([y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb], -1), 0, 255)


def from_lab(lightness: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """From CIELab of the white D50 to sRGB, by the formulas of the CIE and of IEC 61966-2-1 (Bradford adaptation)."""
    fy = (lightness / 255 * 100 + 16) / 116
    f = np.stack([fy + a / 500, fy, fy - b / 200], -1)
    xyz = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * (0.9642, 1, 0.8249)
    matrix = [
        [3.1338561, -1.6168667, -0.4906146],
        [-0.9787684, 1.9161415, 0.033454],
        [0.0719453, -0.2289914, 1.4052427],
    ]
    linear = np.clip(xyz @ np.array(matrix).T, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def packed(values: np.ndarray, bits: int) -> list[bytes]:
    """Rows of levels, most significant bit first, as PNG and TIFF store them."""
    rows = values.reshape(len(values), -1)
    return [np.packbits((row[:, None] >> np.arange(bits - 1, -1, -1) & 1).astype(np.uint8)).tobytes() for row in rows]


def png(values: np.ndarray, bits: int, kind: int, **chunks: bytes) -> bytes:
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", W, H, bits, kind, 0, 0, 0)
    others = b"".join(chunk(name.encode(), body) for name, body in chunks.items())
    pixels = zlib.compress(b"".join(b"\0" + row for row in packed(values, bits)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + others + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def tiff(values: np.ndarray, photometric: str, **options: Any) -> bytes:
    """A file of tifffile, from pixels [H, W, c]; in one plane for each channel with ``planarconfig="separate"``."""
    if options.get("planarconfig") == "separate":
        values = np.moveaxis(values, -1, 0)
    elif values.shape[-1] == 1:
        values = values[..., 0]
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, values, photometric=photometric, metadata=None, **options)
    if options.get("compression") in (None, "zlib"):  # what tifffile reads alone
        buffer.seek(0)
        assert np.array_equal(tifffile.imread(buffer), values)
    return buffer.getvalue()


def plain_tiff(pixels: bytes, tags: dict[int, int | list[int]], order: str = "<") -> bytes:
    """An uncompressed file of one strip, for what tifffile does not write."""
    tags = {256: W, 257: H, 259: 1, 273: 8, 278: H, 279: len(pixels), **tags}
    entries, tail = b"", b""
    start = 8 + len(pixels)
    after = start + 2 + 12 * len(tags) + 4
    for tag, value in sorted(tags.items()):
        values = value if isinstance(value, list) else [value]
        body = struct.pack(f"{order}{len(values)}H", *values)
        if len(body) > 4:
            body, tail = struct.pack(f"{order}I", after + len(tail)), tail + body
        entries += struct.pack(f"{order}HHI", tag, 3, len(values)) + body.ljust(4, b"\0")
    head = struct.pack(f"{order}2sHI", b"II" if order == "<" else b"MM", 42, start)
    return head + pixels + struct.pack(f"{order}H", len(tags)) + entries + bytes(4) + tail


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def smooth(channels: int = 3) -> np.ndarray:
    """A gradient, which lossy formats keep closely."""
    y, x = np.mgrid[:H, :W]
    planes = [x * 255 // (W - 1), y * 255 // (H - 1), (x + y) * 4, 255 - x * 7]
    return np.stack(planes[:channels], -1).astype(np.uint8)


# What each row of the table says is made here: the names of the functions are their keys.


def png_grey() -> Iterator[Case]:
    for bits in (1, 2, 4, 8, 16):
        yield png(levels(bits), bits, 0), colours(levels(bits), bits)


def png_grey_key() -> Iterator[Case]:
    for bits in (1, 2, 4, 8, 16):
        values = levels(bits)
        if bits == 16:  # neighbours of the transparent level, equal to it in their upper byte
            values[3:5], values[5] = 0x1234, 0x1235
        for key in {0, 2**bits - 1, int(values[3, 3, 0])}:
            yield (
                png(values, bits, 0, tRNS=struct.pack(">H", key)),
                np.where(values == key, GREY, colours(values, bits)),
            )


def png_rgb() -> Iterator[Case]:
    for bits in (8, 16):
        yield png(levels(bits, 3), bits, 2), colours(levels(bits, 3), bits)


def png_rgb_key() -> Iterator[Case]:
    values = levels(8, 3)
    key = values[4, 4]
    expected = np.where((values == key).all(-1, keepdims=True), GREY, values)
    yield png(values, 8, 2, tRNS=struct.pack(">3H", *key)), expected


def png_rgb_key_16() -> Iterator[Case]:
    for key in ((0x1234, 0x5678, 0x9ABC), (0, 0, 0)):
        data = png(levels(16, 3), 16, 2, tRNS=struct.pack(">3H", *key))
        yield data, None
        yield Image.open(io.BytesIO(data)), None


def png_alpha() -> Iterator[Case]:
    for bits in (8, 16):
        yield png(levels(bits, 2), bits, 4), colours(levels(bits, 2), bits)
        yield png(levels(bits, 4), bits, 6), colours(levels(bits, 4), bits)


def png_palette() -> Iterator[Case]:
    for bits in (1, 2, 4, 8):
        table = levels(8, 4).reshape(-1, 4)[1 : 2**bits + 1]
        index = levels(bits)[..., 0]
        data = {"PLTE": table[:, :3].tobytes()}
        yield png(index, bits, 3, **data), table[index][..., :3]
        yield png(index, bits, 3, **data, tRNS=table[:, 3].tobytes()), colours(table[index], 8)
        table[1:, 3] = 255  # a short tRNS: the rest is opaque
        yield png(index, bits, 3, **data, tRNS=table[:1, 3].tobytes()), colours(table[index], 8)


def jpeg() -> Iterator[Case]:
    for mode in ("L", "RGB", "YCbCr"):
        image = Image.fromarray(smooth()).convert(mode)
        yield saved(image, "JPEG", quality=98, subsampling=0), np.asarray(image.convert("RGB"))


def cmyk_jpeg() -> bytes:
    return saved(Image.frombytes("CMYK", (W, H), smooth(4).tobytes()), "JPEG", quality=98, subsampling=0)


def jpeg_cmyk() -> Iterator[Case]:
    assert b"Adobe" in cmyk_jpeg()
    yield cmyk_jpeg(), from_cmyk(smooth(4), 8)


def jpeg_cmyk_unmarked() -> Iterator[Case]:
    data = cmyk_jpeg()
    start = data.index(b"\xff\xee")
    yield data[:start] + data[start + 2 + int.from_bytes(data[start + 2 : start + 4], "big") :], None


def tiff_grey() -> Iterator[Case]:
    for bits in (1, 2, 4):
        for white, photometric in ((0, 1), (1, 0)):
            for order in "<>":
                tags = {258: bits, 262: photometric, 277: 1}
                shown = colours(levels(bits), bits)
                yield plain_tiff(b"".join(packed(levels(bits), bits)), tags, order), 255 - shown if white else shown
    for bits in (8, 16):
        for options in TIFF_OPTIONS:
            if not (options.get("planarconfig") or options.get("extrasamples")):
                yield tiff(levels(bits), "minisblack", **options), colours(levels(bits), bits)


def tiff_white() -> Iterator[Case]:
    for bits in (8, 16):
        for options in TIFF_OPTIONS:
            yield tiff(levels(bits), "miniswhite", **options), 255 - colours(levels(bits), bits)
    yield Image.open(io.BytesIO(tiff(levels(16), "miniswhite"))), 255 - colours(levels(16), 16)


def tiff_12() -> Iterator[Case]:
    data = plain_tiff(b"".join(packed(levels(12), 12)), {258: 12, 262: 1, 277: 1})
    yield data, colours(levels(12), 12)


def tiff_rgb() -> Iterator[Case]:
    for bits in (8, 16):
        for options in TIFF_OPTIONS:
            yield tiff(levels(bits, 3), "rgb", **options), colours(levels(bits, 3), bits)
    for compression in ("tiff_lzw", "packbits", "tiff_adobe_deflate", "zstd", "lzma"):
        yield saved(Image.fromarray(levels(8, 3)), "TIFF", compression=compression), levels(8, 3)
    pages = [Image.fromarray(levels(8, 3, seed)) for seed in range(3)]
    yield saved(pages[0], "TIFF", save_all=True, append_images=pages[1:]), levels(8, 3)


def tiff_alpha() -> Iterator[Case]:
    for channels, kind in ((2, "minisblack"), (4, "rgb")):
        values = levels(8, channels)
        for options in TIFF_OPTIONS:
            yield tiff(values, kind, extrasamples=["unassalpha"], planarconfig="contig", **options), colours(values, 8)
            stored = premultiplied(values, 8)
            yield (
                tiff(stored, kind, extrasamples=["assocalpha"], planarconfig="contig", **options),
                colours(values, 8),
            )
            yield (
                tiff(values, kind, extrasamples=["unspecified"], planarconfig="contig", **options),
                colours(values[..., :-1], 8),
            )
    values = levels(16, 4)
    yield tiff(values, "rgb", extrasamples=["unassalpha"]), colours(values, 16)


def tiff_palette() -> Iterator[Case]:
    table = levels(16, 3).reshape(-1, 3)[1:257]
    index = levels(8)
    yield tiff(index, "palette", colormap=table.T), colours(table[index[..., 0]], 16)
    old = table >> 8  # written with 8 bits, in spite of the standard
    yield tiff(index, "palette", colormap=old.T), old[index[..., 0]]
    image = Image.frombytes("PA", (W, H), levels(8, 2).tobytes())
    image.putpalette(old.astype(np.uint8).tobytes())
    expected = np.concatenate([old[levels(8, 2)[..., 0]], levels(8, 2)[..., 1:]], -1)
    yield saved(image, "TIFF"), colours(expected, 8)
    for bits in (1, 2, 4):
        table = levels(16, 3).reshape(-1, 3)[1 : 2**bits + 1]
        tags = {258: bits, 262: 3, 277: 1, 320: table.T.ravel().tolist()}
        yield plain_tiff(b"".join(packed(levels(bits), bits)), tags), colours(table[levels(bits)[..., 0]], 16)


def tiff_cmyk() -> Iterator[Case]:
    for bits in (8, 16):
        for order in "<>":
            values = levels(bits, 4)
            yield tiff(values, "separated", byteorder=order), from_cmyk(values, bits)


def tiff_ycbcr() -> Iterator[Case]:
    for options in ({}, {"compression": "zlib"}):
        yield tiff(levels(8, 3), "ycbcr", **options), from_ycbcr(levels(8, 3))
    yield saved(Image.fromarray(smooth()).convert("YCbCr"), "TIFF", compression="jpeg", quality=98), smooth()


def lab() -> tuple[np.ndarray, np.ndarray]:
    values = levels(8, 3)
    lightness, a, b = 90 + values[..., 0] // 4, values[..., 1] // 8 - 15.0, values[..., 2] // 8 - 15.0
    stored = np.stack([lightness, a.astype(np.int8).view(np.uint8), b.astype(np.int8).view(np.uint8)], -1)
    return stored.astype(np.uint8), from_lab(lightness, a, b)


def tiff_lab() -> Iterator[Case]:
    stored, expected = lab()
    yield tiff(stored, "cielab"), expected
    yield tiff(stored, "cielab", compression="zlib", byteorder=">"), expected
    yield Image.frombytes("LAB", (W, H), stored.tobytes()), expected


def tiff_planes() -> Iterator[Case]:
    for values, bits, kind in ((levels(8, 3), 8, "rgb"), (levels(16, 3), 16, "rgb"), (levels(8, 4), 8, "separated")):
        expected = from_cmyk(values, bits) if kind == "separated" else colours(values, bits)
        yield tiff(values, kind, planarconfig="separate", compression="zlib"), expected
        if bits == 8:
            yield tiff(values, kind, planarconfig="separate"), expected


def tiff_planes_refused() -> Iterator[Case]:
    yield tiff(levels(16, 3), "rgb", planarconfig="separate"), None
    yield tiff(levels(16, 4), "separated", planarconfig="separate"), None
    for compression in (None, "zlib"):
        yield tiff(levels(8, 3), "cielab", planarconfig="separate", compression=compression), None
        for extra in ("unassalpha", "assocalpha", "unspecified"):
            options = {"planarconfig": "separate", "extrasamples": [extra], "compression": compression}
            yield tiff(levels(8, 2), "minisblack", **options), None


def tiff_float() -> Iterator[Case]:
    for kind in (np.float16, np.float32, np.float64):
        yield tiff(levels(8).astype(kind) / 255, "minisblack"), None
        yield tiff(levels(8, 3).astype(kind) / 255, "rgb"), None


def tiff_signed() -> Iterator[Case]:
    for kind in (np.int8, np.int16, np.int32, np.uint32, np.uint64):
        for photometric, channels in (("minisblack", 1), ("rgb", 3)):
            yield tiff(levels(4, channels).astype(kind), photometric), None


def tiff_other() -> Iterator[Case]:
    for bits, photometric in ((6, 1), (10, 1), (14, 1), (12, 0)):
        yield plain_tiff(b"".join(packed(levels(bits), bits)), {258: bits, 262: photometric, 277: 1}), None
    yield plain_tiff(b"".join(packed(levels(12), 12)), {258: 12, 262: 1, 277: 1}, ">"), None
    yield tiff(levels(16, 2), "minisblack", extrasamples=["unassalpha"], planarconfig="contig"), None
    yield tiff(levels(16, 3), "cielab"), None
    yield plain_tiff(levels(8).tobytes(), {258: 8, 262: 32803, 277: 1}), None


def tiff_inks() -> Iterator[Case]:
    yield tiff(levels(8, 4), "separated", extratags=[(332, "H", 1, 2, True)]), None


def tiff_raw() -> Iterator[Case]:
    yield tiff(levels(8, 3), "rgb", extratags=[(50706, "B", 4, (1, 4, 0, 0), True)]), None
    tags: dict[int, int | list[int]] = {254: 1, 258: [8, 8, 8], 262: 2, 277: 3, 330: 8}  # a preview and its original
    yield plain_tiff(levels(8, 3).tobytes(), tags), None


def tiff_big() -> Iterator[Case]:
    yield tiff(levels(8, 3), "rgb", bigtiff=True, byteorder=">"), None


def others() -> Iterator[Case]:
    grey, rgb, rgba = levels(8)[..., 0], levels(8, 3), levels(8, 4)
    for kind in ("GIF", "WEBP", "PNG", "TIFF"):  # the first picture of several
        frames = [Image.fromarray(levels(3, 1, seed)[..., 0] * 36) for seed in range(3)]
        options = {"lossless": True} if kind == "WEBP" else {}
        yield (
            saved(frames[0], kind, save_all=True, append_images=frames[1:], **options),
            np.asarray(frames[0])[..., None],
        )
    yield saved(Image.fromarray(rgba), "WEBP", lossless=True, exact=True), colours(rgba, 8)
    for image, expected in ((Image.fromarray(grey), grey[..., None]), (Image.fromarray(rgb), rgb)):
        yield saved(image, "BMP"), expected
        yield saved(image, "JPEG2000"), expected
    yield saved(Image.fromarray(rgba), "JPEG2000"), colours(rgba, 8)
    yield saved(Image.fromarray(levels(16)[..., 0]), "JPEG2000"), colours(levels(16), 16)
    for top in (1, 100, 255, 1023, 65535):
        values = levels(16, 3).astype(int) % (top + 1)
        raw = values.astype(">u2" if top > 255 else "u1")
        yield b"P6 %d %d %d\n" % (W, H, top) + raw.tobytes(), values / top * 255
        yield b"P5 %d %d %d\n" % (W, H, top) + raw[..., 0].tobytes(), values[..., :1] / top * 255
    yield b"P4 %d %d\n" % (W, H) + b"".join(packed(levels(1), 1)), 255 - colours(levels(1), 1)


def others_lossy() -> Iterator[Case]:
    yield saved(Image.fromarray(smooth()), "AVIF", quality=98, subsampling="4:4:4"), smooth()
    yield saved(Image.fromarray(smooth()), "WEBP", quality=98), smooth()
    yield (
        saved(Image.fromarray(smooth()), "MPO", save_all=True, append_images=[Image.new("RGB", (W, H))], quality=98),
        smooth(),
    )


def jpeg2000_refused() -> Iterator[Case]:
    for channels, bits in ((1, 4), (3, 12), (3, 16)):
        image = Image.fromarray(levels(8, channels)[..., 0] if channels == 1 else levels(8, channels))
        data = bytearray(saved(image, "JPEG2000", no_jp2=True))
        for channel in range(channels):
            data[42 + 3 * channel] = bits - 1  # the depth in the size marker
        yield bytes(data), None
        yield Image.open(io.BytesIO(data)), None


def pfm() -> Iterator[Case]:
    values = levels(8, 3).astype("<f4")
    yield b"Pf\n%d %d\n-1.0\n" % (W, H) + values[..., :1].tobytes(), None
    yield b"PF\n%d %d\n-1.0\n" % (W, H) + values.tobytes(), None


def foreign() -> Iterator[Case]:
    for start in (
        b"8BPS\0\1",
        b"\x00\x00\x00\x18ftypheic",
        b"v/1\x01",
        b"P7\nWIDTH 4\n",
        b"\x00\x00\x00\x0cJXL ",
    ):
        yield start + bytes(40), None


def pillow_modes() -> Iterator[Case]:
    def image(mode: str, values: np.ndarray) -> Image.Image:
        return Image.frombytes(mode, (W, H), values.tobytes())

    values, grey, rgba, pair = levels(16), levels(8), levels(8, 4), levels(8, 2)
    for mode, kind in (("I;16", "<u2"), ("I;16L", "<u2"), ("I;16B", ">u2"), ("I;16N", "=u2"), ("I", "=i4")):
        yield image(mode, values.astype(kind)), colours(values, 16)
    yield Image.fromarray(grey[..., 0] > 99), 255 * (grey > 99)
    yield image("L", grey), grey
    yield image("RGB", rgba[..., :3]), rgba[..., :3]
    yield image("RGBX", rgba), rgba[..., :3]
    yield image("RGBA", rgba), colours(rgba, 8)
    yield image("RGBa", premultiplied(rgba, 8)), colours(rgba, 8)
    yield image("LA", pair), colours(pair, 8)
    yield image("La", premultiplied(pair, 8)), colours(pair, 8)
    yield image("CMYK", rgba), from_cmyk(rgba, 8)
    yield image("YCbCr", rgba[..., :3]), from_ycbcr(rgba[..., :3])
    hue = np.full((H, W), 170)  # blue
    saturation, value = rgba[..., 1] / 255, rgba[..., 2].astype(float)
    low = value * (1 - saturation)
    yield image("HSV", np.dstack([hue, rgba[..., 1:3]]).astype(np.uint8)), np.dstack([low, low, value])
    table = levels(8, 3, seed=1).reshape(-1, 3)[:256]
    paletted = image("P", grey)
    paletted.putpalette(table.tobytes())
    yield paletted, table[grey[..., 0]]
    keyed = paletted.copy()
    keyed.info["transparency"] = 7
    yield keyed, np.where(grey == 7, GREY, table[grey[..., 0]])
    with_alpha = image("PA", pair)
    with_alpha.putpalette(table.tobytes())
    yield with_alpha, colours(np.concatenate([table[pair[..., 0]], pair[..., 1:]], -1), 8)


def pillow_refused() -> Iterator[Case]:
    yield Image.fromarray(levels(8)[..., 0].astype(np.float32)), None
    yield Image.fromarray(np.array([[70000, 1]], np.int32)), None
    yield Image.fromarray(np.array([[-1, 1]], np.int32)), None


TIFF_OPTIONS: list[dict[str, Any]] = [
    {},
    {"byteorder": ">"},
    {"bigtiff": True},
    {"tile": (16, 16)},
    {"rowsperstrip": 5},
    {"compression": "zlib"},
    {"compression": "zlib", "byteorder": ">"},
    {"compression": "zlib", "predictor": True},
]


class Kind(NamedTuple):
    """A row of the table: where ``outcome`` is no sentence of its own, the error has it."""

    cases: Callable[[], Iterator[Case]]
    row: str
    outcome: str
    tolerance: float = 1.0


DECODED = "decoded"
KINDS = [
    Kind(png_grey, "PNG: grey of 1, 2, 4, 8, 16 bits", DECODED),
    Kind(png_grey_key, "PNG: grey with a transparent level (tRNS)", "decoded; the level is compared at full depth"),
    Kind(png_rgb, "PNG: RGB of 8, 16 bits", DECODED),
    Kind(png_rgb_key, "PNG: RGB of 8 bits with a transparent colour (tRNS)", DECODED),
    Kind(
        png_rgb_key_16,
        "PNG: RGB of 16 bits with a transparent colour (tRNS)",
        "a transparent colour of 16 bits per channel",
    ),
    Kind(png_alpha, "PNG: grey or RGB with alpha, 8 or 16 bits", DECODED, 2.0),
    Kind(png_palette, "PNG: palette of 1 to 8 bits, with or without tRNS", DECODED),
    Kind(jpeg, "JPEG: grey, YCbCr", DECODED, 8.0),
    Kind(jpeg_cmyk, "JPEG: CMYK and YCCK with Adobe's marker", "decoded; their inks are stored inverted", 8.0),
    Kind(jpeg_cmyk_unmarked, "JPEG: CMYK without the marker", "a CMYK JPEG without Adobe's marker"),
    Kind(tiff_grey, "TIFF: grey of 1, 2, 4, 8, 16 bits, 0 is black", DECODED),
    Kind(tiff_white, "TIFF: the same, 0 is white (MinIsWhite)", "decoded; white stays white"),
    Kind(tiff_12, "TIFF: grey of 12 bits, little-endian", "decoded; 0..4095 become 0..255"),
    Kind(tiff_rgb, "TIFF: RGB of 8, 16 bits; strips, tiles, several pages, BigTIFF, compressed", DECODED),
    Kind(
        tiff_alpha,
        "TIFF: RGB, or 8-bit grey whose 0 is black, with alpha or an unnamed channel",
        DECODED,
        2.0,
    ),
    Kind(tiff_palette, "TIFF: palette of 1 to 8 bits, also with alpha", DECODED),
    Kind(tiff_cmyk, "TIFF: CMYK of 8, 16 bits", DECODED, 2.5),
    Kind(tiff_ycbcr, "TIFF: YCbCr", DECODED, 8.0),
    Kind(tiff_lab, "TIFF: CIELab of 8 bits", "decoded to sRGB", 5.0),
    Kind(tiff_planes, "TIFF: channels apart (planar): RGB, RGBA, CMYK of 8 bits, or compressed", DECODED),
    Kind(
        tiff_planes_refused,
        "TIFF: channels apart: others, such as grey and alpha, CIELab, 16 bits uncompressed",
        "a TIFF with each channel apart",
    ),
    Kind(tiff_float, "TIFF: floating point", "floating-point pixels have no known range"),
    Kind(tiff_signed, "TIFF: signed integers, 32 and 64 bits", "a TIFF without a known range"),
    Kind(tiff_other, "TIFF: other depths (6, 10, 14 bits ...), sensor data", "a TIFF of samples that are not read"),
    Kind(tiff_inks, "TIFF: other inks than CMYK", "other inks than CMYK"),
    Kind(tiff_raw, "DNG and other camera raw files", "a camera's raw file"),
    Kind(tiff_big, "BigTIFF, big-endian", "a big-endian BigTIFF is not read"),
    Kind(others, "GIF, WebP, APNG, BMP; PPM, PGM, PBM of any maximum; JPEG 2000 of 8 bits, grey up to 16", DECODED),
    Kind(others_lossy, "AVIF, lossy WebP, MPO", DECODED, 16.0),
    Kind(
        jpeg2000_refused,
        "JPEG 2000: fewer than 8 bits; colours of more",
        "a JPEG 2000 of a depth that is not read",
    ),
    Kind(pfm, "PFM", "floating-point"),
    Kind(foreign, "HEIC, JPEG XL, PAM, OpenEXR, PSD", "is not read; convert it to JPEG or PNG"),
    Kind(pillow_modes, "Pillow images of every mode but F", DECODED, 2.0),
    Kind(
        pillow_refused, "Pillow images of mode F, of mode I beyond 0..65535", "store it with 8 or 16 bits per channel"
    ),
]


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.cases.__name__)
def test_a_pixel_format_is_decoded_or_refused_by_name(kind: Kind) -> None:
    count = 0
    for count, (picture, expected) in enumerate(kind.cases(), 1):
        if expected is None:
            with pytest.raises(DataError) as refused:
                decode_image(picture, name="name.ext")
            assert str(refused.value).startswith("name.ext: ")
            assert kind.outcome in str(refused.value)
            continue
        got = np.asarray(decode_image(picture)).astype(float)
        assert got.shape == (H, W, 3)
        off = np.abs(got - expected).max()
        assert off <= kind.tolerance, f"case {count} is off by {off:g} levels"
    assert count


# Of these, a loaded image without a file may be one that is refused.
AMBIGUOUS = (png_grey_key, png_rgb_key, png_rgb_key_16, others, jpeg2000_refused)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.cases.__name__)
def test_a_pixel_format_is_the_same_once_pillow_has_loaded_it(kind: Kind, tmp_path: Path) -> None:
    for picture, expected in kind.cases():
        if not isinstance(picture, bytes):
            continue
        (tmp_path / "picture").write_bytes(picture)
        for opened in (tmp_path / "picture", io.BytesIO(picture)):
            try:
                image = Image.open(opened)
                image.load()
            except Exception:  # nobody can have it loaded
                continue
            try:
                got, said = np.asarray(decode_image(image)).astype(float), ""
            except DataError as error:
                got, said = None, str(error)
            if "give the file or its bytes" in said:
                assert kind.cases in AMBIGUOUS
                assert isinstance(opened, io.BytesIO)
            elif expected is None:
                assert kind.outcome in said
            else:
                assert got is not None, said
                assert np.abs(got - expected).max() <= kind.tolerance


def test_a_loaded_image_counts_with_its_pixels_of_now_and_a_copy_as_far_as_it_is_plain(tmp_path: Path) -> None:
    values = levels(2)
    (tmp_path / "a.png").write_bytes(png(values, 2, 0, tRNS=struct.pack(">H", 3)))
    image = Image.open(tmp_path / "a.png")
    image.paste(170, (0, 0, W, 5))  # which loads it
    expected = np.where(values == 3, GREY, colours(values, 2))
    expected[:5] = 170
    assert np.abs(np.asarray(decode_image(image)).astype(float) - expected).max() <= 1
    with pytest.raises(DataError, match="give the file or its bytes"):
        decode_image(image.copy())
    plain = Image.fromarray(levels(8)[..., 0])
    plain.info["transparency"] = 14  # of 8 bits, as other levels show
    assert np.array_equal(np.asarray(decode_image(plain))[..., :1], np.where(levels(8) == 14, GREY, levels(8)))


def test_a_loaded_tiff_is_turned_back_to_how_it_is_stored(tmp_path: Path) -> None:
    values = levels(8, 3)
    (tmp_path / "a.tif").write_bytes(tiff(values, "rgb", extratags=[(274, "H", 1, 6, True)]))
    image = Image.open(tmp_path / "a.tif")
    image.load()
    assert np.array_equal(np.asarray(decode_image(image, upright=False)), values)
    assert np.array_equal(np.asarray(decode_image(image)), np.rot90(values, -1))


def test_a_ycbcr_tiff_is_decoded_or_refused_by_name() -> None:
    for data, expected in tiff_ycbcr():
        try:
            off, said = np.abs(np.asarray(decode_image(data)).astype(float) - expected).max(), ""
        except DataError as error:
            off, said = 0, str(error)
        assert off <= 8
        assert not said or "a TIFF of uncompressed YCbCr, which Pillow before 13 misreads" in said


def test_the_table_of_the_docs_is_that_of_the_tests() -> None:
    """Made anew with ``python tests/data/test_pixel_formats.py``."""
    assert table() in PAGE.read_text(encoding="utf-8")


def table() -> str:
    rows = [
        f"| {kind.row} | {kind.outcome if kind.outcome.startswith(DECODED) else f'refused: “{kind.outcome}”'} |"
        for kind in KINDS
    ]
    return "\n".join(["| file, pixels | what happens |", "|---|---|", *rows]) + "\n"


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_tiff_is_upright_or_as_it_is_stored(orientation: int) -> None:
    turns: dict[int, Callable[[np.ndarray], np.ndarray]] = {
        1: lambda stored: stored,
        2: np.fliplr,
        3: lambda stored: np.rot90(stored, 2),
        4: np.flipud,
        5: lambda stored: stored.transpose(1, 0, 2),
        6: lambda stored: np.rot90(stored, -1),
        7: lambda stored: np.rot90(stored, 2).transpose(1, 0, 2),
        8: np.rot90,
    }
    for bits, photometric, channels in (
        (1, "miniswhite", 1),
        (16, "minisblack", 1),
        (16, "miniswhite", 1),
        (8, "rgb", 3),
    ):
        values = levels(bits, channels)
        shown = colours(values, bits)
        shown = 255 - shown if photometric == "miniswhite" else shown
        tag = [(274, "H", 1, orientation, True)]
        data = tiff(values.astype(bool) if bits == 1 else values, photometric, extratags=tag)
        upright, stored = (np.asarray(decode_image(data, upright=flag)).astype(float) for flag in (True, False))
        assert upright.shape == turns[orientation](shown).shape
        assert np.abs(upright - turns[orientation](shown)).max() <= 1
        assert np.abs(stored - shown).max() <= 1


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    start = text.index("| file, pixels |")
    end = text.find("\n\n", start)
    PAGE.write_text(text[:start] + table() + (text[end + 1 :] if end >= 0 else ""), encoding="utf-8")
