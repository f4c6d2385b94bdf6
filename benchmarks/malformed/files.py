"""Malformed files by seeded mutation inside a valid structure: pictures, tars, files of tensors.

A function takes a `random.Random` and returns bytes with a word on what was changed; checksums and lengths around the
change are made right again, so that most get past the header and reach the code behind it.
"""

import gzip
import io
import json
import lzma
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from random import Random
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

NUMBERS = (0, 1, 2, 3, 7, 127, 128, 255, 256, 4095, 32767, 65535, 2**20, 2**24, 2**31 - 1, 2**32 - 1, 2**63 - 1)
VALUES: tuple[Any, ...] = (
    *(None, True, 0, -1, 2**31, 10**18, 10**30, 0.5, 1e300, float("nan"), float("inf"), "", "x", "\0", "\ud800"),
    *([], {}, [[]] * 9, "a" * 10_000, "../x", "os:getcwd", "tile", "featsharp", "jafar", "toy-cnn", "vits14-focus"),
)


class Malformed(NamedTuple):
    """Bytes, what was changed, and the names of members in front of the damage, which have to come out unchanged."""

    data: bytes
    change: str
    intact: tuple[str, ...] = ()


def change_bytes(draw: Random, data: bytes, start: int = 0) -> bytes:
    """Flip, overwrite, remove, insert, repeat or cut bytes behind `start`."""
    if len(data) <= start:
        return data + draw.randbytes(8)
    at, length = draw.randrange(start, len(data)), draw.choice((1, 1, 2, 4, 16, 300))
    number = draw.choice(NUMBERS).to_bytes(8, draw.choice(("big", "little")))
    new = {
        "flip": bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 : at + length],
        "random": draw.randbytes(length),
        "number": number[-length:] if length < 8 else number,
        "remove": b"",
        "insert": draw.randbytes(length) + data[at : at + length],
        "repeat": 3 * data[at : at + length],
    }
    how = draw.choice((*new, "cut"))
    return data[:at] if how == "cut" else data[:at] + new[how] + data[at + length :]


def change_value(draw: Random, value: Any) -> Any:
    """Change one leaf or entry of a nested value of JSON types."""
    if isinstance(value, dict) and value and draw.random() < 0.9:
        key = draw.choice(sorted(value))
        how = draw.random()
        if how < 0.15:
            return {name: entry for name, entry in value.items() if name != key}
        if how < 0.25:
            return {**value, draw.choice(("x", "", "function", "\ud800")): draw.choice(VALUES)}
        return {**value, key: change_value(draw, value[key])}
    if isinstance(value, list) and value and draw.random() < 0.8:
        at = draw.randrange(len(value))
        return [*value[:at], *([] if draw.random() < 0.2 else [change_value(draw, value[at])]), *value[at + 1 :]]
    if isinstance(value, int) and draw.random() < 0.5:
        return draw.choice((value + 1, value - 1, -value, value * 1000, draw.choice(NUMBERS)))
    return draw.choice(VALUES)


# Pictures


def pixels(seed: int, shape: tuple[int, ...] = (60, 80, 3)) -> np.ndarray:
    """Random numbers [h, w, 3] of 8 bits."""
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    """Encode a picture."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def picture(draw: Random, lossless: bool = False) -> Malformed:
    """A picture, or a label map of 4 classes (`lossless`), in one of many formats, with something changed."""
    levels = 4 if lossless else 256
    array = (pixels(draw.randrange(99)).astype(int) % levels).astype(np.uint8)
    image = Image.fromarray(array[:, :, 0] if lossless else array)
    if draw.random() < 0.08:
        return _odd_shape(draw, lossless)
    kinds = ("PNG", "PNG", "TIFF", "GIF", "BMP", "PPM") if lossless else tuple(_FORMATS)
    kind = draw.choice(kinds)
    modes, options = _FORMATS[kind]
    mode = draw.choice(("L", "L", "L", "P", "1", "I;16", "I", "RGB", "LA") if lossless else modes)
    if (kind in ("BMP", "GIF", "PPM") and mode not in ("L", "P", "1", "RGB")) or (kind, mode) == ("PPM", "P"):
        mode = "L"
    if mode in ("I;16", "F", "I"):
        image = Image.fromarray(array[:, :, 0].astype({"I;16": np.uint16, "F": np.float32, "I": np.int32}[mode]))
    else:
        image = image.convert(mode)
    if kind == "PNG" and mode == "I":
        image = image.convert("I;16")
    chosen = draw.choice(options)
    if (kind, mode) == ("PNG", "P") and "append_images" in chosen:  # Pillow 12.3 cannot write it
        chosen = {}
    data = encode(image, kind, **chosen)
    change = {"PNG": _change_png, "TIFF": _change_tiff, "JPEG": _change_jpeg}.get(kind)
    if change and draw.random() < 0.7:
        data, how = change(draw, data)
    else:
        data, how = change_bytes(draw, data, draw.choice((8, 30, 100))), "bytes"
    return Malformed(data, f"{kind} {mode}: {how}")


_MORE = Image.fromarray(pixels(5))
_FORMATS: dict[str, tuple[tuple[str, ...], tuple[dict[str, Any], ...]]] = {
    "PNG": (
        ("RGB", "L", "P", "1", "LA", "RGBA", "I;16"),
        ({}, {"bits": 8}, {"save_all": True, "append_images": [_MORE]}),
    ),
    "JPEG": (("RGB", "L", "CMYK"), ({}, {"progressive": True}, {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\0"})),
    "TIFF": (
        ("RGB", "L", "1", "P", "RGBA", "CMYK", "I;16", "F", "I"),
        ({}, {"compression": "tiff_lzw"}, {"compression": "tiff_adobe_deflate"}, {"compression": "packbits"}),
    ),
    "GIF": (("L", "P", "1"), ({}, {"save_all": True, "append_images": [_MORE], "loop": 0}, {"transparency": 3})),
    "WEBP": (("RGB", "RGBA"), ({}, {"lossless": True}, {"save_all": True, "append_images": [_MORE]})),
    "BMP": (("RGB", "L", "P", "1"), ({},)),
    "PPM": (("RGB", "L", "1"), ({},)),
    "JPEG2000": (("RGB", "L", "RGBA"), ({}, {"no_jp2": True})),
    "AVIF": (("RGB",), ({"speed": 10},)),
}


def _odd_shape(draw: Random, lossless: bool) -> Malformed:
    """A valid picture that is thin, tiny or as large as Pillow takes, or one that claims more than it is."""
    wide = draw.choice(
        ((1, 1), (1, 70_000), (70_000, 1), (8, 1_000_000), (3_000_000, 9), (9000, 9000), (60_000, 60_000))
    )
    size = wide if draw.random() < 0.5 else (draw.choice(NUMBERS[1:11]), draw.choice(NUMBERS[1:11]))
    mode = draw.choice(("1", "L", "P"))
    if size[0] * size[1] > 10**8:
        chunks = _png_chunks(encode(Image.new("L", (1, 1)), "PNG"))
        chunks[0] = (b"IHDR", struct.pack(">II", *size) + chunks[0][1][8:])
        return Malformed(_png(chunks), f"PNG {mode}: claims {size}")
    shade = draw.randrange(4 if lossless else 256) if mode != "1" else 1
    return Malformed(encode(Image.new(mode, size, shade), "PNG"), f"PNG {mode}: of {size}")


def _png_chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    chunks, at = [], 8
    while at < len(data):
        (length,) = struct.unpack_from(">I", data, at)
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    return chunks


def _png(chunks: list[tuple[bytes, bytes]]) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def _change_png(draw: Random, data: bytes) -> tuple[bytes, str]:
    """Change the chunks of a PNG; their checksums are right."""
    chunks = _png_chunks(data)
    at = draw.randrange(len(chunks))
    how = draw.choice(("header", "chunk", "chunk", "order", "pixels", "pixels", "bomb", "extra", "extra"))
    if how == "header":
        fields = list(struct.unpack(">IIBBBBB", chunks[0][1]))
        which = draw.randrange(7)
        fields[which] = draw.choice(NUMBERS[:15]) if which < 2 else draw.choice((0, 1, 2, 3, 4, 6, 7, 8, 16, 255))
        chunks[0] = (b"IHDR", struct.pack(">IIBBBBB", *fields))
    elif how == "chunk":
        chunks[at] = (chunks[at][0], change_bytes(draw, chunks[at][1]))
    elif how == "order":
        chunks.insert(draw.randrange(1, len(chunks) + 1), chunks[at] if draw.random() < 0.5 else chunks.pop(at))
    elif how in ("pixels", "bomb"):
        raw = zlib.decompress(b"".join(content for kind, content in chunks if kind == b"IDAT"))
        raw = raw + bytes(60_000_000) if how == "bomb" else change_bytes(draw, raw)
        rest = [chunk for chunk in chunks if chunk[0] != b"IDAT"]
        chunks = [*rest[:-1], (b"IDAT", zlib.compress(raw, 1)), rest[-1]]
    else:
        kind = draw.choice((b"tRNS", b"PLTE", b"gAMA", b"iCCP", b"zTXt", b"iTXt", b"eXIf", b"acTL", b"fcTL", b"fdAT"))
        bomb = b"name\0\0" + zlib.compress(bytes(draw.choice((100, 80_000_000))), 1)
        exif = b"MM\0*\0\0\0\x08" + draw.randbytes(draw.choice((2, 40)))
        chunks.insert(1, (kind, draw.choice((b"", draw.randbytes(8), draw.randbytes(26), bomb, exif))))
    return _png(chunks), how


def _change_tiff(draw: Random, data: bytes) -> tuple[bytes, str]:
    """Change an entry of the directory of a TIFF as Pillow writes it, or where its directories are."""
    (start,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, start)
    at = start + 2 + 12 * draw.randrange(count)
    tag, kind, number, value = struct.unpack_from("<HHII", data, at)
    how = draw.choice(("value", "value", "count", "type", "tag", "next"))
    if how == "next":
        entry, at = struct.pack("<I", draw.choice((start, 8, len(data), 2**32 - 1))), start + 2 + 12 * count
    else:
        value = draw.choice((*NUMBERS[:16], value + 1, len(data), start)) if how == "value" else value
        number = draw.choice(NUMBERS[:16]) if how == "count" else number
        kind = draw.randrange(1, 19) if how == "type" else kind
        tag = (
            draw.choice((256, 257, 258, 259, 262, 273, 274, 277, 284, 317, 320, 330, 338, 339)) if how == "tag" else tag
        )
        entry = struct.pack("<HHII", tag, kind, number, value)
    return data[:at] + entry + data[at + len(entry) :], f"{how} of tag {tag}"


def _change_jpeg(draw: Random, data: bytes) -> tuple[bytes, str]:
    """Change a segment before the pixels of a JPEG, or its size."""
    segments, at = [], 2
    while data[at + 1] != 0xDA:
        (length,) = struct.unpack_from(">H", data, at + 2)
        segments.append(data[at : at + 2 + length])
        at += 2 + length
    rest, number = data[at:], draw.randrange(len(segments))
    how = draw.choice(("segment", "length", "order", "size", "pixels"))
    if how == "segment":
        segments[number] = segments[number][:4] + change_bytes(draw, segments[number][4:])
    elif how == "length":
        segments[number] = segments[number][:2] + struct.pack(">H", draw.choice(NUMBERS[:12])) + segments[number][4:]
    elif how == "order":
        segments.insert(draw.randrange(len(segments)), segments.pop(number))
    elif how == "size":
        size = struct.pack(">HH", draw.choice(NUMBERS[:12]), draw.choice(NUMBERS[:12]))
        segments = [s[:5] + size + s[9:] if s[1] in (0xC0, 0xC2) else s for s in segments]
    else:
        rest = change_bytes(draw, rest, 14)
    return data[:2] + b"".join(segments) + rest, how


# Tars


def tar(draw: Random) -> Malformed:
    """A tar of four pictures and a text, with something changed; perhaps compressed."""
    names = [f"{number}.png" for number in range(4)]
    contents = [encode(Image.fromarray(pixels(number, (16, 16, 3))), "PNG") for number in range(4)]
    at = draw.randrange(4)
    how = draw.choice(
        ("header", "header", "header", "content", "content", "pax", "pax", "cut", "blocks", "bytes", "many")
    )
    extra: dict[str, str] = {}
    if how == "content":
        contents[at] = picture(draw).data
    if how == "pax":
        values = ("-1", "0", "nan", "9" * 30, "../x.png", "a\0b.png", "é" * 200, "x" * 5000, "1,2,3", "binary")
        keys = (
            "size",
            "path",
            "linkpath",
            "mtime",
            "uid",
            "hdrcharset",
            "charset",
            "GNU.sparse.map",
            "GNU.sparse.size",
        )
        more = ("GNU.sparse.major", "GNU.sparse.minor", "GNU.sparse.realsize", "GNU.sparse.name", "SCHILY.xattr.x")
        extra = {draw.choice(keys + more): draw.choice(values) for _ in range(draw.randrange(1, 4))}
    shape = tarfile.PAX_FORMAT if extra else draw.choice((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))
    if shape != tarfile.USTAR_FORMAT and draw.random() < 0.3:
        names[at] = "d/" * 60 + names[at]
    buffer, starts = io.BytesIO(), []
    with tarfile.open(fileobj=buffer, mode="w", format=shape) as archive:
        for number, (name, content) in enumerate(zip(names, contents, strict=True)):
            starts.append(buffer.tell())
            info = tarfile.TarInfo(name)
            info.size, info.pax_headers = len(content), extra if number == at else {}
            archive.addfile(info, io.BytesIO(content))
        for number in range(3000 if how == "many" else 1):
            archive.addfile(tarfile.TarInfo(f"{number}.txt"))
    data, before = buffer.getvalue(), names[:at]
    if how == "header":
        data = data[: starts[at]] + _change_header(draw, data[starts[at] : starts[at] + 512]) + data[starts[at] + 512 :]
    elif how == "content":
        before = names[:at] + names[at + 1 :]
    elif how == "cut":
        data = data[: draw.randrange(starts[at], len(data))]
    elif how == "blocks":
        block = draw.choice((bytes(512), bytes(1024), bytes(1 << 21), b"\xff" * 512, draw.randbytes(512), data))
        data = data[: starts[at]] + block + data[starts[at] :]
    elif how == "bytes":
        data = data[: starts[at]] + change_bytes(draw, data[starts[at] :])
    elif how == "many":
        before = names
    if draw.random() < 0.2:
        data = draw.choice((gzip.compress, lzma.compress, lambda d: gzip.compress(d + bytes(200_000_000), 1)))(data)
        how += ", compressed"
        if draw.random() < 0.5:
            data, before, how = change_bytes(draw, data, 20), [], f"{how}, bytes of that"
    return Malformed(data, f"{how} at {at}", tuple(before))


def _change_header(draw: Random, header: bytes) -> bytes:
    """Change a field of a header; in most cases its checksum is right again."""
    fields = {
        "name": (0, 100),
        "mode": (100, 8),
        "uid": (108, 8),
        "size": (124, 12),
        "mtime": (136, 12),
        "type": (156, 1),
    }
    fields |= {"link": (157, 100), "magic": (257, 8), "owner": (265, 32), "device": (329, 8), "prefix": (345, 155)}
    start, length = fields[draw.choice((*fields, "size", "size", "type"))]
    values = (b"\xff" * length, b"\x80" + b"\x7f" * (length - 1), b"7" * length, b" " * length, bytes(length), b"-1")
    values += (b"../../x.png", b"C:\\x.png", b"00000000001", draw.randbytes(length), b"00000001000")
    value = bytes([draw.choice(b"0123456789DKLMNSVXgxABC\0\xff")]) if length == 1 else draw.choice(values)
    new = header[:start] + value[:length].ljust(length, b"\0") + header[start + length :]
    if draw.random() < 0.1:
        return new
    total = sum(new[:148]) + sum(new[156:]) + 8 * 32
    return new[:148] + b"%06o\0 " % total + new[156:]


# Files of tensors


def safetensors(draw: Random, data: bytes) -> Malformed:
    """A safetensors file with something changed in its header, its metadata or its numbers."""
    (length,) = struct.unpack_from("<Q", data)
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    how = draw.choice(
        ("entry", "entry", "metadata", "metadata", "numbers", "numbers", "text", "length", "cut", "names")
    )
    tensors = [name for name in header if name != "__metadata__"]
    name = draw.choice(tensors)
    if how == "entry":
        other = header[draw.choice(tensors)]
        header[name] = change_value(draw, header[name])
        if draw.random() < 0.3:
            header[name] = {**other, "dtype": draw.choice(("F32", "F64", "I8", "BOOL", "X"))}
    elif how == "metadata" and "__metadata__" in header:
        key = draw.choice(sorted(header["__metadata__"]))
        text = header["__metadata__"][key]
        try:
            changed = json.dumps(change_value(draw, json.loads(text)))
        except ValueError:
            changed = str(draw.choice(VALUES))
        deep = draw.choice((text, "[" * 100_000, change_bytes(draw, text.encode()).decode(errors="replace")))
        header["__metadata__"][key] = changed if draw.random() < 0.8 else deep
    elif how == "numbers":
        at = draw.randrange(0, len(body) - 8, 4)
        body = (
            body[:at]
            + draw.choice((b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\xff\xff\x7f\x7f", b"\xff" * 4))
            + body[at + 4 :]
        )
    elif how == "names":
        header[draw.choice(("x", "", "upsampler.x", "\ud800", "a" * 999))] = header.pop(name)
    text = json.dumps(header).encode()
    if how == "text":
        text = change_bytes(draw, text, 1)
    size = draw.choice((*NUMBERS, len(text) + 1)) if how == "length" else len(text)
    data = size.to_bytes(8, "little") + text + body
    return Malformed(data[: draw.randrange(8, len(data))] if how == "cut" else data, f"safetensors: {how}")


def checkpoint(draw: Random, data: bytes, save: Callable[[Any], bytes], content: dict[str, Any]) -> Malformed:
    """A checkpoint with a value of its content, a member of its zip, or its bytes changed."""
    how = draw.choice(("content", "content", "content", "member", "member", "bytes"))
    if how == "content":
        return Malformed(save(change_value(draw, content)), "checkpoint: content")
    if how == "bytes":
        return Malformed(change_bytes(draw, data, 40), "checkpoint: bytes")
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w") as new:
        chosen = draw.choice(old.namelist() if draw.random() < 0.5 else [n for n in old.namelist() if "pkl" in n])
        packing = draw.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
        for name in old.namelist():
            member = old.read(name)
            if name == chosen:
                member = change_bytes(draw, member) if packing == zipfile.ZIP_STORED else member + bytes(300_000_000)
            new.writestr(name, member, packing if name == chosen else zipfile.ZIP_STORED, 1)
    return Malformed(buffer.getvalue(), f"checkpoint: member {chosen.rpartition('/')[2]}")
