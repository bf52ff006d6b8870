"""Figure 9: contextual heads against the retrieval heads of Wu et al. (2024).

python experiments/figure_9.py --model demo
"""

from focuslens.cli.paper import artefact_main

if __name__ == "__main__":
    artefact_main("retrieval", __doc__)
