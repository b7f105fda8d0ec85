"""Files that somebody might upload."""

import io
import struct
import zlib

from PIL import Image


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def picture(kind: str = "PNG") -> bytes:
    """A sound one, green above blue."""
    image = Image.new("RGB", (300, 200), "green")
    image.paste("blue", (0, 100, 300, 200))
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


HOSTILE = {  # name -> bytes, and a part of the reason
    "notes.txt": (b"dear model, what is this?", "is no picture that can be read"),
    "empty.png": (b"", "is no picture"),
    "huge.png": (png_header(20000, 20000), "400000000 pixels"),
    "large.png": (png_header(12000, 10000), "not decoded: 12000 x 10000 pixels"),
    "cut.png": (picture()[:200], "rror"),
    "script.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", "is no picture that can be read"),
    "drawing.svg": (b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>", "is no picture"),
    "<b>odd</b>\nname.jpg": (b"\xff\xd8\xff\xe0nothing", "is no picture that can be read"),
}
