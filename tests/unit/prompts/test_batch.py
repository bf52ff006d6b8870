"""Left padding, and the columns of each prompt's parts in a batch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from focuslens import Cursor, EncodedPrompt, PromptBatch


def encoded(*tokens: int, **spans: tuple[tuple[int, int], ...]) -> EncodedPrompt:
    return EncodedPrompt(torch.tensor(tokens, dtype=torch.long), spans)


SHORT = encoded(11, 12, relevant=((0, 1),), irrelevant=())
LONG = encoded(21, 22, 23, 24, 25, relevant=((1, 3), (4, 5)), irrelevant=((3, 4),))


def test_prompts_are_padded_on_the_left() -> None:
    batch = PromptBatch.of([SHORT, LONG])
    assert (len(batch), batch.width, batch.padding) == (2, 5, (3, 0))
    assert batch.tokens(pad_token=9).tolist() == [[9, 9, 9, 11, 12], [21, 22, 23, 24, 25]]
    assert batch.mask().tolist() == [[0, 0, 0, 1, 1], [1, 1, 1, 1, 1]]


@pytest.mark.parametrize(
    ("span", "n_keys", "expected"),
    [
        ("relevant", 5, ["00010", "01101"]),
        ("relevant", 7, ["0001000", "0110100"]),
        ("irrelevant", 5, ["00000", "00010"]),
        ((0, 2), 6, ["000110", "110000"]),
        ((1, 2), 5, ["00001", "01000"]),
        ("relevant", 4, ["0001", "0110"]),  # a chunk of the prompt that ends with column 3
    ],
)
def test_columns_of_a_part_move_with_the_padding(span: str | tuple[int, int], n_keys: int, expected: list[str]) -> None:
    columns = PromptBatch.of([SHORT, LONG]).columns(span, n_keys)
    assert ["".join(str(int(column)) for column in row) for row in columns] == expected


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.integers(0, 3), st.data())
def test_columns_select_the_tokens_of_the_span(lengths: list[int], more: int, data: st.DataObject) -> None:
    prompts: list[EncodedPrompt] = []
    for place, length in enumerate(lengths):
        start = data.draw(st.integers(0, length - 1))
        end = data.draw(st.integers(start + 1, length))
        prompts.append(encoded(*(100 * place + i for i in range(length)), part=((start, end),)))
    batch = PromptBatch.of(prompts)
    tokens = torch.nn.functional.pad(batch.tokens(-1), (0, more), value=-2)
    columns = batch.columns("part", batch.width + more)
    for row, mask, prompt in zip(tokens, columns, prompts, strict=True):
        ((start, end),) = prompt.spans["part"]
        assert row[mask].tolist() == prompt.tokens[start:end].tolist()


def test_the_last_prompt_token_produces_the_response() -> None:
    batch = PromptBatch.of([SHORT, LONG])
    # The response starts at the row of column 4. That is row 4 of rows from column 0, and row 1 of rows from column 3.
    # All rows from column 4 on belong to the response.
    assert [batch.first_response_row(start) for start in (0, 3, 4, 5, 9)] == [4, 1, 0, 0, 0]


@pytest.mark.parametrize(("start", "n_rows", "first"), [(0, 5, 4), (0, 3, 4), (2, 3, 2), (4, 1, 0), (6, 1, 0)])
def test_a_cursor_that_was_set_says_where_the_rows_begin(start: int, n_rows: int, first: int) -> None:
    assert Cursor(start).first_response_row(PromptBatch.of([SHORT, LONG]), n_rows) == first


@pytest.mark.parametrize(("n_rows", "first"), [(5, 4), (8, 4), (4, 0), (1, 0)])
def test_a_cursor_infers_a_prompt_from_its_length(n_rows: int, first: int) -> None:
    assert Cursor().first_response_row(PromptBatch.of([SHORT, LONG]), n_rows) == first
    assert Cursor().first_response_row(PromptBatch.of([encoded(1)]), 1) == 0


def test_a_span_is_resolved_by_name_or_range() -> None:
    assert LONG.resolve("relevant") == ((1, 3), (4, 5))
    assert LONG.resolve((0, 5)) == ((0, 5),)


@pytest.mark.parametrize("span", [(0, 6), (2, 2), (3, 1), (-1, 2)])
def test_a_range_outside_the_prompt_is_refused(span: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=rf"span \({span[0]}, {span[1]}\) does not lie in a prompt of 5 tokens"):
        LONG.resolve(span)
    with pytest.raises(ValueError, match="does not lie in a prompt of 2 tokens"):
        PromptBatch.of([LONG, SHORT]).columns((1, 3), 5)


def test_an_unknown_part_is_refused_with_those_there_are() -> None:
    with pytest.raises(KeyError, match=r"no span 'gold'; it has \['irrelevant', 'relevant'\]"):
        LONG.resolve("gold")
    with pytest.raises(KeyError, match=r"a plain text and has no span 'gold'; give sample.prompt\("):
        encoded(1).resolve("gold")


def test_a_batch_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one prompt"):
        PromptBatch.of([])
    with pytest.raises(ValueError, match="no tokens"):
        PromptBatch.of([SHORT, encoded()])
