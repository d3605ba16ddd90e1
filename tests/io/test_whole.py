"""Files that are replaced when the new ones are complete."""

import pytest

from aigc_fast.io._whole import written_whole


def test_what_a_link_leads_to_is_replaced(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    file, link = tmp_path / "elsewhere" / "there.txt", tmp_path / "here.txt"
    file.write_text("old")
    link.symlink_to(file)
    with written_whole(link) as partial:
        partial.write_text("new")
    assert link.is_symlink() and file.read_text() == "new"


@pytest.mark.parametrize("path", ["none/out.txt", "file/out.txt", "folder.txt"])
def test_a_file_that_cannot_be_written_is_named(tmp_path, path):
    (tmp_path / "file").touch()
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(OSError, match=f"'{tmp_path / path}'$"), written_whole(tmp_path / path):
        pass
    assert not [p for p in tmp_path.rglob("*") if "partial" in p.name]


def test_an_error_without_a_number_names_the_file(tmp_path):
    path = tmp_path / "out.txt"
    with pytest.raises(OSError, match="out.txt: encoder error -2"), written_whole(path):
        raise OSError("encoder error -2")  # as Pillow has them


def test_an_error_of_another_file_is_left(tmp_path):
    with pytest.raises(FileNotFoundError, match="other.txt"), written_whole(tmp_path / "out.txt"):
        (tmp_path / "other.txt").read_text()
