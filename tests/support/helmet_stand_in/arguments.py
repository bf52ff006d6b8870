"""Command-line options in the way that HELMET parses them: a configuration file sets the defaults."""

import argparse
import ast
import logging
from typing import Any

import yaml

logging.basicConfig(level=logging.INFO)  # importing HELMET changes the logging configuration too


def _truth(text: str) -> bool:
    return bool(ast.literal_eval(text))


def parse_arguments() -> Any:
    parser = argparse.ArgumentParser()
    for name in (
        "config",
        "model_name_or_path",
        "datasets",
        "test_files",
        "demo_files",
        "output_dir",
        "system_message",
    ):
        parser.add_argument(f"--{name}")
    for name in ("use_chat_template", "stop_newline", "do_sample"):
        parser.add_argument(f"--{name}", type=_truth, default=False)
    parser.add_argument("--tag", default="eval")
    parser.add_argument("--input_max_length", default="128")
    parser.add_argument("--generation_max_length", default="4")
    parser.add_argument("--max_test_samples", type=int)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--shots", type=int, default=2)
    parser.add_argument("--num_workers", type=int, default=4)
    parser.add_argument("--overwrite", action="store_true")
    known = parser.parse_args()
    if known.config:
        with open(known.config) as file:
            parser.set_defaults(**yaml.safe_load(file))
    return parser.parse_args()
