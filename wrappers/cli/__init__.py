"""``wrappers profile | plan | doctor``, also as ``python -m wrappers``.

    wrappers doctor
    wrappers profile gpt:12x768
    wrappers plan my.module:build_model --sample my.module:batch --budget 40GiB --device H100 \\
        --world-size 8 -o plan.json --plot plan.html

Exit codes: 0 done; 1 a problem was found, or the model failed; 2 the command line cannot be
understood; 3 no plan fits into the budget; 4 something is missing, such as an extra; 5 a defect of
this package; 130 interrupted. With ``--json`` standard output is one JSON object.
"""

from wrappers.cli.entry import main

__all__ = ["main"]
