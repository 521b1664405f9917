"""docs/reliability.md says what is true: every row is there, and every test that it names."""

from reliability_page import PAGE, read_rows, read_tests, with_figures

TEXT = PAGE.read_text("utf-8")
ROWS = read_rows(TEXT)


def test_every_row_of_the_matrix_is_there_once_and_in_order() -> None:
    assert [row.number for row in ROWS] == list(range(1, 101))


def test_every_test_that_is_named_exists() -> None:
    tests = read_tests()
    assert [f"M{row.number}: {test}" for row in ROWS for test in row.tests if test not in tests] == []
    assert TEXT.count("::test_") == sum(len(row.tests) for row in ROWS), "one is named where no row is"


def test_a_row_without_a_test_says_why() -> None:
    unsaid = [f"M{row.number}" for row in ROWS if not row.tests and not row.result.startswith("not covered: ")]
    assert unsaid == []
    assert [f"M{row.number}" for row in ROWS if row.tests and not row.result.startswith("pass")] == []
    assert "TODO" not in TEXT


def test_the_figures_are_those_that_are_stored() -> None:
    """If not, `python -m tests.reliability_page` writes them."""
    assert with_figures(TEXT) == TEXT
