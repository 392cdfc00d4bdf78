"""trainer.py: a preview that cannot be made is a line, and not the end of a run."""

from __future__ import annotations

import pytest
import torch
from small_run import run, small, write_images

from sra_fast.errors import Refused


@pytest.mark.parametrize("trouble", [Refused("nothing finite"), torch.OutOfMemoryError("no memory\nTried to allocate")])
def test_a_preview_that_cannot_be_drawn_does_not_end_the_run(tmp_path, monkeypatch, capfd, trouble):
    def fail(*_, **__):
        raise trouble

    write_images(tmp_path / "data")
    monkeypatch.setattr("sra_fast.training.validation.generate", fail)
    code, rows = run(small(tmp_path))
    assert (code, len(rows)) == (0, 10)
    assert f"no preview: {str(trouble).splitlines()[0]}\n" in capfd.readouterr().err


def test_samples_that_are_not_finite_cost_the_preview_alone(tmp_path, monkeypatch, capfd):
    write_images(tmp_path / "data")
    monkeypatch.setattr("sra_fast.training.validation.generate", lambda *_, **__: torch.full((4, 1, 8, 8), torch.nan))
    assert run(small(tmp_path))[0] == 0
    assert "no preview: " in capfd.readouterr().err
