"""The commands behind ``moco-fast``, a module each."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from typing import Annotated, Union

import tyro

from moco_fast.commands.convert import Convert
from moco_fast.commands.doctor import Doctor
from moco_fast.commands.finetune import Finetune
from moco_fast.commands.finetune import defaults as finetune_defaults
from moco_fast.commands.knn import Knn
from moco_fast.commands.lasting import lasting_output
from moco_fast.commands.linear import Linear
from moco_fast.commands.map import Map
from moco_fast.commands.presets import Presets
from moco_fast.commands.pretrain import Pretrain, defaults
from moco_fast.commands.study import Study
from moco_fast.data.loader import WORKER_DIED
from moco_fast.distributed import Disagreement
from moco_fast.evaluate.frozen import BackboneMovedError
from moco_fast.train.meter import NonFiniteLossError
from moco_fast.train.processes import PeerFailedError

RUN_ERRORS = (NonFiniteLossError, Disagreement, PeerFailedError, BackboneMovedError)

DESCRIPTION = """MoCo self-supervised pretraining.

examples:
  moco-fast pretrain                              MoCo v2 on Fashion-MNIST, minutes on two cores
  moco-fast pretrain --preset fashion-mnist-long  the same for longer
  moco-fast pretrain --data photos/ --epochs 50   a directory of images; sub-folders are classes
  moco-fast pretrain --method simsiam             another method; "moco-fast presets" lists them
  moco-fast pretrain --resume runs/NAME           continue where a run stopped
  torchrun --nproc-per-node 8 -m moco_fast.cli pretrain --preset moco-v2 --data imagenet/
                                                  the same on eight GPUs; docs/distributed.md
  moco-fast knn runs/NAME --k 20 200              kNN accuracy of a checkpoint
  moco-fast knn moco_v2_800ep_pretrain.pth.tar --data imagenet/ --k 200
                                                  of an official one; torchrun shares out the images
  moco-fast linear runs/NAME                      accuracy of linear classifiers on frozen features
  moco-fast linear moco_v2_800ep_pretrain.pth.tar --data imagenet/ --augment --lr 30
                                                  by MoCo's own protocol
  moco-fast finetune runs/NAME --labels-fraction 0.1
                                                  train all its weights on a tenth of the labels
  moco-fast map runs/NAME                         draw what its features find alike
  moco-fast convert runs/NAME backbone.pth --to torchvision
                                                  a checkpoint for another library; docs/checkpoints.md
  moco-fast study momentum                        a question answered by a sweep: table and figure
  moco-fast doctor                                what is installed, built and found
"""


def run(argv: Sequence[str]) -> int:
    """Parse the arguments and run the command; returns the exit status."""
    with lasting_output():
        return _run(argv)


def _run(argv: Sequence[str]) -> int:
    try:
        command = tyro.cli(
            Union[  # noqa: UP007 - with | the annotations would be lost
                Annotated[Pretrain, tyro.conf.subcommand("pretrain", default=Pretrain(defaults(argv)))],
                Annotated[Presets, tyro.conf.subcommand("presets")],
                Annotated[Knn, tyro.conf.subcommand("knn")],
                Annotated[Linear, tyro.conf.subcommand("linear")],
                Annotated[Study, tyro.conf.subcommand("study")],
                Annotated[
                    Finetune,
                    tyro.conf.subcommand("finetune", default=Finetune(config=finetune_defaults(argv))),
                ],
                Annotated[Map, tyro.conf.subcommand("map")],
                Annotated[Convert, tyro.conf.subcommand("convert")],
                Annotated[Doctor, tyro.conf.subcommand("doctor")],
            ],  # type: ignore[arg-type]
            prog="moco-fast",
            description=DESCRIPTION,
            args=argv,
            config=(tyro.conf.AvoidSubcommands,),
        )
        return command.run()
    except (ValueError, TypeError, OSError, ImportError, *RUN_ERRORS) as error:
        # Faults of input or environment: the message says it all, a traceback would bury it.
        print(f"moco-fast: {error}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        if not str(error).startswith(WORKER_DIED):
            raise
        died = str(error).strip(" .")
        print(f"moco-fast: {died}. Most often memory ran out: free some, or lower --workers", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
