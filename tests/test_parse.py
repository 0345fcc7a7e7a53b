"""Replies and the answers that a person reads in them."""

import pytest

from kallm.data.bbh import TASKS, BBHItem, load_bbh
from kallm.evaluate.parse import is_correct, parse_answer

SHAPES = "This draws a\nOptions:\n(A) circle\n(B) hexagon\n(C) nine\n(D) ninety"
SORTING = "Sort the following words alphabetically: List: pear o'connell at&t apple"
CLOSING = "Complete the rest of the sequence. Input: [ { ("


def make_item(task: str, question: str, answer: str, options: tuple[str, ...] = ()) -> BBHItem:
    return BBHItem(f"{task}/0", task, question, answer, options or TASKS[task].options, TASKS[task].form)


LETTERED = make_item("geometric_shapes", SHAPES, "(B)", ("(A)", "(B)", "(C)", "(D)"))


def read(reply: str, item: BBHItem) -> str | None:
    return parse_answer(reply, item)[0]


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("(B)", "(B)"),
        ("( b )", "(B)"),
        ("B", "(B)"),
        ("b.", "(B)"),
        ("B) because it is not (A)", "(B)"),
        ("B. hexagon", "(B)"),
        ("**B**", "(B)"),
        ('"A"', "(A)"),
        ("A\nIt is round.", "(A)"),
        ("C because I say so", "(C)"),
        ("A man draws (C)", "(C)"),
        ("The answer is B", "(B)"),
        ("The answer is A because it is round", "(A)"),
        ("The answer is A circle", "(A)"),
        ("Comparing (A) with (C), the answer is (D).", "(D)"),
        ("Answer: (C)", "(C)"),
        ("The correct option is B.", "(B)"),
        ("I choose option d", "(D)"),
        ("It draws a Hexagon.", "(B)"),
        ('The shape is "circle", not a hexagon', "(A)"),
        ("ninety", "(D)"),
        ("ninetynine", None),
        ("(E)", None),
        ("Z", None),
        ("I do not know.", None),
        ("A picture with edges", None),
        ("(E) or (B)", "(B)"),
    ],
)
def test_lettered_answers_are_read(reply: str, expected: str | None) -> None:
    assert read(reply, LETTERED) == expected


@pytest.mark.parametrize(
    ("task", "reply", "expected"),
    [
        ("boolean_expressions", "True", "True"),
        ("boolean_expressions", "It is FALSE.", "False"),
        ("boolean_expressions", "True and True, so the answer is False", "False"),
        ("boolean_expressions", "Truely", None),
        ("formal_fallacies", "The argument is invalid.", "invalid"),
        ("formal_fallacies", "The argument is not deductively valid.", "invalid"),
        ("formal_fallacies", "deductively valid", "valid"),
        ("sports_understanding", "Yes, it is.", "yes"),
        ("web_of_lies", "no", "No"),
        ("web_of_lies", "nobody knows", None),
    ],
)
def test_words_are_read_in_the_official_spelling(task: str, reply: str, expected: str | None) -> None:
    assert read(reply, make_item(task, "?", "?")) == expected


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("12", "12"),
        ("-5", "-5"),
        ("−5", "-5"),
        ("minus five", "-5"),
        ("negative 12.0", "-12"),
        ("1,234.", "1234"),
        ("007", "7"),
        ("3.50", "3.5"),
        ("-0", "0"),
        ("Twenty-three fruits", "23"),
        ("You have eighteen.", "18"),
        ("One of them is 4", "4"),
        ("2 apples and 3 pears, so the answer is 5", "5"),
        ("- 5 apples", "5"),
        ("3 * 4 = 12", "12"),
        ("5-3 = two", "2"),
        ("the 3rd", None),
        ("many", None),
    ],
)
def test_numbers_are_read_from_digits_and_words(reply: str, expected: str | None) -> None:
    assert read(reply, make_item("multistep_arithmetic_two", "?", "0")) == expected


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (") } ]", ") } ]"),
        (")}]", ") } ]"),
        ("The rest is: `) } ]`.", ") } ]"),
        ("[ { ( ) } ]", ") } ]"),
        ("[ { (", None),
        ("), }, ]", ") } ]"),
        ("nothing", None),
    ],
)
def test_brackets_are_read_without_the_given_sequence(reply: str, expected: str | None) -> None:
    assert read(reply, make_item("dyck_languages", CLOSING, ") } ]")) == expected


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("apple at&t o'connell pear", "apple at&t o'connell pear"),
        ("Apple, at&t, O'Connell, pear.", "apple at&t o'connell pear"),
        ("1. apple\n2. at&t\n3. o'connell\n4. pear", "apple at&t o'connell pear"),
        ("pear o'connell at&t apple sorted: apple at&t o'connell pear", "apple at&t o'connell pear"),
        ("apple pear", "apple pear"),
        ("banana", None),
    ],
)
def test_word_lists_are_read_in_the_order_of_the_reply(reply: str, expected: str | None) -> None:
    assert read(reply, make_item("word_sorting", SORTING, "apple at&t o'connell pear")) == expected


def test_every_exemplar_answer_is_read_as_itself() -> None:
    for item in load_bbh("exemplars", subset="all")[0]:
        for reply in (item.answer, f"The answer is {item.answer}.", f" {item.answer}\n"):
            parsed, status = parse_answer(reply, item)
            assert (parsed, status) == (item.answer, "parsed")
            assert is_correct(parsed, item)


@pytest.mark.parametrize("reply", ["", " \n"])
def test_empty_reply_is_never_right(reply: str) -> None:
    for item in load_bbh("exemplars", subset="all")[0]:
        parsed, status = parse_answer(reply, item)
        assert (parsed, status) == (None, "empty")
        assert not is_correct(parsed, item)


def published(reply: str, item: BBHItem) -> bool:
    parsed, _ = parse_answer(reply, item, normaliser="published")
    return is_correct(parsed, item, normaliser="published")


def test_published_rule_counts_an_empty_reply_as_the_first_option() -> None:
    items = load_bbh("exemplars", subset="all")[0]
    right = {item.answer for item in items if published("", item)}
    assert right == {item.answer for item in items if item.answer == "(A)" or item.form == "brackets"}


def test_published_rule_compares_whole_replies() -> None:
    assert published("The (B)!", LETTERED)
    assert published("b", LETTERED)
    assert not published("The answer is (B)", LETTERED)


def test_answer_outside_the_options_has_no_right_reply() -> None:
    outside = make_item("ruin_names", SHAPES, "dearth, wind, & fire", LETTERED.options)
    assert not is_correct("dearth, wind, & fire", outside)
    assert not is_correct("dearth wind fire", outside, normaliser="published")
