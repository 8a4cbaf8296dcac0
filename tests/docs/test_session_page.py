"""The diagrams in the documentation are those of the tables."""

from __future__ import annotations

from pathlib import Path

import pytest

from understudy.session import TABLES, PrimaryState, SecondaryState
from understudy.session.__main__ import main
from understudy.session.diagram import draw, insert

PAGE = Path(__file__).parents[2] / "docs" / "explanation" / "session.md"


def test_the_page_is_not_stale() -> None:
    page = PAGE.read_text()
    assert page == insert(page, TABLES), "run: python -m understudy.session --write"


def test_every_state_is_drawn() -> None:
    drawn = draw(TABLES)
    for state in (*PrimaryState, *SecondaryState):
        assert f"--> {state.value}" in drawn
    assert "<lambda>" not in drawn
    assert "holds" not in {cell.strip() for line in drawn.splitlines() for cell in line.split("|")}


def test_a_page_without_its_marks_is_refused() -> None:
    with pytest.raises(ValueError, match="no place"):
        insert("# Page\n", TABLES)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert capsys.readouterr().out == draw(TABLES)
    assert main(["--help"]) == 2
    page = tmp_path / "page.md"
    page.write_text(PAGE.read_text().replace("-->", "-->", 1))
    assert main(["--write", str(page)]) == 0
    assert page.read_text() == PAGE.read_text()
