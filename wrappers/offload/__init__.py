"""Saved tensors leave the device after they were saved and come back when backward needs them.

What happens to a tensor that autograd saves inside an offloaded call:

    forward:   operator saves t ── pack ──> host copy of t's storage      (device copy may die)
    backward:  host copy ── unpack ──> new device storage ──> a view like t

* One host copy for a storage, however many tensors save it and however they view it.
* Whatever the graph keeps, owns the host copy: it dies with the graph, never by a global.
* Parameters and their views, small tensors and tensors that the host holds anyway stay.

Copies run on the current stream. The copy to the host blocks the calling thread; the copy back
does not.
"""
