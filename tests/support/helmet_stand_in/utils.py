"""A metric: the fraction of answers that the response contains."""


def holds(said: str, answers: list[str]) -> float:
    return sum(answer in said for answer in answers) / len(answers)
