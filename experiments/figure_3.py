"""Figure 3: accuracy when the attention of contextual and of random heads is turned up or down.

python experiments/figure_3.py --model demo
"""

from focuslens.cli.paper import artefact_main

if __name__ == "__main__":
    artefact_main("split_softmax", __doc__)
