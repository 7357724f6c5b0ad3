"""Parameters that FSDP2 (``fully_shard``) has dealt out to the processes, whole for a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule


@contextmanager
def unsharded(module: nn.Module) -> Iterator[None]:
    """Give every process the whole parameters inside the block.

    Otherwise each forward and backward pass gathers them, so that processes that look at different
    numbers of batches would wait for each other. It has to be entered by all processes, and costs
    each the memory of a whole model. Modules without ``fully_shard`` are left alone.

    Args:
        module: The model, some of whose submodules may be sharded.
    """
    parts = [part for part in module.modules() if isinstance(part, FSDPModule)]
    before = [
        (group, group.post_forward_mesh_info, group.reshard_after_backward)
        for part in parts
        for group in _groups(part)
    ]
    try:
        for part in parts:
            part.unshard()
            part.set_reshard_after_forward(False, recurse=False)
            part.set_reshard_after_backward(False, recurse=False)
        yield
    finally:
        for group, mesh, after_backward in before:
            group.post_forward_mesh_info, group.reshard_after_backward = mesh, after_backward
        for part in parts:
            part.reshard()


def _groups(part: FSDPModule) -> list[Any]:
    """Torch's records of what is sharded how; it tells them by no public name."""
    state = part._get_fsdp_state()
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    # In older versions of torch, such as 2.8, there is one at most.
    return [state._fsdp_param_group] if state._fsdp_param_group else []
