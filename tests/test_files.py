"""Files that are never half there."""

import errno
import re

import pytest
from etils import epath

from halonet import files


def test_the_old_file_stays_where_there_is_no_room(tmp_path, monkeypatch):
    path = epath.Path(tmp_path) / "row.json"
    files.write_whole(path, "old")

    def full(self, text):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(type(path), "write_text", full)
        message = (
            rf"^{re.escape(str(path))} cannot be written: No space left on device; [\d.]+ GB are"
        )
        with pytest.raises(files.WriteError, match=message) as info:
            files.write_whole(path, "new")
    assert info.value.exit_code == 7
    assert [it.name for it in tmp_path.iterdir()] == ["row.json"]
    assert path.read_text() == "old"


def test_room_of_a_folder_that_is_not_there_yet(tmp_path):
    assert files.room(tmp_path / "not" / "yet") == files.room(tmp_path)
    assert files.room("gs://bucket/run") == "how much is free there is not known"


@pytest.mark.parametrize("path", ["s3://bucket/run", "nowhere://run"])
def test_what_cannot_be_reached_is_one_line(path):
    with pytest.raises(files.UnreachableError) as info:
        files.check_reachable("--workdir", path)
    assert re.fullmatch(
        rf"--workdir={path} cannot be reached \(.+\); a folder .* use it", str(info.value)
    )
    assert info.value.exit_code == 4


def test_folders_of_this_machine_are_reached(tmp_path):
    files.check_reachable("--workdir", tmp_path / "not" / "yet")
