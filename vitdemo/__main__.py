"""``python -m vitdemo``, the same as the command ``vitdemo``."""

import sys

from vitdemo.cli import main

sys.exit(main())
