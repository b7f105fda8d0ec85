"""``vitdemo …``: a thin door to the library's verbs. Exit codes: 0 done, 1 a check failed, 2 bad input."""

import argparse
import sys

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
    from vitdemo.dataset.extraction import extract

    extract(args.archives, args.out, unverified=args.unverified)
    return 0


def _evaluate(args) -> int:
    from vitdemo.conversion.artifacts import convert
    from vitdemo.conversion.engines.contract import EngineFailure
    from vitdemo.conversion.models import load_model
    from vitdemo.dataset.imagenet import ImageNetVal
    from vitdemo.inference.evaluation import evaluate
    from vitdemo.measure.clock import describe_machine, machine_record

    data = ImageNetVal(args.data)
    engine = convert(load_model(args.model, args.weights), args.engine, args.precision)
    options = dict(device_batch_size=args.device_batch_size, limit=args.limit, out=args.out, resume=args.resume)
    try:
        evaluation = evaluate(engine, data, **options)
    except EngineFailure as failure:
        print(f"vitdemo: {failure}; this run is invalid", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            f"vitdemo: stopped; what was done is in {args.out}, the same command with --resume goes on", file=sys.stderr
        )
        return 130
    print(f"{evaluation}\nmachine: {describe_machine(machine_record())}\nresults: {evaluation.out}")
    return 0


class _OneLineParser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"vitdemo: {message}; see `{self.prog} --help`\n")


def _parser() -> argparse.ArgumentParser:
    parser = _OneLineParser(prog="vitdemo", description="A Vision Transformer from images to verified inference.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        return sub

    command("doctor", _doctor, "what is installed, what each notebook needs, what will be skipped and why")

    run = command("run", _run, "execute notebooks headlessly and write an HTML report")
    run.add_argument("names", nargs="*", metavar="NAME", help="notebooks, e.g. 00_tour or 00; all by default")
    run.add_argument("--profile", default="bundled", help="smoke (a few images), bundled (the default) or imagenet")
    run.add_argument("--imagenet", metavar="DIR", help="where ImageNet lies, for --profile imagenet")
    set_help = "set a parameter; a relative path is relative to notebooks/"
    run.add_argument("-p", dest="parameter", action="append", default=[], metavar="NAME=VALUE", help=set_help)
    run.add_argument("--out", metavar="DIR", help="a new folder for the report; runs/<time> by default")

    extract = command("extract", _extract, "verify the ILSVRC2012 archives and extract val/<wnid>/")
    extract.add_argument("--archives", required=True, metavar="DIR", help="the folder of the val tar and the devkit")
    extract.add_argument(
        "--out", required=True, metavar="DIR", help="where val/ and classes.csv go; the same to resume"
    )
    extract.add_argument("--unverified", action="store_true", help="take archives whose MD5 is unknown or another")

    evaluate = command("evaluate", _evaluate, "run a model over a data set: accuracy and speed")
    evaluate.add_argument("model", metavar="MODEL", help="vit_shapes20, a full timm tag, or a folder")
    evaluate.add_argument("--data", required=True, metavar="PATH", help="a val tar, a folder of archives, or val/")
    evaluate.add_argument("--engine", default="eager")
    evaluate.add_argument("--precision", default="fp32")
    evaluate.add_argument("--device-batch-size", type=int, default=8, metavar="B")
    evaluate.add_argument("--limit", type=int, metavar="N", help="only the first N images")
    evaluate.add_argument("--weights", default="pretrained", metavar="W", help="pretrained, random, or a file")
    evaluate.add_argument("--resume", action="store_true", help="go on with an interrupted run in --out")
    evaluate.add_argument("--out", required=True, metavar="DIR", help="a new folder for the results")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code. Bad input is one line on stderr."""
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except VitdemoError as error:
        print(f"vitdemo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("vitdemo: stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
