from __future__ import annotations

import itertools
import random
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hardware.files import UserError
from runtime.conversion import data
from runtime.conversion.tasks import FAMILIES, SPLITS, answer, check, draw, generate, split_of
from runtime.tokenizer import BOS, EOS, ByteTokenizer

families = st.sampled_from(sorted(FAMILIES))
seeds = st.integers(0, 10**9)
splits = st.sampled_from(SPLITS)


@given(families, seeds, splits)
def test_the_worked_solution_is_accepted_and_every_changed_answer_is_not(family: str, seed: int, split: str) -> None:
    problem = generate(family, seed, split)
    assert problem == generate(family, seed, split)
    assert check(problem, problem.solution)
    assert check(problem, problem.solution + "\n")
    start = problem.solution.rindex("\n= ") + 3
    for place in range(start, len(problem.solution)):
        wrong = "1" if problem.solution[place] != "1" else "2"
        assert not check(problem, problem.solution[:place] + wrong + problem.solution[place + 1 :])
    assert not check(problem, problem.solution[: start - 3])
    assert not check(problem, "")


@given(families, seeds)
def test_the_answer_comes_from_the_prompt_not_from_the_stored_solution(family: str, seed: int) -> None:
    problem = generate(family, seed)
    assert check(replace(problem, solution="nothing"), problem.solution)
    other = generate(family, seed + 1)
    assert check(problem, other.solution) == (answer(problem) == answer(other))


@given(families, seeds, splits)
def test_a_document_is_short_ascii_and_worked_in_lines(family: str, seed: int, split: str) -> None:
    problem = generate(family, seed, split)
    assert (problem.prompt + problem.solution).isascii()
    assert problem.prompt.endswith("\n") and problem.prompt.count("\n") == 1
    assert len(problem.prompt) <= 80
    assert 60 <= len(problem.prompt) + len(problem.solution) <= 220
    assert problem.solution.count("\n") >= 3 and problem.solution.isprintable() is False


@given(families, seeds)
def test_the_worked_lines_are_true(family: str, seed: int) -> None:
    """Every equation written out holds, so the steps can be trusted and not only the last line."""
    seen = 0
    for line in generate(family, seed).solution.split("\n"):
        for sign in re.finditer("(?<=.)=", line):
            left = re.search(r"\d+(?: ?[-+*] ?\d+)+ ?$", line[: sign.start()])
            right = re.match(r" ?(\d+)", line[sign.end() :])
            assert left and right
            value = 0
            for operator, number in re.findall(r"([-+*]?) ?(\d+)", left[0]):
                value = {"-": value - int(number), "*": value * int(number)}.get(operator, value + int(number))
            assert value == int(right[1])
            seen += 1
    assert (seen > 0) == (family in ("addition", "subtraction", "multiplication", "story"))


@given(families, st.lists(seeds, min_size=1, max_size=20))
def test_splits_are_disjoint(family: str, some: list[int]) -> None:
    for split in SPLITS:
        assert {split_of(generate(family, seed, split).prompt) for seed in some} == {split}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_has_thousands_of_problems(family: str) -> None:
    rng = random.Random(0)
    assert len({draw(family, rng).prompt for _ in range(4000)}) > 2500
    assert len({problem.prompt for problem in data.evaluation_problems(family, 300)}) == 300


def test_known_answers() -> None:
    cases = {
        "addition": ("add 427+585\n", "1012"),
        "subtraction": ("sub 500-123\n", "377"),
        "multiplication": ("mul 598*7\n", "4186"),
        "sorting": ("sort 90143\n", "01349"),
        "reversing": ("reverse hozat\n", "tazoh"),
        "uppercase": ("upper linif\n", "LINIF"),
        "counting": ("count a in banaa\n", "3"),
        "binary": ("binary 7ed0\n", "0111 1110 1101 0000"),
        "story": ("Leo has 41 shells, pays 7, gets 2, pays 9. How many?\n", "27 shells"),
        "json": ('{"ju":57,"ya":10,"xi":17} name ya as vu\n', '{"ju":57,"vu":10,"xi":17}'),
    }
    assert set(cases) == set(FAMILIES)
    for family, (prompt, expected) in cases.items():
        problem = replace(generate(family, 0), prompt=prompt)
        assert answer(problem) == expected
        assert check(problem, f"whatever\n= {expected}") and not check(problem, expected)


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"'sums'.*addition"):
        generate("sums", 0)
    with pytest.raises(UserError, match=r"'validation'.*train"):
        generate("addition", 0, "validation")
    with pytest.raises(UserError, match=r"'sums'.*addition"):
        data.training_batches(0, 1, 8, weights={"sums": 1.0})
    with pytest.raises(UserError, match="add one"):
        answer(replace(generate("addition", 0), prompt="add one\n"))


@given(st.integers(0, 1000), st.integers(0, 5))
@settings(max_examples=20, deadline=None)  # the first example reads the source files
def test_a_run_resumes_where_it_stopped(seed: int, step: int) -> None:
    whole = list(itertools.islice(data.training_batches(seed, 3, 96), step + 2))
    resumed = list(itertools.islice(data.training_batches(seed, 3, 96, start_step=step), 2))
    for one, other in zip(whole[step:], resumed, strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
        np.testing.assert_array_equal(one.solutions, other.solutions)
    assert whole[0].tokens.shape == whole[0].solutions.shape == (3, 96) and whole[0].tokens.dtype == np.int64
    assert not np.array_equal(whole[0].tokens, whole[1].tokens)


def test_rows_begin_with_a_document_and_hold_only_training_problems() -> None:
    batches = itertools.islice(data.training_batches(1, 16, 256, task_share=1.0), 40)
    rows = np.concatenate([batch.tokens for batch in batches])
    assert (rows[:, 0] == BOS).all() and (rows >= 0).all() and (rows <= EOS).all()
    for row in rows:
        first = ByteTokenizer().decode(row[1 : list(row).index(EOS)])
        prompt = first.split("\n")[0] + "\n"
        assert split_of(prompt) == "train"


def test_weights_and_share_choose_what_is_trained_on() -> None:
    rows = next(data.training_batches(1, 64, 128, task_share=1.0, weights={"sorting": 1.0})).tokens
    assert all(ByteTokenizer().decode(row).startswith("sort ") for row in rows)
    for row in next(data.training_batches(1, 8, 256, task_share=0.0)).tokens:
        start = ByteTokenizer().decode_bytes(row[1:]).split(b"\n")[0]
        assert b"\n" + start in b"\n" + data.source_text("train")
    batches = itertools.islice(data.training_batches(1, 64, 32, task_share=0.25), 20)
    rows = np.concatenate([batch.tokens for batch in batches])
    begins = tuple(generate(f, 0).prompt.split()[0].encode() for f in FAMILIES if f not in ("story", "json"))
    tasks = sum(ByteTokenizer().decode_bytes(row).startswith(begins) for row in rows) / len(rows)
    assert 0.1 < tasks < 0.3  # 8 of the 10 families are recognised: 0.2 expected
    for bad in ({}, {"sorting": 0.0}, {"sorting": -1.0}):
        with pytest.raises(UserError, match="weights"):
            data.training_batches(1, 1, 8, weights=bad)
    with pytest.raises(UserError, match=r"1\.5"):
        data.training_batches(1, 1, 8, task_share=1.5)


def test_held_out_source_is_a_few_percent_and_prompts_come_from_it() -> None:
    train, test = data.source_text("train"), data.source_text("test")
    assert 0.02 < len(test) / (len(train) + len(test)) < 0.10
    pairs = data.source_prompts(20, 100, seed=3, continuation_bytes=60)
    assert pairs == data.source_prompts(20, 100, seed=3, continuation_bytes=60)
    assert pairs != data.source_prompts(20, 100, seed=4, continuation_bytes=60)
    for prompt, continuation in pairs:
        assert (len(prompt), len(continuation)) == (100, 60)
        assert prompt + continuation in test and prompt + continuation not in train
    with pytest.raises(UserError, match="longest"):
        data.source_prompts(1, 10**8)


def test_excerpts_stay_inside_their_file() -> None:
    source = data._Source(b"ab\ncd\nefgh\n", (6, 11))
    seen = {source.excerpt(random.Random(seed), 4) for seed in range(200)}
    assert seen == {(b"ab\nc", False), (b"cd\n", True), (b"efgh", False)}
