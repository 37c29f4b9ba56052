"""torchrun, except that an error of `exit_with` is not followed by its report: for run.sh."""

import logging
import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

from .process import ERROR_CODE

if __name__ == "__main__":
    # They log how each worker ended, and its error file; the report repeats both.
    for name in ("api", "errors.error_handler"):
        logger = logging.getLogger(f"torch.distributed.elastic.multiprocessing.{name}")
        logger.setLevel(logging.CRITICAL)
    try:
        main()
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        if failure.exitcode != ERROR_CODE:
            raise
        if failure.local_rank > 0:  # `exit_with` prints that of the node's first rank
            if isinstance(failure.message, str):  # it could not write its sentence into a file
                raise
            print(failure.message["message"], file=sys.stderr)
        sys.exit(ERROR_CODE)
