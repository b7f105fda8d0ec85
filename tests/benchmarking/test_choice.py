"""Which engine the rows name, and the script of it, run where vitdemo is not."""

import subprocess
import sys

import pandas as pd
import pytest
from PIL import Image

from tests.native import native_or_skip
from vitdemo import ImageNetVal, VitdemoError, convert, data_path, load_model, reference_crop
from vitdemo.benchmarking.choice import choose_engine, write_script

SHAPES20 = ImageNetVal(data_path("shapes20"))


def rows(**columns) -> pd.DataFrame:
    base = {"status": "ok", "machine": "this", "model": "m"}
    base |= {"engine": ["eager", "a", "b", "c"], "precision": ["fp32", "fp32", "bf16", "int8"]}
    base |= {"top1": [0.92, 0.92, 0.919, 0.90], "p90_ms": [50.0, 20, 10, 5], "images_per_s": [20.0, 60, 110, 300]}
    return pd.DataFrame(base | columns)


@pytest.mark.parametrize(
    ("budget", "loss", "named"), [(100, 0, "a"), (100, 0.001, "b"), (100, 0.02, "c"), (15, 0.001, "b"), (7, 0.05, "c")]
)
def test_names_the_fastest_that_is_right_enough(budget, loss, named):
    assert choose_engine(rows(), budget, loss)["engine"] == named


def test_skipped_rows_are_not_chosen():
    assert choose_engine(rows(status=["ok", "ok", "ok", "skipped: 40 s a batch"]), 100, 0.05)["engine"] == "b"


def test_says_when_there_is_none():
    with pytest.raises(VitdemoError, match="the fastest takes 20.0 ms"):
        choose_engine(rows(), 7, 0)
    with pytest.raises(VitdemoError, match="no accuracy was measured"):
        choose_engine(rows(top1=None), 100, 0)
    with pytest.raises(VitdemoError, match="several machines"):
        choose_engine(rows(machine=["this", "this", "that", "that"]), 100, 0)


SCRIPTED = ["eager:fp32", "onnx:fp32", "openvino:bf16", "openvino:int8", "inductor:bf16"]


@pytest.mark.parametrize(("engine", "precision"), [native_or_skip(*pair.split(":")) for pair in SCRIPTED])
def test_its_script_runs_without_vitdemo(engine, precision, tmp_path):
    made = convert(load_model("vit_shapes20"), engine, precision)
    script = write_script(made, tmp_path / "app", SHAPES20.class_names)
    assert len(script.read_text().splitlines()) <= 45
    chosen = [SHAPES20[i] for i in (0, 16, 376, 612, 741, 999)]  # a grey, a CMYK, a tiny and a turned one among them
    for sample in chosen:
        (tmp_path / sample.file).write_bytes(sample.image)
    blocked = "import sys; sys.modules['vitdemo'] = None; import runpy; sys.argv = sys.argv[1:]; "
    command = [sys.executable, "-I", "-c", blocked + "runpy.run_path(sys.argv[0], run_name='__main__')", str(script)]
    command += [sample.file for sample in chosen]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if engine == "eager":
        (tmp_path / "no.jpg").write_bytes(b"no image")
        Image.new("I;16", (9, 9), 999).save(tmp_path / "deep.png")
        more = subprocess.run([*command[:-1], "no.jpg", "deep.png", command[-1]], cwd=tmp_path, capture_output=True)
        assert (more.returncode, more.stdout.decode()) == (1, done.stdout), "the others are answered"
        assert more.stderr.count(b"cannot be read as an image") == 2 and b"more than 8 bits" in more.stderr
    for line, sample in zip(done.stdout.strip().splitlines(), chosen, strict=True):
        crop = reference_crop(sample.image, made.info.preprocessing)
        p, k = made(crop[None])[0].double().softmax(0).max(0)
        assert line.split("\t")[1] == f"{p:.1%} {SHAPES20.class_names[k]}"
