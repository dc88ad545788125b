"""`gateway.__main__`: what is wrong with arguments before any command looks at them."""

from __future__ import annotations

import pytest

from gateway.__main__ import main


@pytest.mark.parametrize("arguments", [["keys", "revoke", "\udcff"], ["usage", "--key", "\udcff"]])
def test_arguments_that_are_no_text_are_told(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """A byte of no letter in a shell is a sentence and 64."""
    assert main(arguments) == 64
    assert capsys.readouterr().err == "firsttoken: the arguments are not all UTF-8\n"


def test_a_key_does_not_expire_in_the_past(capsys: pytest.CaptureFixture[str]) -> None:
    """What is said of it is said of the option."""
    with pytest.raises(SystemExit):
        main(["keys", "create", "--name", "app", "--expires", "2020-01-01"])
    assert "argument --expires: '2020-01-01' has begun already, UTC" in capsys.readouterr().err


def test_a_fault_of_a_question_names_the_option(capsys: pytest.CaptureFixture[str]) -> None:
    """The admin API's fields are called otherwise."""
    asked = ("usage", "--by", "nope", "--from", "2027-02-01", "--to", "2027-01-01")
    assert main(asked) == 64
    assert capsys.readouterr().err == (
        "firsttoken: That can't be answered: `--from` must not be after `--to`; "
        "`--by` must be some of day, key, endpoint, model, each once.\n"
    )
