"""Saved tensors leave the device after they were saved and are back when backward needs them.

What happens to a tensor ``t`` that autograd saves inside an offloaded call::

    forward    operator saves t ─ pack ─> D2H copy of t's storage into a slot of the pool;
                                          the device copy is let go of when that is done
    backward   first unpack of a region ─> H2D copies of this region's and the next ones' storages
               unpack of t ─> the storage, arrived ─> a view like t

* One copy of a storage, however many tensors and regions save it and however they view it.
* The graph owns what is away: it dies with the graph, whether backward has run or not.
* No host synchronisation: streams wait for streams. No allocation: buffers are used again.
* Whatever may go wrong (no pinned memory, a full disk, a failed copy) ends in a tensor that stays
  where it was, or in an error; each is said once.

From the bottom up: :mod:`~wrappers.offload.pool` (buffers under a budget),
:mod:`~wrappers.offload.scheduler` (what moves when), :mod:`~wrappers.offload.transfer` (streams and
events; the host tier), :mod:`~wrappers.offload.simulated` (the same without a device),
:mod:`~wrappers.offload.disk` (the disk tier), :mod:`~wrappers.offload.store` (who owns what), and
:mod:`~wrappers.offload.hooks` (pack and unpack).
"""
