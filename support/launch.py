"""torchrun, except that an error of `exit_with` is not followed by its report: for run.sh."""

import logging
import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

from .process import ERROR_CODE

if __name__ == "__main__":
    # It logs how each worker ended, which its report repeats.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    try:
        main()
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        if failure.exitcode != ERROR_CODE:
            raise
        sys.exit(ERROR_CODE)
