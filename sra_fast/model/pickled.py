"""Reads .pt checkpoints that nobody vouches for: no code runs, and a small file costs little time and memory.

torch.save writes a zip archive that is not compressed: a pickle, data.pkl, and the bytes of each tensor. A compressed
member, or one that is larger than the archive, is therefore none of its making.
"""

from __future__ import annotations

import os
import pickle
import re
import struct
import zipfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from sra_fast.errors import Damaged, is_out_of_memory
from sra_fast.files import open_regular

LARGEST_PICKLE = 4 << 20  # bytes; that of SiT-XL with its optimizer takes a tenth
# What torch.load raises on truncated files and on files of other kinds.
DAMAGE = (RuntimeError, EOFError, ValueError, LookupError, AttributeError, TypeError, OSError, struct.error)


def read_pickle(path: Path) -> Any:
    """The content of a .pt file, with tensors on the CPU. Only tensors and argparse.Namespace are unpickled.

    Raises:
        Damaged: if it is no complete archive of torch.save, or would run code.
    """
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            _check_archive(path, file)
            with torch.serialization.safe_globals([Namespace]):
                return torch.load(file, map_location="cpu", weights_only=True)
    except Damaged:
        raise
    except pickle.UnpicklingError as error:
        call = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it would call {call[1]}" if call else "it is not a checkpoint"
        raise Damaged(path, f"not unpickled: {reason}; only tensors and argparse.Namespace are read") from error
    except (*DAMAGE, zipfile.BadZipFile, RecursionError) as error:
        if is_out_of_memory(error):
            raise
        reason = (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]
        raise Damaged(path, f"not a complete PyTorch checkpoint ({reason})") from error


def _check_archive(path: Path, file: Any) -> None:
    """Raise Damaged or BadZipFile unless the file is an archive as torch.save writes it; rewinds the file."""
    size = os.fstat(file.fileno()).st_size
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED or member.file_size > size:
            raise Damaged(path, f"not written by torch.save: {member.filename} is compressed")
        if member.filename.endswith(".pkl") and member.file_size > LARGEST_PICKLE:
            raise Damaged(path, f"{member.filename} has {member.file_size:,} bytes, more than {LARGEST_PICKLE:,}")
    if sum(member.file_size for member in members) > size:
        raise Damaged(path, "not written by torch.save: its members overlap")
    file.seek(0)
