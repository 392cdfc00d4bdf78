"""Options of the commands other than train."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import tyro

from sra_fast.config.checks import Section
from sra_fast.config.run import Config, EvaluateConfig, SampleConfig


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


@dataclass(frozen=True)
class ProfileConfig(Section):
    """Which steps are traced, what is recorded of them, and where it goes."""

    section: ClassVar[str] = "profile"

    steps: int = 5
    """Steps that the figures are of. Two more are traced, one before and one after them."""
    warmup: int = 3
    """Steps before anything is traced: compilation, autotuning and the allocator's growth belong there."""
    out: str = "profile"
    """Folder for profile.json and the traces; `tensorboard --logdir FOLDER` shows them."""
    top: int = 20
    """Kernels to list."""
    nvtx: bool = False
    """Write nothing, but run the steps with NVTX ranges between cudaProfilerStart and cudaProfilerStop, for
    `nsys profile --capture-range=cudaProfilerApi --cuda-graph-trace=node sra-fast profile ... --profile.nvtx`."""
    shapes: bool = False
    """Record the shapes of every op's inputs."""
    stack: bool = False
    """Record the Python stack of every op. Large and slow."""
    memory: bool = False
    """Record every allocation, for the plugin's memory view."""

    def check(self) -> None:
        self.need_positive("steps", "warmup", "top")
        self.need(self.out != "", "out", "must be a folder")


@dataclass(frozen=True)
class InspectCommand:
    """Look at a data set: counts, classes, statistics and some images; and read all of it, for damage."""

    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """A packed set, the public code's moments, or a folder of class folders."""
    out: str = ""
    """PNG of some images; empty = inspect-<name>.png beside the set."""
    json: Annotated[str, tyro.conf.arg(metavar="FILE")] = ""
    """Write all that is found as one JSON object, for programs. A set that is refused leaves the file as it was."""
    checksums: bool = True
    """Read every file and compare its checksum; where there are none, look whether it is whole."""
    vae: str = ""
    """VAE for the images: a folder, or an id on the Hugging Face hub; empty = the one that the set names."""
    rows: int = 1024
    """Rows of the statistics, spread evenly; 128 images of a folder at most."""
    images: int = 36
    """Images on the PNG, spread evenly over the classes; 0 = no PNG."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Of the VAE; auto = the GPU where there is one."""


@dataclass(frozen=True)
class SampleCommand:
    """Generate images and write them as a PNG grid, one PNG each, and the .npz that the ADM evaluation suite reads; or
    the latents they are decoded from."""

    weights: str
    """A run, one of its checkpoints, a .safetensors or a public .pt file."""
    weights_key: Literal["ema", "model"] = "ema"
    """The EMA, or the raw weights."""
    out: str = "generated"
    """Folder for grid.png, images/ and samples.npz, or latents.npz."""
    classes: tuple[int, ...] = ()
    """Classes to generate, in turn; empty = all."""
    grid: int = 100
    """Images in the grid; 0 = no grid."""
    images: bool = True
    """Write one PNG per image."""
    npz: bool = True
    """Write samples.npz: arr_0, uint8 (N, H, W, 3); one channel is repeated to three."""
    latents: bool = False
    """Write latents.npz instead: z, float32 (N, C, h, w), what the VAE decodes, and labels, int64 (N,). A run's weights
    need no VAE for this, others --vae. --grid, --images and --npz are then without effect."""
    path: Literal["", "linear", "cosine"] = ""
    """Interpolant a sit was trained with; empty = as the weights say, linear where they do not."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto = the GPU where there is one."""
    vae: str = ""
    """VAE of the latents that the weights make: a folder, or an id on the Hugging Face hub. Empty = the one that the
    run's data name. Of weights that are not a run's, the VAE's own scale and shift are taken."""
    tf32: bool = True
    """On a GPU, multiply matrices in TF32, as the published samplers do; without, in full fp32."""
    sample: SampleConfig = field(default_factory=SampleConfig)
    """A run's own settings are the default here."""


@dataclass(frozen=True)
class EvaluateCommand:
    """Judge a run's samples against its real images; fails below the bars."""

    weights: str
    """A run."""
    weights_key: Literal["ema", "model"] = "ema"
    """The EMA, or the raw weights."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto = the GPU where there is one."""
    sample: SampleConfig = field(default_factory=SampleConfig)
    """A run's own settings are the default here."""
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    """A run's own settings are the default here."""


@dataclass(frozen=True)
class ExportCommand:
    """Write a run's newest weights for other programs."""

    weights: str
    """A run, or one of its checkpoints."""
    out: str
    """File to write: .safetensors (one set of weights) or .pt (both sets, in the public SiT-SRA and DiT-SRA layout)."""
    weights_key: Literal["ema", "model"] = "ema"
    """Which set goes into a .safetensors file."""


@dataclass(frozen=True)
class ProfileCommand:
    """Trace some steps of a run on random images, and say where their time goes."""

    config: Annotated[Config, tyro.conf.arg(name="")]  # its options are named as those of train
    profile: ProfileConfig = field(default_factory=ProfileConfig)
