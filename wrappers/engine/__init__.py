"""The shared core recompute engine: it knows functions and tensors.

[Note: the rules of recomputation]

Autograd saves tensors in forward and reads them in backward. A *region* is a call whose
saved tensors are not kept but recomputed. Two axioms fix what that means when regions nest:

    A. What a region saves is the region's business alone.
    B. What a region needs to recompute is saved by whoever surrounds it.

    outer region                       saved by the outer region:   a, and x (input of inner)
      a = f(w)                         saved by the inner region:   b
      x = g(a)                         to read b in backward:
      inner region(x)                    inner asks for x           (rule 2)
        b = h(x)                         outer reruns f, g          (rule 3)
        y = k(b)                         inner reruns h             (rule 5: not k)

From A:
    1. A saved tensor belongs to the innermost region that was active when autograd saved it.
       Surrounding regions do not see it.
From B:
    2. The inputs of a region are saved tensors of the region around it, or of the plain graph.
       They go through autograd's own SavedTensor, so they are hidden by the surrounding region,
       checked for changes in place, and freed with the graph, keyword arguments included.
From both, as a recompute is an execution of its own:
    3. A recompute starts as if no region were active. Regions that it meets count again.
For memory:
    4. A recomputed tensor lives until it is unpacked, also with ``retain_graph=True``; a second
       backward recomputes again. What backward never unpacks dies with the graph.
    5. A recompute ends once the last slot that is alive and empty has been filled. Where the last
       operator with a gradient saves its output, that is the end of the function.
For user code:
    6. Backward inside a region works, in its forward and in its recompute. Slots that such a
       backward has freed are skipped later; gradients it adds to parameters are added once, if
       the parameters are those of the region's module and it reads a saved tensor of the region.
    7. Region, recompute and backward may each raise. Whatever was pushed (hooks, modes, random
       states, autocast, module state) is popped, the original exception reaches the user, and
       the next step runs as if nothing had happened.

Files, each importing only those above it: ``ambient`` and ``module_state`` (what a recompute
must see again), ``verify`` (did it do the same), ``region`` (settings), ``frame`` (one
forward execution), ``rerun`` and ``reentrant`` (the two implementations), ``selective`` (the
context_fn pair), ``api`` (what users call).
"""
