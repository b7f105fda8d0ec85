"""The shell's door: exit codes, one line for bad input, and the verbs end to end."""

import inspect
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

from vitdemo import (
    VitdemoError,
    benchmark,
    convert,
    evaluate,
    extract,
    find_engines,
    load_model,
    machine,
    merge,
    precisions,
    verify,
)
from vitdemo.benchmarking.gate import compare
from vitdemo.cli import COMMANDS as VERBS
from vitdemo.cli import PARSER, main
from vitdemo.course import run_notebooks, write_workshop
from vitdemo.course.notebooks import assign_parameters, choose_notebooks, parse_parameter
from vitdemo.engines.eager import EagerEngine
from vitdemo.paths import REPOSITORY, data_path

READMES = [REPOSITORY / "README.md", REPOSITORY / "notebooks" / "README.md", *(REPOSITORY / "docs").glob("*.md")]


def test_help_does_not_load_torch():
    """--help must answer at once: it may not load torch."""
    code = "import sys; from vitdemo.cli import main\ntry: main(['--help'])\nfinally: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "evaluate" in done.stdout and done.stdout.strip().endswith("False")


@pytest.mark.parametrize(
    "verb, function, options",
    [
        ("run", run_notebooks, ["profile"]),
        ("extract", extract, ["split"]),
        ("convert", convert, ["engine", "precision"]),
        ("verify", verify, ["images"]),
        ("evaluate", convert, ["engine", "precision"]),
        ("evaluate", evaluate, ["schedule"]),
        ("benchmark", benchmark, ["row_budget_s", "images"]),
        ("benchmark", compare, ["worse_by"]),
    ],
)
def test_the_help_names_the_functions_defaults(verb, function, options):
    said = {action.dest: action.help for action in VERBS.choices[verb]._actions}
    for name in options:
        default = inspect.signature(function).parameters[name].default
        words = f"{default}[^,;]* \\(the default\\)" if isinstance(default, str) else f"\\({default:g}\\)$"
        assert re.search(words, said[name]), said[name]


def test_doctor_says_what_is_here(capsys):
    assert main(["doctor"]) == 0
    output = capsys.readouterr().out
    assert "cores" in output and "ok       torch" in output and "00_tour" in output


def test_doctor_finds_missing_data(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("VITDEMO_DATA", str(tmp_path))
    assert main(["doctor"]) == 1
    assert f"missing  {tmp_path}/shapes20/vit_shapes20" in capsys.readouterr().out


def workshop_says(capsys) -> tuple[int, list[str]]:
    return main(["doctor", "--workshop"]), capsys.readouterr().out.splitlines()


def test_doctor_has_a_verdict_for_a_workshop(capsys, monkeypatch, tmp_path):
    code, lines = workshop_says(capsys)
    assert (code, lines[0]) == (0, "READY") and all(line.startswith("  leave out ") for line in lines[1:])
    monkeypatch.setenv("VITDEMO_DATA", str(tmp_path))
    code, lines = workshop_says(capsys)
    assert code == 1 and lines[0].startswith(f"NOT READY: {tmp_path}/shapes20/")


def test_doctor_names_what_this_machine_must_leave_out(capsys, monkeypatch):
    installed = machine.installed_version
    monkeypatch.setattr(machine, "installed_version", lambda name: None if name == "ray" else installed(name))
    monkeypatch.setattr(precisions, "torch_support", lambda: {"fp32": "native", "bf16": "emulated"})
    monkeypatch.setattr(machine, "free_memory_bytes", lambda: 3e9)
    code, lines = workshop_says(capsys)
    assert code == 0 and all(word in str(lines) for word in ("04: no ray", "bf16 and Inductor", "most of 05"))
    monkeypatch.setattr(machine, "free_memory_bytes", lambda: 1e9)
    assert workshop_says(capsys)[1][0] == "NOT READY: 2 GB of memory, 1.0 are free"


def test_doctor_is_quick_for_a_workshop_as_it_loads_no_runtime_but_torch():
    code = "import sys; from vitdemo.cli import main; main(['doctor', '--workshop']); print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "torch" in modules and not {"openvino", "onnxruntime", "ray", "timm", "matplotlib"} & set(modules)


def test_extract_then_evaluate_equals_evaluate_on_the_tar(capsys, tmp_path):
    assert main(["extract", "--archives", str(data_path("shapes20")), "--out", str(tmp_path / "extracted")]) == 0
    for name, data in (("a", tmp_path / "extracted"), ("b", data_path("shapes20/shapes20_img_val.tar"))):
        arguments = ["vit_shapes20", "--data", str(data), "--limit", "50", "--out", str(tmp_path / name)]
        assert main(["evaluate", *arguments]) == 0
    output = capsys.readouterr().out
    assert "top-1" in output and "images/s" in output and "machine:" in output
    assert (tmp_path / "a/predictions.csv").read_bytes() == (tmp_path / "b/predictions.csv").read_bytes()
    assert json.loads((tmp_path / "a/metrics.json").read_text())["images"] == 50


def test_a_leading_tilde_is_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(data_path("shapes20/vit_shapes20"), tmp_path / "own")
    assert load_model("~/own").info.tag == "own"
    assert load_model("vit_shapes20", "~/own/model.safetensors").info.weights == "model.safetensors"
    assert write_workshop("~/students")[0].parent == tmp_path / "students"
    with pytest.raises(VitdemoError, match=f"{tmp_path}/sweeps: no such file"):
        merge(["~/sweeps"])


TAR = str(data_path("shapes20") / "shapes20_img_val.tar")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["evaluate", "vit_shapes21", "--data", TAR], "vit_shapes21: no such model"),
        (["evaluate", "vit_shapes20", "--data", "/nowhere"], "/nowhere"),
        (["evaluate", "vit_shapes20", "--data", TAR, "--engine", "gpu"], "engine 'gpu': there is no such engine"),
        (
            ["evaluate", "vit_shapes20", "--data", TAR, "--precision", "int4"],
            "the eager engine has 'fp32', 'fp16', 'bf16'",
        ),
        (["evaluate", "vit_shapes20", "--data", TAR, "--device-batch-size", "0"], "device_batch_size 0"),
        (["evaluate", "vit_shapes20", "--data", TAR, "--weights", "/nowhere.pth"], "/nowhere.pth: no such weights"),
        (["evaluate", "resnet18", "--data", TAR, "--weights", "random"], "no output of resnet18 is its class"),
        (["extract", "--archives", "/nowhere"], "/nowhere"),
        (["run", "99_nothing"], "99_nothing"),
        (["run", "-p", "limit"], "NAME=VALUE"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(capsys, tmp_path, arguments, message):
    out = tmp_path / "out"
    assert main([*arguments, "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("vitdemo: ") and error.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize("package", ["torch", "timm", "packaging", "nbformat"])
def test_doctor_answers_without(package):
    code = f"import sys; sys.modules[{package!r}] = None\nfrom vitdemo.cli import main\nsys.exit(main(['doctor']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"missing  cannot be told without {package}" in done.stdout and "ok  " in done.stdout


def test_doctor_answers_where_packages_do_not_fit_together(tmp_path):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms is unknown')")
    command, path = [sys.executable, "-m", "vitdemo", "doctor"], os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=REPOSITORY, env=path, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "missing  cannot be told (operator torchvision::nms is unknown): install again" in done.stdout


@pytest.mark.parametrize("name", ["x" * 300, "file/below"])
def test_an_output_folder_that_cannot_be(capsys, tmp_path, name):
    (tmp_path / "file").write_text("")
    assert main(["run", "00", "--out", str(tmp_path / name)]) == 2
    said = capsys.readouterr().err
    assert "cannot be an output folder" in said and len(said.splitlines()) == 1


def test_engine_that_breaks_is_exit_code_1(capsys, monkeypatch, tmp_path):
    def broken(self, x):
        raise RuntimeError("device lost")

    monkeypatch.setattr(EagerEngine, "_infer", broken)
    assert main(["evaluate", "vit_shapes20", "--data", TAR, "--out", str(tmp_path / "out")]) == 1
    assert "device lost; this run is invalid" in capsys.readouterr().err


def test_ctrl_c_keeps_what_is_done_and_says_how_to_go_on(tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "vitdemo", "evaluate", "vit_shapes20", "--data", TAR, "--out", str(out)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not (out.exists() and len(rows_of(out)) > 16):
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        error = process.communicate(timeout=120)[1]
    assert process.returncode == 130
    assert "--resume goes on" in error and "Traceback" not in error
    assert 16 < len(rows_of(out)) < 1000


def rows_of(out):
    path = out / "predictions.csv"
    return path.read_text().splitlines()[1:] if path.exists() else []


COMMANDS = re.findall(r"^vitdemo (\w.*)$", "\n".join(p.read_text() for p in READMES), re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_in_the_readmes_are_understood(command):
    args = vars(PARSER.parse_args(shlex.split(command, comments=True)))
    if command.startswith("run ") and args.get("profile") != "imagenet":
        given = dict(map(parse_parameter, args.get("parameters", ())))
        assign_parameters(choose_notebooks(args.get("names")), args.get("profile", "bundled"), None, given)
    if command.startswith("evaluate "):
        assert args.get("precision", "fp32") in find_engines()[args.get("engine", "eager")].precisions


@pytest.mark.parametrize(
    "arguments",
    [[], ["nonsense"], ["evaluate"], ["evaluate", "vit_shapes20", "--data", TAR, "--out", "x", "--limit", "x"]],
)
def test_mistyped_commands_are_one_line_and_exit_code_2(capsys, arguments):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith("vitdemo: ") and error.count("\n") == 1


def test_busy_output_folder(capsys, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for arguments in (
        ["evaluate", "vit_shapes20", "--data", TAR],
        ["extract", "--archives", str(data_path("shapes20"))],
        ["run", "00"],
        ["workshop"],
    ):
        assert main([*arguments, "--out", str(tmp_path)]) == 2
        assert str(tmp_path) in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_workshop_writes_the_copies(capsys, tmp_path):
    assert main(["workshop", "--out", str(tmp_path / "students")]) == 0
    copies = list((tmp_path / "students").glob("*.ipynb"))
    assert f"{tmp_path / 'students'}: {len(copies)} notebooks without solutions" in capsys.readouterr().out


def test_convert_verify_and_cache(capsys):
    openvino = ["vit_shapes20", "--engine", "openvino", "--precision", "fp32"]
    assert main(["convert", *openvino]) == 0
    assert "loaded in" in (said := capsys.readouterr().out) and "100.0% fp32" in said
    assert main(["verify", *openvino, "--images", "16"]) == 0
    assert capsys.readouterr().out.rstrip().endswith("passed")
    assert main(["cache"]) == 0
    assert "vit_shapes20" in (table := capsys.readouterr().out) and "fp32" in table


def test_extract_checks_the_images(capsys, tmp_path):
    arguments = ["extract", "--archives", str(data_path("shapes20")), "--out", str(tmp_path), "--check-images"]
    assert main(arguments) == 0 and "1,000 images decoded: 0 unreadable" in capsys.readouterr().out
    victim = min((tmp_path / "val").glob("*/*.JPEG"))
    victim.write_bytes(b"\0" * victim.stat().st_size)
    assert main(arguments) == 1  # its size is right, so extract keeps it
    assert victim.name in capsys.readouterr().out
    assert (tmp_path / "check_val" / "images.csv").exists()


def test_another_precision_is_held_against_the_reference(capsys, tmp_path):
    command = ["evaluate", "vit_shapes20", "--data", TAR, "--precision", "bf16", "--limit", "24", "--repeat", "2"]
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert re.search(r"eager bf16 gives eager fp32's answer for 2\d of 24 images", said)
    assert said.count("images/s end to end, eager bf16") == 2 and said.count("images/s end to end, eager fp32") == 1
    assert re.search(r"FlagPerf row: .*e2e_time \d", said)
    row = (tmp_path / "out/flagperf.csv").read_bytes()
    assert main([*command, "--out", str(tmp_path / "out"), "--resume"]) == 0
    assert "FlagPerf row" not in capsys.readouterr().out, "what was finished before took other seconds"
    assert (tmp_path / "out/flagperf.csv").read_bytes() == row
    assert main([*command[:-1], "3", "--out", str(tmp_path / "out"), "--resume"]) == 0
    assert "FlagPerf row" in capsys.readouterr().out, "the third run is new"


def test_accuracy_below_the_published_one_is_diagnosed(capsys, tmp_path):
    """The bundled model with another's mean and std, as a folder of the user's."""
    folder = tmp_path / "vit_shapes20"
    shutil.copytree(data_path("shapes20/vit_shapes20"), folder)
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"] |= {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    (folder / "config.json").write_text(json.dumps(config))
    command = ["evaluate", str(folder), "--data", TAR, "--limit", "200", "--diagnose", "--out", str(tmp_path / "out")]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "measured is below" in said and "with ImageNet's" not in said and "mean/std 0.5" in said
