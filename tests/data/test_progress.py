"""A bar for each stage; not a word where there is nothing to do."""

from dsv3.data.progress import progress_bars


def test_each_stage_has_its_bar(capsys):
    with progress_bars() as progress:
        progress("reading the corpus", 10, None)
        progress("making tokens", 5, 10)
        progress("making tokens", 10, 10)
    shown = capsys.readouterr().out
    assert "reading the corpus" in shown
    assert "making tokens" in shown


def test_nothing_to_do_shows_nothing(capsys):
    with progress_bars():
        pass
    assert capsys.readouterr().out == ""
