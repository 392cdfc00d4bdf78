"""The step that a GPU would run, seen without one: fake tensors on a device that does not exist, and a list of
launches."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

TORCH = "2.13"  # the version whose private functions are replaced


def why_unavailable() -> str:
    """Why steps cannot be counted here; '' if they can."""
    needed = f"needs the CPU build of torch {TORCH}, whose private functions it replaces"
    try:
        version("triton")
        installed = version("torch")
    except PackageNotFoundError as error:
        return f"{needed}, and triton: {error}"
    is_right = installed.startswith(f"{TORCH}.") and installed.endswith("+cpu")
    return "" if is_right else f"{needed}; this is {installed}"
