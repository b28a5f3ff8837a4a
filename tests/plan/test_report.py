"""The start-up report."""

import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from unittest import mock

import pytest

from trb_megatron.plan import report


def test_package_index_apex_is_not_taken_for_nvidias(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert report.installed_version("apex", "apex.multi_tensor_apply") is None
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    with mock.patch.object(report, "version", return_value="0.9.10"):
        assert report.installed_version("apex", "apex.multi_tensor_apply") is None
        (tmp_path / "apex" / "multi_tensor_apply.py").touch()
        sys.path_importer_cache.clear()
        assert report.installed_version("apex", "apex.multi_tensor_apply") == "0.9.10"
    with mock.patch.object(report, "version", side_effect=PackageNotFoundError):
        assert report.installed_version("apex", "apex.multi_tensor_apply") is None
