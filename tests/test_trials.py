"""What broke when it was tried as users do, on machines that are not the author's: a test for each kind."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from tests.native import native_or_skip
from vitdemo import VitdemoError, convert, data_path, evaluate, find_engines, load_model, machine_record, verify
from vitdemo import precisions as support
from vitdemo.cli import main
from vitdemo.doctor import examine
from vitdemo.engines import artifacts
from vitdemo.engines.contract import resolve_device
from vitdemo.errors import reason_of
from vitdemo.paths import REPOSITORY, claim_folder, results_folder, runs_root

pytestmark = pytest.mark.trial
TAR = data_path("shapes20/shapes20_img_val.tar")


@pytest.fixture
def mounted(tmp_path):
    """A function that mounts a small disk in memory, or mounts it anew with other options."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(options: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", f"size=60m,{options}", "tmpfs", str(disk)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("may not mount a disk here")
        return disk

    yield mount
    subprocess.run(["umount", "--lazy", str(disk)], capture_output=True)


def run(code: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-P", "-c", code, *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)} | environment
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def refused(done: subprocess.CompletedProcess, *parts: str) -> None:
    """Exit code 2, and one line at the end that has the parts."""
    line = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert all(part in line for part in parts), line


CLI = "import sys; from vitdemo.cli import main; sys.exit(main(sys.argv[1:]))"


@pytest.mark.parametrize("name", ["vit_little_patch16_reg1_gap_256", "coat_lite_tiny"])
def test_01_a_module_that_hands_its_input_on_is_no_tap(name):
    pytest.importorskip("openvino")
    model = load_model(name, "random")
    engine = convert(model, "openvino", "fp32")
    names = list(engine.layers(model.info.random_pixels(2)))
    assert names == list(convert(model).layers(model.info.random_pixels(2))) and "norm" not in names
    assert verify(engine, model, images=2, progress=False).ok


@pytest.mark.parametrize(("engine", "precision"), [native_or_skip("inductor", "bf16"), ("onnx", "fp32")])
def test_02_a_blank_in_the_caches_path(engine, precision, vit_shapes20, tmp_path, monkeypatch):
    monkeypatch.setenv("VITDEMO_CACHE", str(tmp_path / "a cache"))
    assert convert(vit_shapes20, engine, precision)(vit_shapes20.info.random_pixels(1)).shape == (1, 20)


def test_03_ray_under_uv_run_starts_its_workers_itself():
    pytest.importorskip("ray")
    done = run("import os; from vitdemo.inference.cluster import connect; connect(None); print(os.environ)")
    assert "'RAY_ENABLE_UV_RUN_RUNTIME_ENV': '0'" in done.stdout, done.stderr


def test_04_a_cache_that_may_only_be_read(vit_shapes20, mounted, tmp_path, monkeypatch):
    disk = mounted("rw")
    monkeypatch.setenv("VITDEMO_CACHE", str(disk))
    convert(vit_shapes20, "onnx", "fp32").close()
    links = tmp_path / "links"
    for file in [path for path in disk.rglob("*") if path.is_file()]:
        link = links / file.relative_to(disk)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(file)
    mounted("remount,ro")
    monkeypatch.setattr(artifacts.Recipe, "_build", lambda *_: pytest.fail("it is there"))
    for cache in (disk, links):
        monkeypatch.setenv("VITDEMO_CACHE", str(cache))
        assert convert(vit_shapes20, "onnx", "fp32")(vit_shapes20.info.random_pixels(1)).shape == (1, 20)


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """vitdemo from its wheel, without a clone."""
    folder, source = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("source") / "clone"
    kept = ("vitdemo", "pyproject.toml", "README.md", "LICENSE")
    for name in kept:
        copy = shutil.copytree if (REPOSITORY / name).is_dir() else shutil.copy
        source.mkdir(exist_ok=True)
        copy(REPOSITORY / name, source / name)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), str(source)]
    done = subprocess.run(pip, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def test_05_a_wheel_has_its_templates_and_says_what_needs_a_clone(installed, tmp_path):
    ours = {path.relative_to(REPOSITORY) for path in (REPOSITORY / "vitdemo").rglob("*.j2")}
    assert ours and all((installed / path).exists() for path in ours)
    own = {"PYTHONPATH": str(installed), "VITDEMO_DATA": ""}
    refused(run(CLI, "run", **own), "notebooks", "a clone of vitdemo")
    refused(run(CLI, "workshop", "--out", tmp_path / "w", **own), "a clone of vitdemo")
    refused(run(CLI, "convert", "vit_shapes20", **own), "VITDEMO_DATA", "a clone of vitdemo")
    where = run(
        f"import os; os.chdir({str(tmp_path)!r}); from vitdemo.paths import runs_root; print(runs_root())", **own
    )
    assert where.stdout.strip() == str(tmp_path / "runs")
    assert main(["convert", "vit_shapes20"]) == 0


def test_06_the_conda_environment_can_be_read_from_any_folder(tmp_path):
    *_, pip = yaml.safe_load((REPOSITORY / "environment.yml").read_text())["dependencies"]
    assert pip["pip"][-1] == "--editable ."
    (tmp_path / "requirements.txt").write_text("\n".join(pip["pip"][:-1]))
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--dry-run",
        "--no-deps",
        "-r",
        str(tmp_path / "requirements.txt"),
    ]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0 and "Would install" not in done.stdout, done.stdout + done.stderr


HOLDING = """
import sys
from vitdemo import convert, load_model
model = load_model("vit_shapes20")
engine = convert(model, "onnx", "fp32")
print("ready", flush=True)
sys.stdin.readline()
print(engine.precision_ran, flush=True)
"""


def test_11_clearing_the_cache_keeps_what_a_running_engine_still_reads(vit_shapes20, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("VITDEMO_CACHE", str(tmp_path))
    engine = convert(vit_shapes20, "onnx", "fp32")
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    with subprocess.Popen([sys.executable, "-c", HOLDING], **pipes) as other:
        assert other.stdout.readline() == "ready\n"
        assert artifacts.clear_cache() == 0 and "in use by a running program, kept" in capsys.readouterr().err
        assert engine.precision_ran == {"fp32": 1.0} and engine.layers(vit_shapes20.info.random_pixels(1))
        del engine
        assert artifacts.clear_cache() == 0
        said, _ = other.communicate("go on\n")
    assert other.returncode == 0 and "fp32" in said
    assert artifacts.clear_cache() > 0


@pytest.mark.parametrize("verb", ["cache", f"evaluate vit_shapes20 --data {TAR} --limit 8 --skip-validation --out OUT"])
@pytest.mark.parametrize("unbuffered", ["1", ""])
def test_12_a_reader_that_goes_away(verb, unbuffered, tmp_path):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "vitdemo", *verb.replace("OUT", str(tmp_path / "out")).split()]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(command, env=environment, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.returncode == (141 if unbuffered else 0) and "BrokenPipe" not in done.stderr, done.stderr
    assert "evaluate" not in verb or (tmp_path / "out" / "flagperf.csv").stat().st_size


def test_13_a_gpu_that_torch_has_no_kernels_for(monkeypatch, vit_shapes20):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    support.no_cuda.cache_clear()
    try:
        assert {resolve_device("auto", cls) for cls in find_engines().values()} == {"cpu"}
        assert convert(vit_shapes20).device == "cpu" and machine_record()["gpu"] is None
        with pytest.raises(VitdemoError, match="device 'cuda': torch sees a CUDA device and cannot compute on it"):
            convert(vit_shapes20, device="cuda")
        lines, ok = examine()
        assert ok and any("no CUDA: torch sees a CUDA device and cannot compute" in line for line in lines)
    finally:
        support.no_cuda.cache_clear()


@pytest.mark.parametrize("verb", ["convert", "verify", "evaluate", "benchmark"])
@pytest.mark.parametrize(("device", "said"), [("tpu", "there are auto, cpu, cuda"), ("cuda", "use cpu or auto")])
def test_13_a_device_that_is_not_there_is_one_line(verb, device, said, tmp_path, capsys):
    options = {"evaluate": ["--data", str(TAR), "--out", str(tmp_path)], "benchmark": ["--out", str(tmp_path)]}
    assert main([verb, "vit_shapes20", "--device", device, *options.get(verb, [])]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("vitdemo: ") and f"device '{device}'" in line and said in line


def test_14_windows_is_told_what_to_use():
    hidden = "import sys; sys.modules['fcntl'] = sys.modules['resource'] = None\n"
    for verb in ("doctor", "cache"):
        refused(run(hidden + CLI, verb), "WSL")
    assert "WSL" in run(hidden + "from vitdemo import evaluate").stderr.splitlines()[-1]


def test_15_a_temporary_folder_with_a_long_name(tmp_path, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    folder = tmp_path / ("long" * 25)
    folder.mkdir()
    code = "from vitdemo.inference.cluster import connect\ntry: connect(None)\nexcept Exception as error: print(error)"
    assert "set RAY_TMPDIR to a short path" in run(code, TMPDIR=str(folder)).stdout


def test_19_places_where_nobody_may_write_and_the_variables_that_choose_others(mounted, monkeypatch, tmp_path):
    disk = mounted("ro")
    refused(run(CLI, "convert", "vit_shapes20", "--engine", "onnx", VITDEMO_CACHE=f"{disk}/cache"), "set VITDEMO_CACHE")
    monkeypatch.setenv("VITDEMO_RUNS", str(disk / "runs"))
    with pytest.raises(VitdemoError, match="set VITDEMO_RUNS"):
        results_folder("notebook")
    monkeypatch.setenv("VITDEMO_RUNS", str(tmp_path / "runs"))
    assert runs_root() == tmp_path / "runs" and results_folder("notebook").is_relative_to(tmp_path / "runs")


def test_20_what_stands_between_us_and_a_hub(tmp_path):
    ask = "from vitdemo.models.loading import hub_file, hub_answers\nprint(hub_answers())\n"
    ask += "try: hub_file('owner/name', 'config.json', bring='fetch it')\nexcept Exception as error: print(error)"
    own = {"HF_HUB_CACHE": str(tmp_path)}
    assert "HF_HUB_OFFLINE forbids asking" in run(ask, HF_HUB_OFFLINE="1", **own).stdout
    assert run(ask, ALL_PROXY="http://127.0.0.1:9", HF_HUB_OFFLINE="", **own).stdout.startswith("True")
    assert "is not asked, as HF_HUB_OFFLINE is set" in run(CLI, "doctor", HF_HUB_OFFLINE="1").stdout


def test_20_a_temporary_folder_that_may_run_nothing(mounted):
    code = "import sys, tempfile\nfrom vitdemo.engines.inductor import InductorEngine\n"
    code += "try: InductorEngine.check_requirements()\nexcept Exception as error: print(error)"
    done = run(code, TMPDIR=str(mounted("noexec")))
    assert "is mounted noexec" in done.stdout and "set TMPDIR" in done.stdout


@pytest.mark.parametrize("options", [[], ["--diagnose"]])
def test_21_a_diagnosis_is_made_where_it_is_asked_for(options, tmp_path, capsys):
    command = ["evaluate", "vit_shapes20", "--data", str(TAR), "--limit", "32", "--skip-validation"]
    assert main([*command, *options, "--out", str(tmp_path)]) == 0
    assert ("not tested: labels read from the devkit" in capsys.readouterr().out) == bool(options)


def test_22_a_batch_is_no_larger_than_what_there_is(eager, shapes20):
    assert (
        evaluate(eager, shapes20, device_batch_size=100_000, limit=3, progress=False).metrics["device_batch_size"] == 3
    )


@pytest.mark.parametrize(
    ("path", "said"),
    [("https://host/val.tar", "is a URL; download"), ("/dev/null", "is not a folder; check the path")],
)
def test_22_a_path_that_is_none(path, said, tmp_path, capsys):
    assert main(["evaluate", "vit_shapes20", "--data", path, "--out", str(tmp_path)]) == 2
    assert f"{path}: {said}" in capsys.readouterr().err


def test_22_an_mfu_needs_no_cache(mounted, tmp_path):
    """Where the cache is read-only the roof is measured and not kept."""
    own = dict(VITDEMO_CACHE=f"{mounted('ro')}/cache")
    done = run(CLI, "evaluate", "vit_shapes20", "--data", TAR, "--limit", 8, "--out", tmp_path / "out", **own)
    assert done.returncode == 0 and "MFU n/a" not in done.stdout and "MFU " in done.stdout, done.stderr


def test_22_a_run_that_is_there_names_how_to_go_on(eager, shapes20, tmp_path):
    evaluate(eager, shapes20, limit=1, out=tmp_path, progress=False)
    with pytest.raises(VitdemoError, match=r"holds a run; resume=True \(--resume\) goes on with it"):
        evaluate(eager, shapes20, limit=1, out=tmp_path, progress=False)


@pytest.mark.parametrize("options", [[], ["--replicas", "1"]])
def test_22_sigterm_says_that_it_stopped(options, tmp_path):
    command = [sys.executable, "-m", "vitdemo", "evaluate", "vit_shapes20", "--data", TAR, "--out", tmp_path / "out"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True, env=environment) as running:
        rows = tmp_path / "out" / "predictions.csv"
        while not rows.exists() or rows.read_bytes().count(b"\n") < 2:
            assert running.poll() is None
        running.terminate()
        _, said = running.communicate(timeout=60)
    assert running.returncode == 130 and "the same command with --resume goes on" in said.splitlines()[-1]


def test_22_a_failed_verification_names_the_next_step(vit_shapes20, shapes20, monkeypatch):
    engine = convert(vit_shapes20)
    monkeypatch.setattr(engine, "_infer", lambda x: torch.ones(len(x), 20))
    assert "next: build it again with" in str(verify(engine, vit_shapes20, shapes20, images=2, progress=False))


def test_an_operation_that_a_runtime_has_not_is_named():
    pytest.importorskip("openvino")
    with pytest.raises(VitdemoError, match="upsample_bicubic2d") as refusal:
        convert(load_model("naflexvit_base_patch16_gap", "random"), "openvino", "fp32")
    assert "\n" not in reason_of(refusal.value)


def test_a_folder_for_results_that_cannot_be_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(VitdemoError, match="give another"):
        claim_folder(tmp_path / "file" / "below")
