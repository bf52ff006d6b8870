"""A metric: does the response hold the answer?"""


def holds(said: str, answers: list[str]) -> float:
    return sum(answer in said for answer in answers) / len(answers)
