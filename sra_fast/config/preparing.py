"""How images become a packed set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from sra_fast.config.checks import Section


@dataclass(frozen=True)
class PrepareConfig(Section):
    """Encode images once, into the packed set that training reads. Killed at any moment, the same command goes on; any
    number of processes may share the work, on one machine or under torchrun on many."""

    section: ClassVar[str] = ""

    out: str
    """Folder of the packed set."""
    images: str = ""
    """Folder of class folders, or of webdataset .tar files, or a glob of those in quotes."""
    from_public: str = ""
    """Instead of images: the public SiT-SRA layout to convert, a folder with vae-sd/dataset.json. It says its own
    resolution."""
    vae: str = ""
    """diffusers' AutoencoderKL or AutoencoderTiny: a folder, an id on the Hugging Face hub, or owner/name/subfolder.
    With from-public the one that made it, for scale, shift and previews; without, Stable Diffusion's scale is taken."""
    no_vae: bool = False
    """Pack pixels (uint8) instead of latents."""
    resolution: int = 256
    """Side in pixels after the ADM center crop."""
    flips: bool = False
    """Also encode every image mirrored; twice the time and space."""
    batch: int = 64
    """Images per call of the VAE on a GPU, and per call of the decoder."""
    rows_per_shard: int = 4096
    """Images that a shard is made of."""
    strict: bool = False
    """Stop at the first undecodable image instead of naming it in the manifest and leaving it out."""
    verify: bool = False
    """Of a set that is complete already, compare all checksums too, and make damaged files again; missing or truncated
    ones are made again in any case."""
    exif: bool = False
    """Turn images as their EXIF orientation says (ADM does not)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto = the GPU where there is one."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Compute type of the VAE; auto = bf16 on GPUs that have it, fp32 elsewhere."""
    reader: Literal["auto", "dali", "pillow"] = "auto"
    """Who decodes: auto takes DALI where it is installed and Pillow elsewhere."""

    def check(self) -> None:
        self.need_positive("resolution", "batch", "rows_per_shard")
        self.need(self.out != "", "out", "must be a folder")
        self.need(
            (self.images == "") != (self.from_public == ""),
            "images",
            "must be given unless from-public is, and only then",
        )
        if self.images:
            self.need(self.no_vae == (self.vae == ""), "vae", "must be given unless no-vae is, and only then")
        else:
            self.need(not self.no_vae, "no_vae", "must not be given with from-public, which is encoded")
            self.need(not self.flips, "flips", "cannot be made from-public: they need the images")
