"""``vitdemo …``: a thin door to the library's verbs. Exit codes: 0 done, 1 a check failed, 2 bad input."""

import argparse
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from vitdemo.errors import VitdemoError
from vitdemo.paths import user_path

# The command line: every option of every verb, with its help.


MODEL_HELP = "vit_shapes20, a full timm tag, hf:google/vit-base-patch16-224, or a folder"


def _sizes(text: str) -> list[int]:
    try:
        return [int(size) for size in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: give whole numbers with commas, such as 1,8") from None


class _OneLineParser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"vitdemo: {message}; see `{self.prog} --help`\n")


def parser_of(verbs: Mapping[str, Callable]) -> argparse.ArgumentParser:
    """What reads a command line; ``run`` of its answer is the verb, which takes the answer."""
    parser = _OneLineParser(prog="vitdemo", description="A Vision Transformer from images to verified inference.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=verbs[name])
        return sub

    def add_engine(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--engine", default="eager", metavar="E", help="eager (the default), openvino, onnx, inductor")
        sub.add_argument("--precision", default="fp32", metavar="P", help="fp32 (the default), bf16, int8")
        sub.add_argument("--weights", default="pretrained", metavar="W", help="pretrained, random, or a file")

    command("doctor", "what is installed, what each notebook needs, what will be skipped and why")

    run = command("run", "execute notebooks headlessly and write an HTML report")
    run.add_argument("names", nargs="*", metavar="NAME", help="notebooks, e.g. 00_tour or 00; all by default")
    run.add_argument("--profile", default="bundled", help="smoke (a few images), bundled (the default) or imagenet")
    run.add_argument("--imagenet", metavar="DIR", help="where ImageNet lies, for --profile imagenet")
    set_help = "set a parameter; a relative path is relative to notebooks/"
    run.add_argument("-p", dest="parameter", action="append", default=[], metavar="NAME=VALUE", help=set_help)
    run.add_argument("--out", metavar="DIR", help="a new folder for the report; runs/<time> by default")

    extract = command("extract", "verify the ILSVRC2012 archives and extract val/<wnid>/ or train/<wnid>/")
    extract.add_argument("--archives", required=True, metavar="DIR", help="the folder of the val tar and the devkit")
    extract.add_argument(
        "--out", required=True, metavar="DIR", help="where val/ and classes.csv go; the same to resume"
    )
    extract.add_argument("--split", default="val", metavar="S", help="val (the default) or train")
    extract.add_argument("--check-images", action="store_true", help="decode every file and report what is damaged")
    extract.add_argument("--unverified", action="store_true", help="take archives whose MD5 is unknown or another")

    convert = command("convert", "build a model for an engine and keep it in the cache")
    convert.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    add_engine(convert)
    calibration_help = "images for int8: a data set, or a tar of JPEGs"
    convert.add_argument("--calibration", metavar="PATH", help=calibration_help)
    convert.add_argument("--force", action="store_true", help="build anew")

    verify = command("verify", "hold an engine against the fp32 reference, layer by layer")
    verify.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    add_engine(verify)
    verify.add_argument("--data", metavar="PATH", help="real images: a data set; the bundled ones for vit_shapes20")
    verify.add_argument("--images", type=int, default=256, metavar="N", help="how many of them (256)")
    verify.add_argument("--calibration", metavar="PATH", help=calibration_help)

    cache = command("cache", "list what was built and kept, with sizes")
    cache.add_argument("--clear", action="store_true", help="remove all of it")

    evaluate = command("evaluate", "run a model over a data set: accuracy and speed")
    evaluate.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    evaluate.add_argument("--data", required=True, metavar="PATH", help="a val tar, a folder of archives, or val/")
    add_engine(evaluate)
    evaluate.add_argument("--calibration", metavar="PATH", help=calibration_help)
    evaluate.add_argument("--device-batch-size", type=int, default=8, metavar="B")
    evaluate.add_argument("--limit", type=int, metavar="N", help="only the first N images")
    evaluate.add_argument("--replicas", type=int, metavar="N", help="share the work among N processes, by Ray")
    schedule_help = "async (the default): replicas take what comes next; sync: all do a share of each global batch"
    evaluate.add_argument("--schedule", default="async", metavar="S", help=schedule_help)
    evaluate.add_argument("--ray-address", metavar="A", help="a Ray cluster: host:port of its head, or auto")
    evaluate.add_argument("--repeat", type=int, default=1, metavar="N", help="run the engine N times")
    skip_help = "leave out the reference's run, eager fp32, over the same images"
    evaluate.add_argument("--skip-validation", action="store_true", help=skip_help)
    evaluate.add_argument("--resume", action="store_true", help="go on with an interrupted run in --out")
    evaluate.add_argument("--out", required=True, type=user_path, metavar="DIR", help="a new folder for the results")

    benchmark = command("benchmark", "time models in every engine and batch size, by turns")
    benchmark.add_argument("models", nargs="+", metavar="MODEL", help=MODEL_HELP)
    engines_help = "such as openvino,onnx:int8; by default all, natively; eager always"
    benchmark.add_argument("--engines", metavar="E,…", help=engines_help)
    sizes = dict(type=_sizes, default=[2**k for k in range(9)], metavar="B,…")
    benchmark.add_argument("--device-batch-sizes", **sizes, help="1,2,4, … 256 by default")
    benchmark.add_argument("--weights", default="pretrained", metavar="W", help="pretrained, random, or a file")
    benchmark.add_argument("--replicas", type=int, metavar="N", help="share each batch among N processes, by Ray")
    budget_help = "seconds that a row's calls may take (20)"
    benchmark.add_argument("--row-budget-s", type=float, default=20.0, metavar="S", help=budget_help)
    data_help = "images for the accuracy: a data set; the bundled ones for vit_shapes20"
    benchmark.add_argument("--data", metavar="PATH", help=data_help)
    benchmark.add_argument("--images", type=int, default=1000, metavar="N", help="how many of them (1000)")
    benchmark.add_argument("--calibration", metavar="PATH", help=calibration_help)
    against_help = "a sweep to hold the ratios to eager against; exit code 1 where one became worse"
    benchmark.add_argument("--against", type=user_path, metavar="CSV", help=against_help)
    worse_help = "by which fraction a ratio may be worse (0.2)"
    benchmark.add_argument("--worse-by", type=float, default=0.2, metavar="X", help=worse_help)
    benchmark.add_argument("--out", required=True, type=user_path, metavar="DIR", help="where perf_*.csv goes")

    merge = command("merge", "join the results of sweeps into one table")
    merge.add_argument(
        "folders", nargs="+", type=user_path, metavar="DIR", help="folders, or files, of `vitdemo benchmark`"
    )
    merge.add_argument("--layout", metavar="L", help="as other projects have it: ttmetal, aitemplate or flagperf")
    merge.add_argument("--out", required=True, type=user_path, metavar="FILE", help="a .csv, .md or .html")

    workshop = command("workshop", "write student copies of the notebooks, without the solutions")
    workshop.add_argument(
        "--out", required=True, type=user_path, metavar="DIR", help="a new or empty folder for the copies"
    )
    return parser


# Each command imports what it needs when it runs, so that --help and a mistyped option answer at once.


def _doctor(args) -> int:
    from vitdemo.doctor import examine

    lines, ok = examine()
    print("\n".join(lines))
    return 0 if ok else 1


def _run(args) -> int:
    from vitdemo.course import parse_parameter, run_notebooks

    report = run_notebooks(
        args.names or None,
        profile=args.profile,
        imagenet=args.imagenet,
        parameters=dict(map(parse_parameter, args.parameter)),
        out=args.out,
    )
    print(report)
    return 0 if report.ok else 1


def _extract(args) -> int:
    from vitdemo.dataset.checking import check_images
    from vitdemo.dataset.extraction import check_folder, extract

    extracted = extract(args.archives, args.out, split=args.split, unverified=args.unverified)
    if not args.check_images:
        return 0
    report = check_images(extracted, check_folder(args.out, args.split))
    print(f"{report}\nreport: {report.out}")
    return 0 if report.damaged.empty else 1


def _convert(args) -> int:
    from vitdemo.engines.artifacts import convert
    from vitdemo.models.model import load_model

    model = load_model(args.model, args.weights)
    engine = convert(model, args.engine, args.precision, calibration=args.calibration, force=args.force)
    ran = ", ".join(f"{share:.1%} {precision}" for precision, share in engine.precision_ran.items())
    size = sum(file["bytes"] for file in engine.card.get("files", {}).values())
    built = f"built in {engine.card['build_s']:.1f} s, {size / 1e6:.1f} MB, " if size else ""
    print(
        f"{engine.info.tag}: {engine.name} {engine.precision}: {built}loaded in {engine.load_s:.2f} s; "
        f"multiply-accumulates: {ran}; key {engine.card['key'][:16]}"
    )
    return 0


def _verify(args) -> int:
    from vitdemo.engines.artifacts import convert
    from vitdemo.engines.contract import EngineFailure
    from vitdemo.models.model import load_model
    from vitdemo.verification.verification import verify

    model = load_model(args.model, args.weights)
    engine = convert(model, args.engine, args.precision, calibration=args.calibration)
    try:
        report = verify(engine, model, args.data, images=args.images)
    except EngineFailure as failure:
        print(f"vitdemo: {failure}", file=sys.stderr)
        return 1
    print(report)
    return 0 if report.ok else 1


def _cache(args) -> int:
    from vitdemo.engines.artifacts import artifacts_root, cached_artifacts, clear_cache

    if args.clear:
        print(f"{artifacts_root()}: {clear_cache() / 1e6:.1f} MB removed")
        return 0
    table = cached_artifacts()
    print(f"{artifacts_root()}: {len(table)} artifacts, {table['bytes'].sum() / 1e6:.1f} MB")
    if len(table):
        table["key"] = table["key"].astype("string").str[:16]
        print(table.to_string(index=False, formatters={"build_s": "{:.1f}".format}))
    return 0


def _evaluate(args) -> int:
    from vitdemo.dataset.imagenet import ImageNetVal
    from vitdemo.engines.artifacts import convert
    from vitdemo.engines.contract import EngineFailure
    from vitdemo.evaluation.diagnosis import diagnose
    from vitdemo.evaluation.published import compare_published
    from vitdemo.evaluation.reference import (
        agreement,
        describe_row,
        evaluate_beside_reference,
        flagperf_row,
        roof_of,
        write_row,
    )
    from vitdemo.machine import describe_machine, machine_record, now
    from vitdemo.models.model import load_model

    start = now()
    data, model = ImageNetVal(args.data), load_model(args.model, args.weights)
    engine = convert(model, args.engine, args.precision, calibration=args.calibration)
    options = dict(device_batch_size=args.device_batch_size, limit=args.limit, out=args.out, resume=args.resume)
    options |= dict(repeat=args.repeat, skip_validation=args.skip_validation)
    options |= dict(replicas=args.replicas, schedule=args.schedule, ray_address=args.ray_address)
    try:
        runs, reference = evaluate_beside_reference(engine, model, data, **options)
    except EngineFailure as failure:
        print(f"vitdemo: {failure}; this run is invalid", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return _stopped(args.out, (args.out / "run.json").exists(), "the same command with --resume goes on")
    e2e_s, evaluation = now() - start, runs[0]
    print(*runs, sep="\n")
    if reference is not None and reference is not evaluation:
        print(f"{agreement(evaluation, reference)}\nreference: {reference}")
    e2e_s = None if args.resume else e2e_s  # of what was done in one go
    row = flagperf_row(runs, reference, e2e_s=e2e_s, roof=roof_of(engine, model, args.device_batch_size))
    write_row(row, evaluation.out)
    print("FlagPerf row:", describe_row(row))
    beside = compare_published(evaluation)
    print(f"{beside}\nmachine: {describe_machine(machine_record())}\nresults: {evaluation.out}")
    if beside.verdict == "below":
        try:
            print(diagnose(engine, model, data))
        except EngineFailure as failure:
            print(f"vitdemo: {failure}; the results stand, the diagnosis does not", file=sys.stderr)
            return 1
    return 0


def _stopped(out: Path, begun: bool, cure: str) -> int:
    """Say what a Ctrl-C left. begun: whether there is something to go on with."""
    print(f"vitdemo: stopped{f'; what was done is in {out}, {cure}' if begun else ''}", file=sys.stderr)
    return 130


def _benchmark(args) -> int:
    from vitdemo.benchmarking.files import read_perf
    from vitdemo.benchmarking.gate import check_baseline, check_overlap, check_share, compare, passes
    from vitdemo.benchmarking.pairs import choose_pairs
    from vitdemo.benchmarking.sweeps import benchmark
    from vitdemo.benchmarking.tables import markdown, summary
    from vitdemo.models.model import load_model

    baseline = read_perf(args.against) if args.against else None
    check_share(args.worse_by)
    if baseline is not None:
        check_baseline(baseline)
        models = [load_model(name, args.weights).info for name in args.models]
        check_overlap(baseline, models, choose_pairs(args.engines), args.device_batch_sizes, args.replicas)
    options = dict(engines=args.engines, device_batch_sizes=args.device_batch_sizes, weights=args.weights)
    options |= dict(replicas=args.replicas, row_budget_s=args.row_budget_s, data=args.data, images=args.images)
    options |= dict(calibration=args.calibration, out=args.out)
    began = time.time()
    try:
        rows = benchmark(args.models, **options)
    except KeyboardInterrupt:
        begun = any(file.stat().st_mtime >= began for file in args.out.glob("perf_*.csv"))
        return _stopped(args.out, begun, "measure the other batch sizes, and vitdemo merge joins both")
    print(markdown(summary(rows)))
    print(f"machine: {rows['machine'].iloc[0]}\nresults: {args.out}")
    if baseline is None:
        return 0
    compared = compare(rows, baseline, args.worse_by)
    print(f"against {args.against}, measured on {baseline['machine'].iloc[0]}:\n{markdown(compared)}")
    if baseline["machine"].iloc[0] != rows["machine"].iloc[0]:
        print("vitdemo: the baseline is of another machine, where ratios may be others", file=sys.stderr)
    return 0 if passes(compared) else 1


def _merge(args) -> int:
    from vitdemo.benchmarking.files import PATTERN, merge
    from vitdemo.benchmarking.tables import laid_out, write_table

    if args.out.match(PATTERN):
        raise VitdemoError(f"{args.out}: a name of {PATTERN} is a sweep's; give the table another, such as perf.csv")
    rows = merge(args.folders)
    write_table(laid_out(rows, args.layout) if args.layout else rows, args.out)
    print(f"{args.out}: {len(rows)} rows of {rows['file'].nunique()} sweeps")
    return 0


def _workshop(args) -> int:
    from vitdemo.course import write_workshop

    copies = write_workshop(args.out)
    print(f"{copies[0].parent}: {len(copies)} notebooks without solutions; open them with: jupyter lab {args.out}")
    return 0


VERBS = {
    "doctor": _doctor,
    "run": _run,
    "extract": _extract,
    "convert": _convert,
    "verify": _verify,
    "cache": _cache,
    "evaluate": _evaluate,
    "benchmark": _benchmark,
    "merge": _merge,
    "workshop": _workshop,
}


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code. Bad input is one line on stderr."""
    args = parser_of(VERBS).parse_args(argv)
    try:
        return args.run(args)
    except VitdemoError as error:
        print(f"vitdemo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("vitdemo: stopped", file=sys.stderr)
        return 130
