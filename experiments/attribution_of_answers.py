"""Which document an answer came from, by contextual scores; beyond the paper.

python experiments/attribution_of_answers.py --model demo
"""

from focuslens.cli.paper import artefact_main

if __name__ == "__main__":
    artefact_main("attribution", __doc__)
