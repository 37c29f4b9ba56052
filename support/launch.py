"""torchrun, except that an error of `exit_with` is not followed by its report: for run.sh."""

import logging
import signal
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

from .process import ERROR_CODE

if __name__ == "__main__":
    # They log how each worker ended, and its error file; the report repeats both.
    for name in ("api", "errors.error_handler"):
        logger = logging.getLogger(f"torch.distributed.elastic.multiprocessing.{name}")
        logger.setLevel(logging.CRITICAL)
    # `run.sh` sends these to the workers. If a scheduler also sends them here, they change nothing.
    for number in (signal.SIGUSR1, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda *_: None)
    try:
        main()
    except SignalException as error:
        sys.exit(128 + error.sigval)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        if failure.exitcode != ERROR_CODE:
            raise
        if failure.local_rank > 0:  # `exit_with` prints that of the node's first rank
            if isinstance(failure.message, str):  # it could not write its sentence into a file
                raise
            print(failure.message["message"], file=sys.stderr)
        sys.exit(ERROR_CODE)
