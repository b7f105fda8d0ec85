"""What the process that forks the workers runs first, and nobody else: torch is imported once for all of them."""

import os

os.setpgrp()  # Ctrl-C and Ctrl-Z are for the one who started it
os.environ["OPENBLAS_NUM_THREADS"] = "1"  # with threads it could not be forked safely, and no engine uses OpenBLAS's

import vitdemo.benchmarking.bench  # noqa: E402, F401
import vitdemo.evaluation.evaluation  # noqa: E402, F401
