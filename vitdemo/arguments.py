"""The command line: every option of every verb, with its help."""

import argparse
from collections.abc import Callable, Mapping

from vitdemo.paths import user_path

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
    split_help = "async (the default): replicas take what comes next; sync: all do a share of each global batch"
    evaluate.add_argument("--split", default="async", metavar="S", help=split_help)
    evaluate.add_argument("--ray-address", metavar="A", help="a Ray cluster: host:port of its head, or auto")
    evaluate.add_argument("--repeat", type=int, default=1, metavar="N", help="run the engine N times")
    skip_help = "leave out the reference's run, eager fp32, over the same images"
    evaluate.add_argument("--skip-validation", action="store_true", help=skip_help)
    evaluate.add_argument("--resume", action="store_true", help="go on with an interrupted run in --out")
    evaluate.add_argument("--out", required=True, type=user_path, metavar="DIR", help="a new folder for the results")

    benchmark = command("benchmark", "time models in every engine and batch size, by turns")
    benchmark.add_argument("models", nargs="+", metavar="MODEL", help=MODEL_HELP)
    engines_help = "such as openvino,onnx:int8; all there are by default, eager always"
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
    benchmark.add_argument("--resume", action="store_true", help="go on with an interrupted sweep in --out")
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
