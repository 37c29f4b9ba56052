"""One node of two: `main.main`, and the bytes that its network interface sent up to each step."""

import sys
from pathlib import Path

import torch

import main
from support import metrics
from support.process import end_process

torch.set_num_threads(1)
interface, counts, *arguments = sys.argv[1:]
write = metrics.MetricsWriter.write


def write_and_count(writer: metrics.MetricsWriter, step: metrics.Step, *rest: float | None) -> None:
    write(writer, step, *rest)
    with open(counts, "a") as file:
        file.write(Path(f"/sys/class/net/{interface}/statistics/tx_bytes").read_text())


metrics.MetricsWriter.write = write_and_count
main.main(arguments)
end_process()
