"""``vitdemo …``: a thin door to the library's verbs. Exit codes: 0 done, 1 a check failed, 2 bad input."""

import sys
import time
from pathlib import Path

from vitdemo.arguments import parser_of
from vitdemo.errors import VitdemoError

# Each command imports what it needs when it runs, so that --help and a mistyped option answer at once.


def _doctor(args) -> int:
    from vitdemo.doctor import examine

    lines, ok = examine()
    print("\n".join(lines))
    return 0 if ok else 1


def _run(args) -> int:
    from vitdemo.runs import parse_parameter, run_notebooks

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
    from vitdemo.conversion.artifacts import convert
    from vitdemo.conversion.models import load_model

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
    from vitdemo.conversion.artifacts import convert
    from vitdemo.conversion.engines.contract import EngineFailure
    from vitdemo.conversion.models import load_model
    from vitdemo.conversion.verification import verify

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
    from vitdemo.conversion.cache import artifacts_root, cached_artifacts, clear_cache

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
    from vitdemo.conversion.artifacts import convert
    from vitdemo.conversion.engines.contract import EngineFailure
    from vitdemo.conversion.models import load_model
    from vitdemo.dataset.imagenet import ImageNetVal
    from vitdemo.inference.diagnosis import diagnose
    from vitdemo.inference.published import compare_published
    from vitdemo.inference.validation import (
        agreement,
        describe_row,
        evaluate_beside_reference,
        flagperf_row,
        roof_of,
        write_row,
    )
    from vitdemo.measure.clock import describe_machine, machine_record, now

    start = now()
    data, model = ImageNetVal(args.data), load_model(args.model, args.weights)
    engine = convert(model, args.engine, args.precision, calibration=args.calibration)
    options = dict(device_batch_size=args.device_batch_size, limit=args.limit, out=args.out, resume=args.resume)
    options |= dict(repeat=args.repeat, skip_validation=args.skip_validation)
    options |= dict(replicas=args.replicas, split=args.split, ray_address=args.ray_address)
    try:
        runs, reference = evaluate_beside_reference(engine, model, data, **options)
    except EngineFailure as failure:
        print(f"vitdemo: {failure}; this run is invalid", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return _stopped(args.out, (args.out / "run.json").exists())
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


def _stopped(out: Path, begun: bool) -> int:
    """Say what a Ctrl-C left. begun: whether there is something to go on with."""
    left = f"; what was done is in {out}, the same command with --resume goes on" if begun else ""
    print(f"vitdemo: stopped{left}", file=sys.stderr)
    return 130


def _benchmark(args) -> int:
    from vitdemo.benchmarking.files import read_perf
    from vitdemo.benchmarking.gate import check_baseline, check_overlap, check_share, compare, passes
    from vitdemo.benchmarking.pairs import choose_pairs
    from vitdemo.benchmarking.sweeps import benchmark
    from vitdemo.benchmarking.tables import markdown, summary
    from vitdemo.conversion.models import load_model

    baseline = read_perf(args.against) if args.against else None
    check_share(args.worse_by)
    if baseline is not None:
        check_baseline(baseline)
        models = [load_model(name, args.weights).info for name in args.models]
        check_overlap(baseline, models, choose_pairs(args.engines), args.device_batch_sizes, args.replicas)
    options = dict(engines=args.engines, device_batch_sizes=args.device_batch_sizes, weights=args.weights)
    options |= dict(replicas=args.replicas, row_budget_s=args.row_budget_s, data=args.data, images=args.images)
    options |= dict(calibration=args.calibration, out=args.out, resume=args.resume)
    began = time.time()
    try:
        rows = benchmark(args.models, **options)
    except KeyboardInterrupt:
        return _stopped(args.out, any(file.stat().st_mtime >= began for file in args.out.glob("perf_*.json")))
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
    from vitdemo.runs import write_workshop

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
