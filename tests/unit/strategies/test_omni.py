import pytest

from omnilit.strategies import OmniStrategy


def test_storage_options_that_nobody_reads_are_refused(tmp_path):
    with pytest.raises(TypeError, match="storage_options are SaveOptions, not dict"):
        OmniStrategy().save_checkpoint({}, tmp_path / "a", storage_options={"a": 1})
    assert not list(tmp_path.iterdir())
