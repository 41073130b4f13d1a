"""What a fine-tuning run is made of."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from moco_fast import checks
from moco_fast.data.augment import AugmentConfig
from moco_fast.train.config import known_fields

# Learning rate and weight decay unless given.
DEFAULTS = {"sgd": (0.1, 5e-4), "adamw": (5e-4, 0.05)}


@dataclass(frozen=True)
class FinetuneConfig:
    """Every choice of a fine-tuning run. The defaults suit small images.

    Raises:
        TypeError, ValueError: a value out of range, named.
    """

    data: str | None = None
    """Labelled dataset; default: the one of the pretraining."""
    from_scratch: bool = False
    """Begin with random weights instead, to see what the pretraining is worth."""
    labels_fraction: float = 1.0
    """Part of every class to train on, at least one image: the same images every time for a seed."""
    epochs: int = 5
    """Passes over the training images."""
    batch_size: int = 128
    """Images per step, over all processes."""
    seed: int = 0
    """Seed of everything random."""
    image_size: int | None = None
    """Side of the views; default: that of the pretraining, 224 for official files."""
    arch: str | None = None
    """Backbone, for a checkpoint that does not name it rightly."""

    optimizer: Literal["sgd", "adamw"] = "sgd"
    """SGD with momentum 0.9, or AdamW."""
    lr: float | None = None
    """Learning rate at its peak, for batches of lr_batch_size; scaled linearly to batch_size. Default: 0.1
    for sgd, 0.0005 for adamw."""
    lr_batch_size: int = 128
    """Images per step that lr is meant for."""
    layer_decay: float = 1.0
    """Factor between the learning rates of one layer and the one above it; transformers do well with 0.65 to
    0.75."""
    warmup_epochs: float = 0.2
    """Linear warm-up; half a cosine follows."""
    weight_decay: float | None = None
    """Penalty on weights, none on biases and norms. Default: 0.0005 for sgd, 0.05 for adamw."""
    label_smoothing: float = 0.0
    """Part of the target that is spread over all classes."""
    crop_scale: tuple[float, float] = (0.4, 1.0)
    """Smallest and largest area of the random crops; 0.08 1 is usual for photographs."""
    flip_p: float = 0.5
    """Probability of a horizontal flip."""
    bf16: bool = False
    """Run the network under bf16 autocast."""

    device: str = "auto"
    """"auto" (a GPU if there is one), "cpu", "cuda" or "cuda:1"; under torchrun every process has its own."""
    threads: int = 0
    """CPU threads; 0 leaves the choice to torch."""
    workers: int = 2
    """Processes that decode a directory's images, for every process that trains."""
    log_every: int = 10
    """Steps between records, and between checks that the loss is finite."""
    checkpoint_every: int = 200
    """Steps between checkpoints; one is also written at the end, on SIGTERM and on Ctrl-C."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "lr_batch_size", "log_every", "checkpoint_every"):
            checks.count(name, getattr(self, name))
        for name in ("threads", "workers"):
            checks.count(name, getattr(self, name), least=0)
        checks.seed(self.seed)
        if self.image_size is not None:
            checks.count("image_size", self.image_size)
        checks.one_of("optimizer", self.optimizer, tuple(DEFAULTS))
        for name in ("lr", "weight_decay"):
            if getattr(self, name) is not None:
                checks.not_negative(name, getattr(self, name))
        checks.not_negative("warmup_epochs", self.warmup_epochs)
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs must be below epochs={self.epochs}, got {self.warmup_epochs!r}")
        for name in ("labels_fraction", "layer_decay"):
            if not 0 < checks.number(name, getattr(self, name)) <= 1:
                raise ValueError(f"{name} must be in (0, 1], got {getattr(self, name)!r}")
        if not 0 <= checks.number("label_smoothing", self.label_smoothing) < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), got {self.label_smoothing!r}")
        self.augment(1)

    @property
    def peak_lr(self) -> float:
        """Learning rate at its peak, for the batch of a step."""
        lr = DEFAULTS[self.optimizer][0] if self.lr is None else self.lr
        return lr * self.batch_size / self.lr_batch_size

    @property
    def decay(self) -> float:
        """Weight decay."""
        return DEFAULTS[self.optimizer][1] if self.weight_decay is None else self.weight_decay

    def augment(self, image_size: int) -> AugmentConfig:
        """The random views: crops and flips, no change of colour."""
        return AugmentConfig(
            image_size=image_size, crop_scale=self.crop_scale, flip_p=self.flip_p, jitter_p=0.0, gray_p=0.0,
            blur_p=0.0,
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, for a checkpoint or JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> FinetuneConfig:
        """The inverse of :meth:`to_dict`; lists may stand for tuples.

        Raises:
            ValueError: names that are no field.
        """
        return cls(**known_fields(cls, values))
