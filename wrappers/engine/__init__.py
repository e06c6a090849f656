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

REPLAY executes recorded operators instead of the function, under the same rules:

* Rules 1, 2 and 6 hold as they are. Held inputs and kept outputs go through autograd's SavedTensor
  where a region surrounds this one, so it hides them.
* Rule 3 does not apply, as no user code runs and no region is met. It does apply to the rerun that
  a first replay is compared with, and to a region that has fallen back.
* Rule 4: a tensor that has been unpacked is gone, and a second backward replays again. Kept outputs
  belong to the slots that depend on them, and die with these.
* Rule 5 is exact: what runs is what living empty slots need, wherever in the function it stands.
* Rule 7: a replay pushes no hooks and no module state; what it does push (grad mode, kernel
  choice, random states, :func:`is_recomputing`) it pops.

Files, each importing only those above it: ``ambient`` and ``module_state`` (what a recompute
must see again), ``verify`` (did it do the same), ``selective`` (the context_fn pair), ``region``
(settings), ``frame`` (one forward execution), ``holders`` (what keeps a tensor until backward),
``rerun`` and ``reentrant`` (two implementations), ``witness`` (is a replay right), ``operators``
(what an operator does to memory), ``record`` (the operators of a forward), ``replay`` (the third
implementation), ``api`` (what users call).
"""
