"""The command ``moco-fast convert``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from moco_fast.convert.run import convert
from moco_fast.extras import new_console


@dataclass
class Convert:
    """Write a checkpoint in the layout of another library, exactly, and verify that it loads there.

    Reads official MoCo v1, v2 and v3, this library's, lightly's, solo-learn's, and safetensors of them;
    docs/checkpoints.md says what every target holds and how to load it.

    examples:
      moco-fast convert runs/NAME backbone.pth --to torchvision      the trained encoder, for torchvision
      moco-fast convert vit-s-300ep.pth.tar vit-s.pth --to timm      for timm
      moco-fast convert moco_v2_800ep_pretrain.pth.tar r50.pkl --to detectron2
      moco-fast convert last.ckpt moco.pth.tar --to official --queue-size 65536
                                                                     of lightly, which saves no queue
      moco-fast convert runs/NAME keys.safetensors --to safetensors --encoder k
    """

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="IN")]
    """Run folder or checkpoint."""
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
    """File to write."""
    to: Literal["official", "torchvision", "timm", "detectron2", "lightly", "safetensors"]
    """Whose layout."""
    encoder: Literal["q", "k"] | None = None
    """The trained encoder (q) or its moving average (k); default: q of backbones, both where both fit."""
    arch: str | None = None
    """Backbone, for a file that does not name it rightly."""
    queue_size: int | None = None
    """K of a fresh queue of random keys, for a file that lost its queue, or to continue with another K."""
    trust: bool = False
    """Also read a file that needs more than tensors, as old ones of Lightning do. This runs whatever code the
    file names, with your rights: only for files of people you trust."""
    force: bool = False
    """Replace the file if it exists."""

    def run(self) -> int:
        """Returns the exit status."""
        report = convert(
            self.source, self.out, self.to, encoder=self.encoder, arch=self.arch, queue_size=self.queue_size,
            trust=self.trust, force=self.force,
        )  # fmt: skip
        which = f"encoder {report.encoder}" if report.encoder else "both encoders"
        console = new_console(highlight=False, soft_wrap=True)
        console.print(
            f"{report.out}: {report.layout} -> {self.to}, {report.arch}, {which}, {report.tensors} tensors, "
            f"{report.bytes / 1e6:.1f} MB"
        )
        if report.left_out:
            console.print(f"left out: {', '.join(report.left_out)}")
        if report.lacks:
            console.print(
                f"lacks {' and '.join(report.lacks)}: to --resume from it, remove the lines that load this "
                "from main_moco.py"
            )
        console.print(report.verified)
        return 0
