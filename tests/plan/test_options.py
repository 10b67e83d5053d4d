"""What a GPU is said to be is a number that one may have."""

from __future__ import annotations

import pytest

from laid_ds import cli


@pytest.mark.parametrize("option", ["--gpu-memory=inf", "--gpu-memory=nan", "--peak-tflops=inf", "--peak-tflops=nan"])
def test_a_gpu_without_bounds_is_refused_by_name(capsys, option):
    with pytest.raises(SystemExit) as status:
        cli.main(["plan", "recipes/demo.toml", option])
    assert status.value.code == 2
    error = capsys.readouterr().err
    assert f"invalid value for '{option.partition('=')[0]}'" in error
    assert "Traceback" not in error
