"""The challenge's normalisation and accuracy by hand, the other two accuracies, and errors."""

import pytest

from mplug_jax.evaluation import vqa

# Raw, after the punctuation, after the articles: as the official `vqaEval.py` has them.
OFFICIAL = [
    ("The two dogs.", "The two dogs", "2 dogs"),
    ("isnt it", "isnt it", "isn't it"),
    ("10,000", "10000", "10000"),
    ("black, and white", "black and white", "black and white"),
    ("none", "none", "0"),
    ("a/b", "a b", "b"),
    ("3.5", "3.5", "3.5"),
    ("dont know", "dont know", "don't know"),
    ("U.S.A.", "USA", "usa"),
    ("yes!", "yes ", "yes"),
]

# Worked out by hand from the rules.
BY_HAND = {
    "": "",
    "  A   dog \n": "dog",
    "t-shirt": "t shirt",  # between letters a mark becomes a space
    "t- shirt": "t shirt",  # beside a space it vanishes
    "x-ray - no": "xray no",  # and then wherever it stands
    "1,000-2,000": "10002000",  # a number with a comma makes every mark vanish
    "red,white": "red white",
    "it's 5:30": "it's 5:30",  # apostrophe and colon stay
    "v1.5.": "v1.5",  # a period before a digit stays
    ".5 mph.": ".5 mph",
    "Zero": "0",
    "eleven": "eleven",
    "ten a the an": "10",
    "hell": "hell",  # no "he'll" among the contractions
    "shed": "shed",
    "yall'll": "y'all'll",
    "couldntve": "couldntve",  # one apostrophe is put back, not two
    "somebody'd": "somebodyd",
    "(yes)": "yes",
    "[a] {cat}": "cat",
    "$5 & 10%": "$5 & 10%",
}


@pytest.mark.parametrize(("raw", "stripped", "final"), OFFICIAL)
def test_official_steps(raw, stripped, final):
    assert vqa.strip_punctuation(raw) == stripped
    assert vqa.strip_articles(stripped) == final
    assert vqa.normalize_answer(raw) == final


@pytest.mark.parametrize("raw", BY_HAND)
def test_normalisation_by_hand(raw):
    assert vqa.normalize_answer(raw) == BY_HAND[raw]


def test_only_the_first_32_periods_go():
    assert vqa.normalize_answer("a." * 40) == "a" * 32 + "a." * 8


@pytest.mark.parametrize(
    ("matches", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)]
)
def test_ten_people(matches, expected):
    """With 3 of 10: leaving one of the 3 out gives 2/3, one of the others 1: (3*2/3 + 7) / 10."""
    truths = ["yes"] * matches + [f"no {i}" for i in range(10 - matches)]
    assert vqa.question_accuracy("yes", truths) == pytest.approx(expected)


def test_normalisation_is_for_questions_that_people_differ_on():
    differ, agree = ["Two.", "2", "the two", *["many"] * 7], ["two"] * 10
    assert vqa.question_accuracy("two!", differ) == pytest.approx(0.9)
    assert vqa.question_accuracy("two", agree) == 1.0
    assert vqa.question_accuracy(" two\n", agree) == 1.0
    assert vqa.question_accuracy("2", agree) == 0.0
    # They differ in spelling alone: then both sides are normalised.
    assert vqa.question_accuracy("2", ["two"] * 9 + ["Two"]) == 1.0


def test_accuracy_of_a_set_and_of_its_kinds():
    truths = {1: ["yes"] * 10, 2: ["red"] * 2 + ["blue"] * 8, "q": ["3"] * 10}
    kinds = {1: "yes/no", 2: "other", "q": "number", 99: "other"}
    metrics = vqa.vqa_accuracy({"q": "4", 2: "red", 1: "yes"}, truths, kinds)
    assert metrics == pytest.approx(
        {
            "vqa_accuracy": 100 * 1.6 / 3,
            "vqa_accuracy_yes_no": 100.0,
            "vqa_accuracy_other": 60.0,
            "vqa_accuracy_number": 0.0,
        }
    )
    assert vqa.vqa_accuracy({1: "no"}, {1: ["yes", "no"]}) == pytest.approx(
        {"vqa_accuracy": 100 * (0 + 1 / 3) / 2}
    )


def test_exact_match():
    truths = {1: "dog", 2: ["garbage bin", "bin"], 3: "a cat"}
    assert vqa.exact_match({3: "cat", 1: "dog", 2: "bin"}, truths) == pytest.approx(
        {"exact_match": 200 / 3}
    )
    # A text is one answer, not the letters or parts of one.
    assert vqa.exact_match({1: "do"}, {1: "dog"}) == {"exact_match": 0.0}


def test_soft_labels():
    labels = {1: {"yes": 1.0, "no": 0.3}, 2: {"red": 0.6}, 3: {}}
    answers = {1: "no", 2: "red", 3: "what"}
    assert vqa.soft_label_accuracy(answers, labels) == pytest.approx({"soft_accuracy": 30.0})


def test_unusable_answers_raise():
    with pytest.raises(ValueError, match=r"question 7: .*exact_match"):
        vqa.vqa_accuracy({7: "x"}, {7: ["x"]})
    with pytest.raises(ValueError, match="1 questions have no type, the first is 7"):
        vqa.vqa_accuracy({7: "x"}, {7: ["x", "y"]}, {8: "other"})
    for metric in (vqa.vqa_accuracy, vqa.exact_match, vqa.soft_label_accuracy):
        with pytest.raises(ValueError, match=r"1 answer \(5\) of unknown id"):
            metric({5: "x"}, {7: ["x", "y"]})
        with pytest.raises(ValueError, match=r"1 answer \(7\) missing"):
            metric({}, {7: ["x", "y"]})
