"""Figures 4, 7 and 8: accuracy under focus directions.

python experiments/figure_4.py --model demo
"""

from focuslens.cli.paper import artefact_main

if __name__ == "__main__":
    artefact_main("steering", __doc__)
