"""Preparation of a sample's input: apply the template, and truncate the context until prompt and response fit."""

from typing import Any


class HFModel:
    def __init__(self, *_: Any, **__: Any) -> None:
        raise AssertionError("a model of the benchmark's own is never opened")

    def prepare_inputs(self: Any, item: dict[str, Any], data: dict[str, Any]) -> Any:
        def read() -> Any:
            if not self.use_chat_template:
                return self.tokenizer([data["prompt_template"].format(**item)], return_tensors="pt")
            turns = [{"role": "user", "content": data["user_template"].format(**item)}]
            text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            return self.tokenizer([text], return_tensors="pt", add_special_tokens=False)

        inputs = read()
        over = inputs.input_ids.shape[1] - (self.max_length - self.generation_max_length)
        if over > 0:
            offsets = self.tokenizer([item["context"]], return_offsets_mapping=True)["offset_mapping"][0]
            item["context"] = item["context"][: offsets[-over][0]]
            inputs = read()
        return inputs
