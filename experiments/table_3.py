"""Table 3: contextual scores under focus directions.

python experiments/table_3.py --model demo
"""

from focuslens.cli.paper import artefact_main

if __name__ == "__main__":
    artefact_main("steered_scores", __doc__)
