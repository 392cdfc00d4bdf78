"""What a run says before it begins."""

from __future__ import annotations

import pytest
from small_run import small, write_images

from sra_fast.kernels import library
from sra_fast.training.trainer import Trainer


@pytest.fixture
def root(tmp_path):
    write_images(tmp_path / "data")
    return tmp_path


def said(root) -> str:
    lines = []
    Trainer(small(root, train__images=8), lines.append).run()
    return "\n".join(lines)


def test_the_start_says_what_is_used(root):
    text = said(root)
    assert "58 training and 22 held-out images, 4 classes; decoded by pillow" in text
    assert "sra from block 1 to block 2, cosine distance" in text
    assert "cpu, fp32" in text
    assert all(f"{op}: reference" in text for op in ("adaln", "gated_adaln", "gated_residual", "alignment", "perturb"))


def test_missing_operators_are_said_with_the_cure(root, monkeypatch):
    monkeypatch.setattr(
        library, "why_unavailable", lambda on_gpu=False: "the compiled operators are not built (install cmake)"
    )
    text = said(root)
    assert "gradient_norm: reference, adamw_ema: reference" in text
    assert "the optimizer runs as PyTorch operators: the compiled operators are not built (install cmake)" in text


@pytest.mark.skipif(bool(library.why_unavailable()), reason="the compiled operators are not built")
def test_built_operators_are_used_and_nothing_is_said_of_them(root):
    text = said(root)
    assert "gradient_norm: fused, adamw_ema: fused" in text
    assert "PyTorch operators" not in text
