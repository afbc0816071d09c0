"""Files that are shared with others, and those that only look like ours."""

import os
import stat

from flip_hf.console.files import share_weights


def test_weights_get_the_permissions_of_new_files_and_links_lead_nowhere(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    own = folder / "model.safetensors"
    other = tmp_path / "other.safetensors"
    for path in (own, other):
        path.touch()
        path.chmod(0o600)
    (folder / "linked.safetensors").symlink_to(other)
    before = os.umask(0o027)
    try:
        share_weights(folder)
        assert os.umask(0o027) == 0o027  # it is as it was
    finally:
        os.umask(before)
    assert stat.S_IMODE(own.stat().st_mode) == 0o640
    assert stat.S_IMODE(other.stat().st_mode) == 0o600
