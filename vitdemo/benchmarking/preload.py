"""Imported only by the process that forks the workers, so that torch is imported once for all of them."""

import os

os.setpgrp()  # only the process that started this one receives Ctrl-C and Ctrl-Z
os.environ["OPENBLAS_NUM_THREADS"] = "1"  # forking is not safe with threads, and no engine uses OpenBLAS's threads

import vitdemo.benchmarking.bench  # noqa: E402, F401
import vitdemo.evaluation.evaluation  # noqa: E402, F401
