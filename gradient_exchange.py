"""FSDP's gradients, added over the ranks of a node: sent as computed, summed in float32."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule


def exchange_gradients(model: nn.Module, dtype: torch.dtype, compiles: bool) -> None:
    """Gives every FSDP group of the model a `GradientExchange` in place of its reduce-scatter."""
    exchange = GradientExchange(dtype, compiles)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_custom_reduce_scatter(exchange)


class GradientExchange:
    """Takes the place of reduce-scatter in FSDP (`FSDPModule.set_custom_reduce_scatter`).

    To add bfloat16 gradients in float32, FSDP makes them float32 and sends these. Here each rank
    sends every other one its part of them as they are (all-to-all), and each adds what it received
    in float32: the same sums, to the bit of two ranks, with half the bytes to copy in and to send.
    For one node: between nodes each rank's part would cross the network, of which reduce-scatter
    sends one sum per node.

    Not together with `set_requires_gradient_sync(False)`: what FSDP then keeps over several
    backward passes is float32, and would be rounded without a word to be sent.
    """

    def __init__(self, dtype: torch.dtype, compiles: bool) -> None:
        """dtype: that of the gradients. compiles: the addition by torch.compile, 1.5 times as fast
        on an H100; each size of a group gets its own code (`torch._dynamo.config.recompile_limit`).
        """
        self.dtype = dtype
        self.average = average
        if compiles:
            self.average = torch.compile(average, dynamic=False, fullgraph=True)
        self.was_to_send = False

    def allocate(self, size: tuple[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """FSDP asks first for what it sends, then for the result, and wants both in dtype, which is
        float32; what it sends gets the gradients' own.
        """
        self.was_to_send = not self.was_to_send
        return torch.empty(size, dtype=self.dtype if self.was_to_send else dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: dist.ReduceOp,
        async_op: bool = False,
    ) -> None:
        """input_tensor: [ranks x n], a part for each; output_tensor: [n], the average of mine.

        Raises ValueError for a sum or another factor, and for tensors in the wrong order, after
        an error between the two.
        """
        if op != dist.ReduceOp.AVG or input_tensor.dtype != self.dtype:
            raise ValueError(
                f"GradientExchange averages {self.dtype}; FSDP gave {op} and {input_tensor.dtype}"
            )
        received = torch.empty_like(input_tensor)
        dist.all_to_all_single(received, input_tensor, group=group)
        self.average(received.view(group.size(), -1), output_tensor)


def average(parts: Tensor, out: Tensor) -> None:
    """parts: [ranks, n]; out: [n], in whose type they are added."""
    torch.mean(parts, dim=0, dtype=out.dtype, out=out)
