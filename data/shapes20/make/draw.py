"""Draw the bundled data set shapes20 in ILSVRC2012's format: ``python -m data.shapes20.make.draw --out DIR``.

Writes ``shapes20_img_val.tar`` (1,000 pictures), ``shapes20_devkit.tar.gz`` and ``shapes20_calib.tar`` (256 further
pictures), and prints their sizes and checksums. With the same versions of numpy and Pillow the bytes are the same.
The wnids are invented.
"""

import argparse
import hashlib
import io
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from data.shapes20.make.devkit import devkit_bytes, tar_bytes
from data.shapes20.make.scenes import bundled_labels, drawing_pool, picture
from vitdemo.paths import replacing

CALIBRATION_PICTURES = 256
JPEG_BUDGET_BYTES = 8300  # a picture's, reached by lowering the quality; the repository carries them all

# What the real set holds too, and what trips loaders up: bundled files that are not plain RGB JPEGs of common size.
SPECIAL_FILES = {
    "ILSVRC2012_val_00000017.JPEG": "greyscale",
    "ILSVRC2012_val_00000134.JPEG": "greyscale",
    "ILSVRC2012_val_00000291.JPEG": "greyscale",
    "ILSVRC2012_val_00000377.JPEG": "CMYK",
    "ILSVRC2012_val_00000486.JPEG": "greyscale",
    "ILSVRC2012_val_00000528.JPEG": "broken EXIF",
    "ILSVRC2012_val_00000613.JPEG": "very small",
    "ILSVRC2012_val_00000655.JPEG": "greyscale",
    "ILSVRC2012_val_00000742.JPEG": "EXIF rotation",
    "ILSVRC2012_val_00000849.JPEG": "very large",
    "ILSVRC2012_val_00000902.JPEG": "greyscale",
}
VERY_SMALL, VERY_LARGE = (36, 32), (3000, 2250)
# A directory that announces three entries and ends within the first.
_BROKEN_EXIF = b"Exif\0\0MM\0*\0\0\0\x08\0\x03\x01\x12\0\x03\0\0"
_ORIENTATION, _TURN_RIGHT_TO_VIEW = 0x0112, 6


def bundled_name(index: int) -> str:
    """The file name of bundled picture ``index`` (from 0)."""
    return f"ILSVRC2012_val_{index + 1:08d}.JPEG"


def _jpeg(image: Image.Image, budget: int = JPEG_BUDGET_BYTES, **options) -> bytes:
    """Encode with 4:2:0 chroma at the highest of a few qualities that fits the budget."""
    for quality in (82, 74, 66, 58, 50, 42, 34):
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality, subsampling="4:2:0", optimize=True, **options)
        if buffer.tell() <= budget:
            break
    return buffer.getvalue()


def bundled_jpeg(index: int) -> bytes:
    """The JPEG of bundled picture ``index``, special ones included."""
    kind = SPECIAL_FILES.get(bundled_name(index))
    match kind:
        case "greyscale":
            return _jpeg(picture("bundled", index).convert("L"))
        case "CMYK":
            # Pillow stores CMYK inverted with an Adobe marker, as Photoshop does, and reads it back the same way.
            return _jpeg(picture("bundled", index).convert("CMYK"), 2 * JPEG_BUDGET_BYTES)
        case "broken EXIF":
            return _jpeg(picture("bundled", index), exif=_BROKEN_EXIF)
        case "EXIF rotation":
            exif = Image.Exif()
            exif[_ORIENTATION] = _TURN_RIGHT_TO_VIEW
            return _jpeg(picture("bundled", index).transpose(Image.Transpose.ROTATE_90), exif=exif)
        case "very small":
            return _jpeg(picture("bundled", index, (288, 256)).resize(VERY_SMALL, Image.Resampling.LANCZOS))
        case "very large":
            drawn = picture("bundled", index, (750, 562))
            return _jpeg(drawn.resize(VERY_LARGE, Image.Resampling.BICUBIC), 20 * JPEG_BUDGET_BYTES)
    return _jpeg(picture("bundled", index))


def calibration_jpeg(index: int) -> bytes:
    """The JPEG of calibration picture ``index``."""
    return _jpeg(picture("calibration", index))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m data.shapes20.make.draw", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the three archives")
    out = parser.parse_args().out
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {out}: cannot create this folder ({error.strerror})")
    count = len(bundled_labels())
    with drawing_pool() as pool:
        bundled = list(tqdm(pool.imap(bundled_jpeg, range(count), 16), "bundled", count, unit="img"))
        further = list(tqdm(pool.imap(calibration_jpeg, range(CALIBRATION_PICTURES), 16), "calibration",
                            CALIBRATION_PICTURES, unit="img"))  # fmt: skip
    archives = {
        "shapes20_img_val.tar": tar_bytes([(bundled_name(i), jpeg) for i, jpeg in enumerate(bundled)]),
        "shapes20_devkit.tar.gz": devkit_bytes(),
        "shapes20_calib.tar": tar_bytes([(f"shapes20_calib_{i + 1:08d}.JPEG", jpeg) for i, jpeg in enumerate(further)]),
    }
    print("| file | bytes | MD5 | sha256 |\n|---|---|---|---|")
    for name, content in archives.items():
        with replacing(out / name, "wb") as file:
            file.write(content)
        md5, sha256 = hashlib.md5(content).hexdigest(), hashlib.sha256(content).hexdigest()
        print(f"| `{name}` | {len(content):,} | `{md5}` | `{sha256}` |")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("interrupted") from None
