"""The processes that train one cell together, as ``accelerate launch`` or ``torchrun`` starts them; mostly it is one.

Of accelerate, its process group and its operations serve. Its wrapped model, optimiser and accumulation do not: they
divide a loss by the number of passes and processes where ours is divided by the supervised tokens of the whole batch,
their gradient buckets double the gradients' memory, and they rename what a checkpoint holds.
"""

from datetime import timedelta
from functools import cache
from typing import Any, cast

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import reduce

from kallm.errors import WrongConfiguration

__all__ = ["Workers"]

_PATIENCE = timedelta(days=30)
"""How long the others wait for the main process, which may be evaluating."""


class Workers:
    """This process and those beside it; alone, nothing is sent and no bit changes."""

    def __init__(self) -> None:
        self._state = PartialState(cpu=not torch.cuda.is_available())
        self.num: int = self._state.num_processes
        self.rank: int = self._state.process_index
        self.device: torch.device = self._state.device
        if self.num > 1:
            _patient_group()  # all processes make it at the same moment

    @property
    def is_main(self) -> bool:
        """Whether this process writes what all of them made."""
        return self.rank == 0

    def check(self, batch: int) -> None:
        """Refuse more processes than a batch has rows.

        Raises:
            WrongConfiguration: some process would have nothing to do.
        """
        if self.num > batch:
            raise WrongConfiguration(
                f"{self.num} processes cannot share a batch of {batch} rows: "
                f"start at most {batch}, or raise train.batch"
            )

    def share(self, batch: list[int]) -> list[int]:
        """Return this process's rows of a batch; in an epoch's last batch there may be none."""
        return batch[self.rank :: self.num]

    def sum_gradients_(self, parameters: list[torch.nn.Parameter]) -> None:
        """Replace every gradient by the sum over all processes; one that is missing counts as zeros."""
        if self.num == 1:
            return
        for parameter in parameters:
            own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = reduce(own, "sum")

    def sum_value(self, value: float) -> float:
        """Return a number's sum over all processes."""
        return value if self.num == 1 else float(reduce(torch.tensor([value], device=self.device), "sum"))

    def any_is(self, flag: bool) -> bool:
        """Return whether the flag is set in any process."""
        return self.sum_value(float(flag)) > 0

    def tell(self, value: Any) -> None:
        """Tell the others, who ``hear`` it; called by the main process."""
        if self.num > 1:
            self._send([value])

    def hear(self) -> Any:
        """Wait for what the main process has to tell, and return it."""
        slot = [None]
        self._send(slot)
        return slot[0]

    def _send(self, slot: list[Any]) -> None:
        dist.broadcast_object_list(slot, src=0, group=_patient_group())

    def wait(self) -> None:
        """Wait for all processes."""
        self._state.wait_for_everyone()


@cache
def _patient_group() -> dist.ProcessGroup:
    """Return a group of all processes whose operations do not time out."""
    return cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=_PATIENCE))
