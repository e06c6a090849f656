"""A memory budget in, the fastest plan out.

    profile(model, sample)     [1] regions, what each can keep, what is alive around them
    make_plan(profile, budget) [2] one option a region, so that every moment fits
    plan.apply(model)          [3] policies by FQN, on REPLAY

[1] What bytes are concerned, nothing is estimated: the engine runs each distinct block on tensors
    without memory, once for each way to treat it, and every storage is followed until it dies
    (``memory``, ``harness``, ``menu``). The whole model runs with stubs in place of its blocks, so
    that depth costs nothing (``step``). Times are measured on the device at hand (``timing``) or
    derived from the description of another one (``hardware``, ``costs``).
[2] A moment's memory is a sum: what lives outside of regions, what the regions before keep, what
    the region that runs needs. So the choice over regions is a problem about prefix sums
    (``chain``), solved with a certificate (``solve``), and checked against HiGHS (``milp``).
[3] A plan is plain data (``plan``): it can be saved, compared, applied on another machine, and
    agreed on by all ranks of a group (``ranks``).

What every step takes is told apart like this, and summed up in ``records``:

    persistent    parameters, gradients, optimizer state: there between steps
    base          what is alive outside of regions, at some moment of the step
    kept          by a region, from the end of its forward to the beginning of its backward
    transient     by the region that runs: its forward, or its recompute and backward
"""
