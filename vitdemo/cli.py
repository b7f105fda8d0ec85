"""The command ``vitdemo``, a thin layer over the library. Exit codes: 0 done, 1 a check failed, 2 bad input."""

import argparse
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import Any

import vitdemo
from vitdemo import course
from vitdemo.errors import EngineFailure, VitdemoError, named_errors, terminate_as_interrupt
from vitdemo.paths import replacing, user_path


class _OneLineParser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"vitdemo: {message}; see `{self.prog} --help`\n")


PARSER = _OneLineParser(prog="vitdemo", description="A Vision Transformer from images to verified inference.")
COMMANDS = PARSER.add_subparsers(required=True, metavar="COMMAND")


def verb(*options: tuple) -> Callable:
    """A decorator that makes a function a command: its name is the command's, its docstring the command's help.

    The function returns the exit code, or None for 0. It is called with only those options that the user gave, so that
    the default of every other one is written in the library's function alone.
    """

    def register(run: Callable[..., int | None]) -> Callable[..., int | None]:
        name, text = run.__name__.removeprefix("_"), run.__doc__[0].lower() + run.__doc__[1:].rstrip(".")
        parser = COMMANDS.add_parser(name, help=text, description=text, argument_default=argparse.SUPPRESS)
        parser.set_defaults(run=run)
        for option_name, how in options:
            parser.add_argument(option_name, **how)
        return run

    return register


def option(name: str, metavar: str | None, help: str | None = None, type: Callable = str, **how: Any) -> tuple:
    """An option of a verb (or an argument, if the name has no dashes) as parameters of ``add_argument``."""
    return name, dict(metavar=metavar, help=help, type=type, **how)


def flag(name: str, help: str) -> tuple:
    """An option without a value."""
    return name, dict(help=help, action="store_true")


def main(argv: list[str] | None = None) -> int:
    """Run one command and return the exit code. Bad input is reported as one line on stderr."""
    if find_spec("fcntl") is None:
        print("vitdemo: runs on Linux and macOS; on Windows use it in WSL, the Linux in Windows", file=sys.stderr)
        return 2
    options, code = vars(PARSER.parse_args(argv)), 128 + 13  # the shells' code for a program ended by a closed pipe
    try:
        with terminate_as_interrupt():
            code = options.pop("run")(**options) or 0
            sys.stdout.flush()
            return code
    except BrokenPipeError:  # `| head` has ended and reads no more; the files are written
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return code
    except (VitdemoError, EngineFailure) as error:
        print(f"vitdemo: {error}", file=sys.stderr)
        return 2 if isinstance(error, VitdemoError) else 1
    except KeyboardInterrupt:
        print("vitdemo: stopped", file=sys.stderr)
        return 130


def _taken(options: dict[str, Any], *names: str) -> dict[str, Any]:
    """Remove the options with these names from ``options``, and return them."""
    return {name: options.pop(name) for name in names if name in options}


def _sizes(text: str) -> list[int]:
    try:
        return [int(size) for size in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: give whole numbers with commas, such as 1,8") from None


MODEL_HELP = "vit_shapes20, a name of timm's, hf-hub:OWNER/NAME, a folder, or a checkpoint of timm's training script"
MODEL = option("model", "MODEL", MODEL_HELP)
WEIGHTS = option("--weights", "W", "pretrained, random, or a file")
EMA = flag("--ema", "take the averaged weights of a training checkpoint")
DEVICE = option("--device", "D", "cpu, cuda, or auto (the default): CUDA if there is a GPU and the engine supports it")
ENGINE = (
    option("--engine", "E", "eager (the default), openvino, onnx, inductor"),
    option("--precision", "P", "fp32 (the default), bf16, int8"),
    DEVICE,
    WEIGHTS,
    EMA,
)
CALIBRATION = option("--calibration", "PATH", "images for int8: a data set, or images without labels")
MAP_HELP = "a file with rows class,output, or a rule that orders the classes' names: sorted, natural, numbers"
DATA = (
    option("--labels", "FILE", "a table of the images' labels: csv, tsv, json, jsonl"),
    option("--split", "S", "val (the default) or train"),
    option("--class-map", "MAP", MAP_HELP),
)

# A verb imports its modules when it runs, here or through the names of vitdemo, so that --help and the message about a
# mistyped option appear at once.


@verb(flag("--workshop", "a verdict in seconds: READY or NOT READY, and what to leave out on this machine"))
def _doctor(workshop: bool = False) -> int:
    """List what is installed, what each notebook needs, and what will be skipped and why."""
    from vitdemo.doctor import examine, examine_for_workshop

    lines, ok = examine_for_workshop() if workshop else examine()
    print("\n".join(lines))
    return 0 if ok else 1


SET_HELP = "set a parameter; a relative path is relative to notebooks/"


@verb(
    option("names", "NAME", "notebooks, e.g. 00_tour or 00; all by default", nargs="*"),
    option("--profile", None, "smoke (a few images), bundled (the default) or imagenet"),
    option("--imagenet", "DIR", "where ImageNet lies, for --profile imagenet"),
    option("-p", "NAME=VALUE", SET_HELP, dest="parameters", action="append"),
    option("--out", "DIR", "a new folder for the report; runs/<time> by default"),
)
def _run(parameters: Sequence[str] = (), **options) -> int:
    """Execute notebooks headlessly and write an HTML report."""
    report = course.run_notebooks(parameters=dict(map(course.parse_parameter, parameters)), **options)
    print(report)
    return 0 if report.ok else 1


@verb(
    option("--archives", "DIR", "the folder with the val tar and the devkit", required=True),
    option("--out", "DIR", "the folder for val/ and classes.csv; the same one to resume", required=True),
    option("--split", "S", "val (the default) or train"),
    flag("--check-images", "decode every file and report what is damaged"),
    flag("--unverified", "accept archives whose MD5 is unknown or does not match"),
)
def _extract(out: str, **options) -> int | None:
    """Verify the ILSVRC2012 archives and extract val/<wnid>/ or train/<wnid>/."""
    from vitdemo.dataset.extraction import check_folder

    checked = _taken(options, "check_images")
    extracted = vitdemo.extract(out=out, **options)
    if checked:
        report = vitdemo.check_images(extracted, check_folder(out, options.get("split", "val")))
        print(f"{report}\nreport: {report.out}")
        return 0 if report.damaged.empty else 1


def _model_of(options: dict[str, Any]) -> Any:
    """Remove the options of the model from ``options``; return that model."""
    return vitdemo.load_model(options.pop("model"), **_taken(options, "weights", "ema"))


def _engine_of(model: Any, options: dict[str, Any]) -> Any:
    """Remove the options of the engine from ``options``; return that engine of ``model``."""
    return vitdemo.convert(model, **_taken(options, "engine", "precision", "device", "calibration", "force"))


@verb(MODEL, *ENGINE, CALIBRATION, flag("--force", "build it again even if the cache has it"))
def _convert(**options) -> None:
    """Build a model for an engine and keep it in the cache."""
    engine = _engine_of(_model_of(options), options)
    ran = ", ".join(f"{share:.1%} {precision}" for precision, share in engine.precision_ran.items())
    size = sum(file["bytes"] for file in engine.card.get("files", {}).values())
    built = f"built in {engine.card['build_s']:.1f} s, {size / 1e6:.1f} MB, " if size else ""
    made = f"{built}loaded in {engine.load_s:.2f} s; multiply-accumulates: {ran}; key {engine.card['key'][:16]}"
    print(f"{engine.info.tag}: {engine.name} {engine.precision}: {made}")


@verb(
    MODEL,
    *ENGINE,
    option("--data", "PATH", "a data set of real images; by default the bundled one for vit_shapes20"),
    *DATA,
    option("--images", "N", "how many images (256)", int),
    CALIBRATION,
)
def _verify(**options) -> int:
    """Compare an engine with the fp32 reference, layer by layer."""
    data, class_map = _data_of(options), options.pop("class_map", None)
    model = _model_of(options)
    if data is not None:
        options["data"] = vitdemo.match_classes(model.info, data, class_map) if class_map else data
    engine = _engine_of(model, options)
    report = vitdemo.verify(engine, model, **options)
    print(report)
    return 0 if report.ok else 1


@verb(flag("--clear", "remove all of them"))
def _cache(clear: bool = False) -> None:
    """List the built models in the cache, with sizes."""
    from vitdemo.engines.artifacts import artifacts_root, cached_artifacts, clear_cache

    if clear:
        print(f"{artifacts_root()}: {clear_cache() / 1e6:.1f} MB removed")
        return
    table = cached_artifacts()
    print(f"{artifacts_root()}: {len(table)} artifacts, {table['bytes'].sum() / 1e6:.1f} MB")
    if len(table):
        table["key"] = table["key"].astype("string").str[:16]
        print(table.to_string(index=False, formatters={"build_s": "{:.1f}".format}))


def _data_of(options: dict[str, Any]) -> Any:
    """Remove --data and its options from ``options``; return that data set, or None without --data."""
    how = _taken(options, "labels", "split")
    if (path := options.pop("data", None)) is not None:
        return vitdemo.open_data(path, **how)
    if how or "class_map" in options:
        raise VitdemoError("--labels, --split and --class-map say how --data is read; give that too")
    return None


SHOWN = 100  # images that are printed; --out writes all


@verb(
    MODEL,
    option("images", "IMAGE", "files, folders, patterns, a tar or parquet files", nargs="+"),
    *ENGINE,
    CALIBRATION,
    option("--data", "PATH", "a data set whose classes name the outputs, for a model without names"),
    *DATA,
    option("--top", "K", "how many classes to list per image, at most 5 (3)", int),
    option("--out", "FILE", "a new .csv for all answers", user_path),
)
def _predict(images: Sequence[str], top: int = 3, out: Path | None = None, **options) -> None:
    """Classify images that have no labels."""
    from vitdemo.dataset.samples import counted

    if out and (out.suffix != ".csv" or out.exists() or not os.access(out.absolute().parent, os.W_OK)):
        where = "in a folder that is there and can be written"
        raise VitdemoError(f"--out {out}: give the name of a new file that ends in .csv, {where}")
    data, named, class_map = vitdemo.open_images(images), _data_of(options), options.pop("class_map", None)
    model = _model_of(options)
    names = None if named is None else vitdemo.match_classes(model.info, named, class_map).class_names
    table = vitdemo.answers(_engine_of(model, options), data, class_names=names, top=top)
    if data.source == "folder":
        table["file"] = [os.path.relpath(data.path / file) for file in table["file"]]
    if out:
        with named_errors(out), replacing(out) as file:
            table.to_csv(file, index=False)
    for row in table.head(SHOWN).to_dict("records"):
        said = [f"{row[f'class_{k}']} {row[f'probability_{k}']:.1%}" for k in range(1, top + 1) if row[f"class_{k}"]]
        print(row["file"], *(said if not row["error"] else [row["error"]]), sep="\t")
    if len(table) > SHOWN:
        print(f"… and {len(table) - SHOWN} more{f', in {out}' if out else '; --out FILE.csv writes all'}")
    if rotated := table.attrs["rotated"]:
        print(f"{rotated} of them carry an EXIF orientation, which is ignored, as timm does", file=sys.stderr)
    print(f"{counted(len(table), 'image')}, {(table['error'] != '').sum()} unreadable", file=sys.stderr)


@verb(
    MODEL,
    option("--data", "PATH", "labelled images, as for evaluate", required=True),
    *DATA,
    WEIGHTS,
    EMA,
    CALIBRATION,
    option("--latency-ms", "L", "the latency that nine of ten calls must not exceed", float),
    option("--largest-loss", "X", "the largest loss of top-1 against eager fp32 (0.01)", float),
    option("--engines", "E,…", "such as openvino,onnx:int8; by default all, in native precisions; always with eager"),
    option("--images", "N", "the largest number of images to score (1000)", int),
    option("--device-batch-sizes", "B,…", "1,2,4,8,16,32 by default", _sizes),
    option("--row-budget-s", "S", "seconds that the calls of one row may take (5)", float),
    option("--out", "DIR", "a new folder for the measurements, the engine and its script", user_path, required=True),
)
def _choose(model: str, **options) -> None:
    """Measure, verify and export the engine to use here."""
    row, report, script = vitdemo.choose(model, _data_of(options), **options)
    speed = f"{row['images_per_s']:.1f} images/s, nine calls in ten within {row['p90_ms']:.1f} ms"
    print(f"{report}\nchosen: {row['engine']} {row['precision']}, batch {row['batch']}: {speed}; {row['accuracy']}")
    print(f"machine: {row['machine']}\nuse it, one image at a time: python {shlex.quote(str(script))} IMAGE …")


DATA_HELP = "one folder per class, images with a table of labels, parquet files, or ILSVRC2012's archives"
DIAGNOSE_HELP = "look for the cause of lost accuracy; takes as long as six more runs over 256 images"
SCHEDULE_HELP = "async (the default): a free replica takes the next batch; sync: all share each global batch"


@verb(
    MODEL,
    option("--data", "PATH", DATA_HELP, required=True),
    *DATA,
    *ENGINE,
    CALIBRATION,
    option("--device-batch-size", "B", "images per batch (8)", int),
    option("--limit", "N", "only the first N images; with a folder per class these are of the first classes", int),
    option("--replicas", "N", "share the work among N processes, by Ray", int),
    option("--schedule", "S", SCHEDULE_HELP),
    option("--ray-address", "A", "a Ray cluster: host:port of its head, or auto"),
    option("--repeat", "N", "run the engine N times", int),
    flag("--skip-validation", "leave out the run of the reference, eager fp32, over the same images"),
    flag("--diagnose", DIAGNOSE_HELP),
    flag("--resume", "continue the interrupted run in --out"),
    option("--out", "DIR", "a new folder for the results", user_path, required=True),
)
def _evaluate(out: Path, diagnose: bool = False, **options) -> int | None:
    """Measure the accuracy and the speed of a model over a data set."""
    from vitdemo.evaluation.reference import FLAGPERF, describe_row, evaluate_beside_reference, write_row

    if diagnose and options.get("weights") == "random":
        raise VitdemoError("--diagnose: answers of random weights mean nothing; leave it out, or give weights")
    start, dataset = time.perf_counter(), _data_of(options)
    model = _model_of(options)
    dataset = vitdemo.match_classes(model.info, dataset, options.pop("class_map", None))
    engine = _engine_of(model, options)
    try:
        runs, reference = evaluate_beside_reference(engine, model, dataset, out=out, **options)
    except EngineFailure as failure:
        raise EngineFailure(f"{failure}; this run is invalid") from None
    except KeyboardInterrupt:
        return _stopped(out, (out / "run.json").exists(), "the same command with --resume goes on")
    e2e_s = None if "resume" in options else time.perf_counter() - start  # only of a run that was not interrupted
    evaluation, row = runs[0], None
    if any(run and len(run.times) for run in (*runs, reference)) or not (out / FLAGPERF).exists():  # not all finished
        m = evaluation.metrics
        rate = m["session_images"] / m["inference_s"] if m["inference_s"] else 0
        roof = None if m["replicas"] else vitdemo.roof_of(engine, model, m["device_batch_size"], rate)
        row = vitdemo.flagperf_row(runs, reference, e2e_s=e2e_s, roof=roof)
        write_row(row, evaluation.out)  # before the first print, which ends the program if the reader closed the pipe
    print(*runs, sep="\n")
    if reference is not None and reference is not evaluation:
        print(f"{vitdemo.agreement(evaluation, reference)}\nreference: {reference}")
    if row:
        print("FlagPerf row:", describe_row(row))
    print(f"outputs and classes: matched {dataset.decided}")
    published = vitdemo.compare_published(evaluation)
    print(f"{published}\nmachine: {vitdemo.describe_machine(vitdemo.machine_record())}\nresults: {evaluation.out}")
    if published.verdict == "below" and not diagnose and evaluation.metrics["images"] == len(dataset):
        print("below: the same command with --diagnose and a new --out looks for the cause")
    if evaluation.metrics["errors"] == evaluation.metrics["images"]:
        print(f"vitdemo: none of the images can be read; {evaluation.out}/predictions.csv says why", file=sys.stderr)
        return 1
    if diagnose:
        try:
            print(vitdemo.diagnose(engine, model, dataset))
        except EngineFailure as failure:
            raise EngineFailure(f"{failure}; the results are valid, but the diagnosis is not") from None


def _stopped(out: Path, begun: bool, cure: str) -> int:
    """Report what is left after Ctrl-C. begun: whether there are results from which to continue."""
    print(f"vitdemo: stopped{f'; the finished part is in {out}; {cure}' if begun else ''}", file=sys.stderr)
    return 130


AGAINST_HELP = "a baseline sweep; exit code 1 if an engine's speed relative to eager is worse than there"


@verb(
    option("models", "MODEL", MODEL_HELP, nargs="+"),
    option("--engines", "E,…", "such as openvino,onnx:int8; by default all, in native precisions; always with eager"),
    option("--device-batch-sizes", "B,…", "1,2,4, … 256 by default", _sizes),
    DEVICE,
    WEIGHTS,
    EMA,
    option("--replicas", "N", "share each batch among N processes, by Ray", int),
    option("--row-budget-s", "S", "seconds that the calls of one row may take (20)", float),
    option("--data", "PATH", "a data set for the accuracy; by default the bundled one for vit_shapes20"),
    *DATA,
    option("--images", "N", "how many images (1000)", int),
    CALIBRATION,
    option("--against", "CSV", AGAINST_HELP, user_path),
    option("--worse-by", "X", "the fraction by which a ratio may be worse (0.2)", float),
    option("--out", "DIR", "the folder for perf_*.csv", user_path, required=True),
)
def _benchmark(out: Path, against: Path | None = None, **options) -> int:
    """Time models in every engine and batch size, interleaved."""
    from vitdemo.benchmarking import gate
    from vitdemo.benchmarking.files import read_perf
    from vitdemo.benchmarking.pairs import choose_pairs
    from vitdemo.benchmarking.tables import markdown

    baseline = read_perf(against) if against else None
    worse_by = _taken(options, "worse_by")
    if worse_by:
        gate.check_share(**worse_by)
    if baseline is not None:
        gate.check_baseline(baseline)
        asked = {name: own.default for name, own in signature(vitdemo.benchmark).parameters.items()} | options
        models = [vitdemo.load_model(name, asked["weights"], ema=asked["ema"]).info for name in asked["models"]]
        pairs, sizes = choose_pairs(asked["engines"], asked["device"]), asked["device_batch_sizes"]
        gate.check_overlap(baseline, models, pairs, sizes, asked["replicas"])
    began = time.time()
    options["data"] = _data_of(options)
    try:
        rows = vitdemo.benchmark(out=out, **options)
    except KeyboardInterrupt:
        begun = any(file.stat().st_mtime >= began for file in out.glob("perf_*.csv"))
        return _stopped(out, begun, "measure the other batch sizes, and vitdemo merge joins both")
    print(markdown(vitdemo.summary(rows)))
    print(f"machine: {rows['machine'].iloc[0]}\nresults: {out}")
    if baseline is None:
        return 0
    compared = gate.compare(rows, baseline, **worse_by)
    print(f"against {against}, measured on {baseline['machine'].iloc[0]}:\n{markdown(compared)}")
    if baseline["machine"].iloc[0] != rows["machine"].iloc[0]:
        print("vitdemo: the baseline is from another machine, where ratios may differ", file=sys.stderr)
    return 0 if gate.passes(compared) else 1


@verb(
    option("folders", "DIR", "folders or files that `vitdemo benchmark` wrote", user_path, nargs="+"),
    option("--layout", "L", "the columns of another project's table: ttmetal or aitemplate"),
    option("--out", "FILE", "a .csv, .md or .html", user_path, required=True),
)
def _merge(folders: Sequence[Path], out: Path, layout: str | None = None) -> None:
    """Join the results of sweeps into one table."""
    from vitdemo.benchmarking.files import PATTERN
    from vitdemo.benchmarking.tables import laid_out

    if out.match(PATTERN):
        raise VitdemoError(f"{out}: a name of {PATTERN} is a sweep's; give the table another, such as perf.csv")
    rows = vitdemo.merge(folders)
    vitdemo.write_table(laid_out(rows, layout) if layout else rows, out)
    print(f"{out}: {len(rows)} rows of {rows['file'].nunique()} sweeps")


@verb(option("--out", "DIR", "a new or empty folder for the copies", user_path, required=True))
def _workshop(out: Path) -> None:
    """Write student copies of the notebooks, without the solutions."""
    copies = course.write_workshop(out)
    print(f"{copies[0].parent}: {len(copies)} notebooks without solutions; README.md there says how to open them")
