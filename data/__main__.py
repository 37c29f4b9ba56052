"""`python -m data prepare|verify`."""

import sys

from .prepare import main

main(sys.argv[1:])
