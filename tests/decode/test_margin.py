"""The margin rule excuses what rounding decided, and nothing else."""

import pytest
import torch

import std_decode
from tests.decode.margin import MARGIN, behind_best, near_ties

PROMPT, END, PAD = 2, 9, 0
TEXT = torch.tensor([[5, 5, 1, 2, 3, 4], [6, 6, 1, 9, 0, 0]])  # the second row ends with a 9


def judge(got, lag=0.0, expected=TEXT, only_row=None, **options):
    """`near_ties` where every other token was `lag` behind; in `only_row`, others infinitely."""

    def behind(step):
        lags = torch.full((len(expected), 10), lag)
        if only_row is not None:
            lags[torch.arange(len(expected)) != only_row] = float("inf")
        return lags.scatter(1, expected[:, PROMPT + step, None], 0.0)

    got = torch.tensor(got)
    return near_ties(expected, got, PROMPT, behind, **{"ends": [END], "pad": PAD, **options})


def unused(step):
    raise AssertionError("nothing differs, there is nothing to ask")


def test_equal_tokens_are_equal():
    assert near_ties(TEXT, TEXT.clone(), PROMPT, unused) == set()


def test_a_near_tie_is_excused_and_counted():
    got = [[5, 5, 1, 7, 3, 4], [6, 6, 8, 9, 0, 0]]
    assert judge(got, 0.9 * MARGIN) == {(0, 1), (1, 0)}


@pytest.mark.parametrize("lag", [1.01 * MARGIN, 0.01, float("inf"), float("nan")])
def test_another_token_with_a_margin_fails(lag):
    with pytest.raises(AssertionError, match="row 0, step 1: token 7, not 2, which is behind by"):
        judge([[5, 5, 1, 7, 3, 4], [6, 6, 1, 9, 0, 0]], lag)


def test_a_near_tie_of_two_tokens_does_not_excuse_a_third():
    def behind(step):
        lags = torch.full((2, 10), 5.0)
        lags[:, [2, 7]] = 0.0
        return lags

    right, wrong = TEXT.clone(), TEXT.clone()
    right[0, 3], wrong[0, 3] = 7, 8
    assert near_ties(TEXT, right, PROMPT, behind) == {(0, 1)}
    with pytest.raises(AssertionError, match="token 8, not 2"):
        near_ties(TEXT, wrong, PROMPT, behind)


@pytest.mark.parametrize("tied", [0, 1])
def test_a_near_tie_of_one_row_does_not_excuse_another(tied):
    """Be it the earlier of the two, or the later."""
    got = [[5, 5, 1, 7, 3, 4], [6, 6, 8, 9, 0, 0]]
    with pytest.raises(AssertionError, match=f"row {1 - tied}, .* behind by inf"):
        judge(got, only_row=tied)


def test_nothing_is_judged_after_a_near_tie_of_the_same_row():
    def behind(step):
        assert step == 0, "the rows had different texts before them by then"
        return torch.zeros(2, 10)

    got = torch.tensor([[5, 5, 8, 8, 8, 8], [6, 6, 1, 9, 0, 0]])
    assert near_ties(TEXT, got, PROMPT, behind, ends=[END], pad=PAD) == {(0, 0)}


def test_a_model_that_chose_otherwise_is_no_judge():
    """With the wrong options, the seed of another case: its margins say nothing."""
    got = TEXT.clone()
    got[0, 3] = 7
    lags = torch.zeros(2, 10)
    lags[0, 2] = 1.0
    with pytest.raises(AssertionError, match="2 was not the choice"):
        near_ties(TEXT, got, PROMPT, lambda step: lags)


@pytest.mark.parametrize(
    ("got", "words"),
    [
        ([[5, 7, 1, 2, 3, 4], [6, 6, 1, 9, 0, 0]], "row 0, .*in the prompt"),
        ([[5, 5, 1, 2, 3, 4], [6, 6, 1, 9, 3, 0]], "row 1, step 2: .*after the row's end"),
        ([[5, 5, 1, 2, 3, 4]], "1 rows, expected 2"),
    ],
)
def test_what_no_margin_excuses(got, words):
    with pytest.raises(AssertionError, match=words):
        judge(got)


@pytest.mark.parametrize(
    ("got", "words"),
    [
        ([[5, 5, 1, 2, 3], [6, 6, 1, 9, 0]], "5, expected 6; row 0 did not end"),
        ([[5, 5, 1, 2, 3, 4, 4], [6, 6, 1, 9, 0, 0, 0]], "7, expected 6; row 0 did not end"),
        # Row 1 went its own way, which is no reason for row 0 to lose its last token.
        ([[5, 5, 1, 2, 3], [6, 6, 8, 9, 0]], "5, expected 6; row 0 did not end"),
        # Row 0 did, so row 1 may come to be longer, but by padding only.
        ([[5, 5, 1, 7, 3, 4, 4], [6, 6, 1, 9, 0, 0, 4]], "7, expected 6; row 1 did not end"),
    ],
)
def test_a_length_that_no_near_tie_explains_fails(got, words):
    with pytest.raises(AssertionError, match=words):
        judge(got)


def test_a_row_that_did_not_end_does_not_go_on_as_padding():
    unended = torch.tensor([[5, 5, 1, 2, 3, 4], [6, 6, 1, 2, 3, 4]])
    with pytest.raises(AssertionError, match="row 1 did not end"):
        judge([[5, 5, 1, 7, 3, 4, 4], [6, 6, 1, 2, 3, 4, 0]], expected=unended)


def test_padding_alone_is_a_wrong_length():
    ended = torch.tensor([[5, 5, 9], [6, 6, 9]])
    with pytest.raises(AssertionError, match="lengths differ: 4, expected 3"):
        judge([[5, 5, 9, 0], [6, 6, 9, 0]], expected=ended)


@pytest.mark.parametrize(
    "got",
    [
        [[5, 5, 1, 7, 9], [6, 6, 1, 9, 0]],
        [[5, 5, 1, 7, 3, 3, 9], [6, 6, 1, 9, 0, 0, 0]],
    ],
    ids=["shorter", "longer"],
)
def test_a_row_after_a_near_tie_may_end_elsewhere(got):
    assert judge(got, 0.5 * MARGIN) == {(0, 1)}
    with pytest.raises(AssertionError, match="row 0, step 1"):
        judge(got, 2 * MARGIN)


def test_noise_makes_near_ties_and_breaks_them():
    scores = torch.tensor([[0.5, 0.25, 0.25], [0.5, 0.25, 0.25]]).log()
    noise = torch.tensor([[2.0, 1.0, 3.0], [3.0, 1.0, 1.5]])
    plain, sampled = behind_best(scores), behind_best(scores, noise)
    assert plain[0, 1] > 0.5 and sampled[0, 1] < MARGIN
    assert sampled[1, 1] == 0 and sampled[1, 2] > 0.4 and sampled[1, 0] > 0.4


def twin(case, gap, step, row=0, **options):
    """Make some token almost as good as the one chosen at a step.

    Returns:
        The unpatched model's tokens, and these with the twin token in that place and others after.
    """
    expected = case.generate(**options)
    column = case.inputs["input_ids"].shape[1] + step
    chosen = int(expected[row, column])
    assert chosen not in expected[row, :column]
    spare = next(t for t in range(7, 99) if t not in expected)
    with torch.no_grad():
        weight = case.model.lm_head.weight
        weight[spare] = weight[chosen] * (1 - gap)
    expected = case.generate(**options)  # sampling sees other probabilities now
    got = expected.clone()
    assert got[row, column] == chosen
    got[row, column] = spare
    got[row, column + 1 :] = spare
    return expected, got


def test_a_model_with_two_best_tokens(make_case):
    case = make_case("llama", 0, rows=3)
    expected, got = twin(case, 1e-7, step=4, row=1)
    assert case.assert_same_tokens(expected, got) == {(1, 4)}
    wrong = got.clone()
    wrong[2, -1] = 7
    with pytest.raises(AssertionError, match="row 2, step 15"):
        case.assert_same_tokens(expected, wrong)


def test_a_model_with_one_best_token(make_case):
    case = make_case("llama", 0, rows=3)
    expected, got = twin(case, 1e-3, step=4, row=1)
    with pytest.raises(AssertionError, match="row 1, step 4"):
        case.assert_same_tokens(expected, got)


def test_equal_probabilities_are_no_tie_when_sampling(make_case):
    case = make_case("llama", 0, rows=3)
    expected, got = twin(case, 1e-7, step=4, row=1, do_sample=True)
    with pytest.raises(AssertionError, match="row 1, step 4"):
        case.assert_same_tokens(expected, got, do_sample=True)


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(repetition_penalty=1.5),
        dict(do_sample=True),
        dict(do_sample=True, temperature=2.0, top_k=20),
    ],
    ids=lambda options: "+".join(options) or "greedy",
)
def test_margins_are_those_of_the_choices_made(make_case, options):
    """Processed scores, less the noise of the very step and row."""
    case = make_case("qwen2_vl", 0, rows=3, **options)
    expected = case.generate()[:, case.inputs["input_ids"].shape[1] :]
    behind = case.behind()
    for step in range(expected.shape[1]):
        assert behind(step).argmin(dim=-1).tolist() == expected[:, step].tolist()


def test_a_patched_model_is_no_judge(make_case):
    case = make_case("llama")
    expected = case.generate()
    with std_decode.patched(case.model), pytest.raises(AssertionError, match="its own judge"):
        case.assert_same_tokens(expected, expected.flip(1))
