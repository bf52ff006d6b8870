"""Figures 2, 5 and 6 and Table 1: which heads read the relevant document, and what they do when the answer is wrong.

python experiments/figure_2_table_1.py --model demo
"""

from focuslens.cli.paper import artefact_main

if __name__ == "__main__":
    artefact_main("heads", __doc__)
