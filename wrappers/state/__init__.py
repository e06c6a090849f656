"""State checkpoints of wrapped, sharded models: saved by all ranks, published by one rename.

Problem. A job that is killed while it saves must not lose what it had; a rank that fails while it
saves must not leave the others waiting; a file that was damaged later must not become a model; and
a file from elsewhere must not run code. ``torch.distributed.checkpoint`` knows how to plan, write
and read tensors of sharded models. It leaves these four to its caller.

Idea. Its planners and storage do the work, as steps of our own (:mod:`wrappers.state.faults`), in a
directory that becomes visible when it is complete (:mod:`wrappers.state.files`). One save::

    rank 0, the coordinator                                      rank 1
    -----------------------                                      ------
    check arguments  <============= agree =====================> check arguments
    [1] take the state (an async save copies it to the host and goes on in a thread)
                     <============= agree =====================>
    [2] lock a new directory, remove litter
                     ============== where ======================>
    [3] plan         <============= plans =====================> plan
        write, sync, read back                                   write, sync, read back
                     <============= checksums ==================
    [4] write .metadata, check it and all that others have not checked
    [5] write manifest.json, sync all, rename, sync the folder
                     ============== done =======================>
    [6] remove older ones, if wanted
                     ============== done =======================>

A rank that raises anywhere raises on all ranks: a ``CheckpointException`` whose ``failures`` name
the failing ranks. Before the rename in [5] the folder shows what it showed before; after it, the
new state checkpoint is complete. What a killed job leaves is a hidden directory without a lock,
which the next save into the folder removes.

What is pickled, and why. In the layout ``"dcp"``, which is torch's own, ``.metadata`` is a pickle
of torch's dataclasses, and ``torch.save`` pickles values that are no tensors, and the headers of
tensors. All of it is read by unpicklers that know data types only (:mod:`wrappers.state.pickles`).
What they refuse, ``trust_pickles=True`` lets pass. Tensors are read with ``weights_only=True`` even
then. In the layout ``"safetensors"`` nothing is pickled: tensors are in ``*.safetensors``, the
model's in one file under their plain names, everything else is JSON. Between the ranks of a running
job plans and exceptions travel as pickles, as in all object collectives of torch.
"""

from wrappers.state.api import AsyncSave, async_save, latest, load, save, verify
from wrappers.state.faults import CheckpointException
from wrappers.state.files import StateError

__all__ = [
    "AsyncSave",
    "CheckpointException",
    "StateError",
    "async_save",
    "latest",
    "load",
    "save",
    "verify",
]
