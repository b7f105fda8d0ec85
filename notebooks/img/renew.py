"""Renew the pictures that the notebooks open with: ``python -m notebooks.img.renew [NAME …]``, all by default.

Each is the figure of the notebook's cell tagged `picture`, from a run on the bundled data, so that what a reader
is promised is what the notebook draws.
"""

import base64
import io
import sys
from collections.abc import Sequence

import nbformat
from PIL import Image

from vitdemo.course.notebooks import NOTEBOOKS
from vitdemo.course.runner import run_notebooks
from vitdemo.errors import VitdemoError
from vitdemo.paths import replacing

WIDTH = 900  # pixels: as wide as a page shows it


def write_pictures(names: Sequence[str] | None) -> None:
    """Run these notebooks, None is all, and write ``notebooks/img/<name>.png``.

    Raises VitdemoError for a name that there is not, and when a notebook failed.
    """
    report = run_notebooks(names)
    print(report)
    if not report.ok:
        raise VitdemoError(f"{report.index}: a notebook failed, so no picture was renewed")
    for result in report.notebooks:
        executed = nbformat.read(report.index.with_name(f"{result.name}.ipynb"), as_version=4)
        (cell,) = [cell for cell in executed.cells if "picture" in cell.metadata.get("tags", [])]
        png = next(output.data["image/png"] for output in cell.outputs if "image/png" in output.get("data", {}))
        picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
        picture.thumbnail((WIDTH, WIDTH), Image.Resampling.LANCZOS)
        with replacing(NOTEBOOKS / "img" / f"{result.name}.png", "wb") as file:
            picture.save(file, "PNG", optimize=True)


if __name__ == "__main__":
    try:
        write_pictures(sys.argv[1:] or None)
    except VitdemoError as error:
        sys.exit(f"vitdemo: {error}")
