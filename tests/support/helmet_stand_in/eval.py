"""Evaluation of one task: prompts, responses, metrics, and a result file."""

import json
import os
from typing import Any

from data import load_data
from tqdm import tqdm


def run_test(args: Any, model: Any, dataset: str, test_file: str, demo_file: str) -> str:
    stem = os.path.splitext(os.path.basename(test_file))[0]
    path = os.path.join(args.output_dir, f"{dataset}_{args.tag}_{stem}_in{args.input_max_length}.json")
    if os.path.exists(path) and not args.overwrite:
        return path
    data = load_data(args, dataset, test_file, demo_file)
    inputs = [model.prepare_inputs(data["data"][i], data) for i in tqdm(range(len(data["data"])), desc="inputs")]
    results: list[dict[str, Any]] = []
    metrics: dict[str, list[float]] = {}
    for place, output in enumerate(model.generate_batch(inputs)):
        row = data["data"][place]
        if not args.use_chat_template:
            output["output"] = data["system_template"].format(**row) + output["output"]
        found, others = data["post_process"](output, row)
        output.update({**others, **found})
        for name, value in found.items():
            metrics.setdefault(name, []).append(value)
        results.append({**row, **output})
        results[-1].pop("context")
    means = {name: 100 * sum(values) / len(values) for name, values in metrics.items()}
    content = {"args": vars(args), "data": results, "metrics": metrics, "averaged_metrics": means, "throughput": 0.0}
    with open(path, "w") as file:
        json.dump(content, file)
    with open(path + ".score", "w") as file:
        json.dump(means, file)
    return path
