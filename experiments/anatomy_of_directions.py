"""What focus directions are made of, and where attention goes under them; beyond the paper.

python experiments/anatomy_of_directions.py --model demo
"""

from focuslens.cli.paper import artefact_main

if __name__ == "__main__":
    artefact_main("anatomy", __doc__)
