"""FSDP's gradients, added over the ranks of a node: sent as computed, summed in float32."""

import torch
import torch.distributed as dist
from torch import Tensor


class GradientExchange:
    """Takes the place of reduce-scatter in FSDP (`FSDPModule.set_custom_reduce_scatter`).

    To add bfloat16 gradients in float32, FSDP makes them float32 and sends these. Here each rank
    sends every other one its part of them as they are (all-to-all), and each adds what it received
    in float32: the same sums, with half as many bytes to write, and to send. Across nodes a ring of
    reduce-scatter, which passes on sums, sends less.
    """

    def __init__(self, dtype: torch.dtype, compiles: bool) -> None:
        """dtype: that of the gradients. compiles: whether the addition is to be one kernel."""
        self.dtype = dtype
        self.average = average
        if compiles:
            self.average = torch.compile(average, dynamic=False, fullgraph=True)
        self.is_to_send = False

    def allocate(self, size: tuple[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """FSDP asks in turn for what is to send and for the result, both of the type dtype."""
        self.is_to_send = not self.is_to_send
        return torch.empty(size, dtype=self.dtype if self.is_to_send else dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: dist.ReduceOp,
        async_op: bool = False,
    ) -> None:
        """input_tensor: [ranks x n], a part for each; output_tensor: [n], the average of mine.

        Raises ValueError for a sum or another factor, which FSDP does not ask for by itself.
        """
        if op != dist.ReduceOp.AVG:
            raise ValueError(f"GradientExchange averages gradients; FSDP asked for {op}")
        received = torch.empty_like(input_tensor)
        dist.all_to_all_single(received, input_tensor, group=group)
        self.average(received.view(group.size(), -1), output_tensor)


def average(parts: Tensor, out: Tensor) -> None:
    """parts: [ranks, n]; out: [n], in whose type they are added."""
    torch.mean(parts, dim=0, dtype=out.dtype, out=out)
