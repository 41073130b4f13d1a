"""What a pretraining run is made of."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from moco_fast import checks
from moco_fast.data.augment import AugmentConfig
from moco_fast.models.backbones import VITS
from moco_fast.train.methods import METHODS

if TYPE_CHECKING:
    MethodName = str
else:  # so that the command line lists them
    MethodName = Literal[tuple(METHODS)]

_COUNTS = (
    "epochs", "batch_size", "accumulation", "width", "dim", "lr_batch_size",
    "log_every", "checkpoint_every", "verify_every", "knn_k", "knn_bank", "knn_queries",
)  # fmt: skip

# Those that not every method uses; None where it does not.
_OPTIONAL_COUNTS = ("queue_size", "bn_splits", "mlp_dim", "pred_dim", "prototypes")
OPTIONS = (
    *_OPTIONAL_COUNTS, "momentum", "bank_momentum", "temperature", "teacher_temperature", "shuffle",
    "queue_sync", "symmetric", "nce", "stop_gradient", "freeze_patch",
)  # fmt: skip

_VIEWS = AugmentConfig(
    image_size=28, crop_scale=(0.4, 1.0), jitter=(0.8, 0.8, 0.0, 0.0), gray_p=0.0, blur_p=0.0
)


@dataclass(frozen=True)
class PretrainConfig:
    """Every choice of a pretraining run; a preset is one of these. The defaults are the Fashion-MNIST recipe.

    Raises:
        TypeError, ValueError: a value out of range, named.
    """

    data: str = "fashion-mnist"
    """"fashion-mnist", "digits", "cifar10", "cifar100", or a directory of images."""
    method: MethodName = "moco-v2"
    """What to train; "moco-fast presets" lists the methods. An option below whose default is None is one that
    the method does not use, and is refused with it."""
    epochs: int = 5
    """Passes over the training images."""
    batch_size: int = 128
    """Images per step, over all processes."""
    accumulation: int = 1
    """Parts that a batch is computed in, one after the other, to save memory."""
    seed: int = 0
    """Seed of everything random."""

    arch: str = "small_resnet"
    """"small_resnet"; "cifar_resnet18"; a transformer, "small_vit", "vit_small", "vit_base", "vit_conv_small"
    or "vit_conv_base"; or the name of a torchvision model, such as "resnet50"."""
    width: int = 16
    """Channels of the first stage; "small_resnet" only."""
    dim: int = 64
    """Features of the embedding."""
    queue_size: int | None = None
    """K, the number of negatives: keys in the queue, or rows drawn from the memory bank."""
    momentum: float | None = None
    """m, of the key encoder or the teacher; with moco-v3 and dino at the start, then rising to 1."""
    bank_momentum: float | None = None
    """Momentum of the memory bank's rows, in [0, 1]."""
    temperature: float | None = None
    """Softmax temperature T of the loss, above 0."""
    teacher_temperature: float | None = None
    """Softmax temperature of the teacher, above 0: a low one sharpens its output."""
    bn_splits: int | None = None
    """Batch-norm statistics over this many parts of a shuffled batch, as on that many devices, however many
    processes there are; 1 leaves every process with the statistics of its own images."""
    shuffle: bool | None = None
    """Shuffle the batch of the keys, so that statistics of its parts do not tell which key is whose."""
    queue_sync: Literal["global", "local"] | None = None
    """One queue for all processes, or one for each of its own keys."""
    symmetric: bool | None = None
    """Both views are query and key in turn, and both views' keys enter the queue."""
    nce: bool | None = None
    """The loss of instance discrimination, noise-contrastive estimation, in place of InfoNCE."""
    mlp_dim: int | None = None
    """Hidden features of the projection head."""
    pred_dim: int | None = None
    """Hidden features of the predictor."""
    prototypes: int | None = None
    """Classes that teacher and student assign an image to."""
    stop_gradient: bool | None = None
    """Treat the targets as constants. False makes the method collapse, as a demonstration."""
    freeze_patch: bool | None = None
    """Leave the patch projection of a vision transformer as it was drawn."""

    sync_bn: bool = False
    """Batch-norm statistics over all processes (GPUs only), in place of a shuffle."""

    optimizer: Literal["sgd", "lars", "adamw"] = "sgd"
    """SGD with momentum, LARS or AdamW."""
    lr: float = 0.06
    """Learning rate at its peak, for batches of lr_batch_size; scaled linearly to batch_size."""
    lr_batch_size: int = 128
    """Images per step that lr is meant for."""
    schedule: Literal["cosine", "step"] = "cosine"
    """Half a cosine per step, or a tenth at every milestone."""
    milestones: tuple[float, ...] = (120, 160)
    """Epochs at which the step schedule divides by ten, all below --epochs."""
    warmup_epochs: float = 0.2
    """Epochs over which the learning rate rises linearly from 0."""
    sgd_momentum: float = 0.9
    """Momentum of SGD and of LARS."""
    weight_decay: float = 5e-4
    """L2 penalty on every parameter; with LARS not on biases and norm layers; with AdamW decoupled."""
    bf16: bool = False
    """Run the encoders under bf16 autocast."""
    compile: bool = False
    """Run the encoders through torch.compile."""

    augment: AugmentConfig = field(default=_VIEWS)
    """The random views."""
    augment_second: AugmentConfig | None = None
    """Those of the second view, where they differ: any option --augment-second.* makes them differ."""
    canvas: float = 2.0
    """Side of the squares that a directory's images are reduced to, over the side of a view."""

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
    knn_every: int = 0
    """Steps between kNN measurements; 0 spreads four over the run."""
    verify_every: int = 500
    """Steps between checks that all processes hold the same queue."""
    knn_k: int = 20
    """Neighbours that vote."""
    knn_bank: int = 20_000
    """Training images that vote, at most."""
    knn_queries: int = 10_000
    """Test images per measurement during training, at most; the table at the end uses all there are."""

    def __post_init__(self) -> None:
        checks.one_of("method", self.method, tuple(METHODS))
        row = METHODS[self.method]
        for name in OPTIONS:
            if getattr(self, name) is None:
                object.__setattr__(self, name, row.options.get(name))
            elif name not in row.options:
                raise ValueError(
                    f"method {self.method!r} does not use {name}, got {name}={getattr(self, name)!r}; "
                    f"it uses {', '.join(row.options)}"
                )
        for name in (*_COUNTS, *(name for name in _OPTIONAL_COUNTS if name in row.options)):
            checks.count(name, getattr(self, name))
        for name in ("threads", "workers", "knn_every"):
            checks.count(name, getattr(self, name), least=0)
        if self.width % 8:  # oneDNN's gradient of narrower strided 1x1 convolutions differs from run to run
            raise ValueError(f"width must be a multiple of 8, got {self.width}")
        checks.fraction("sgd_momentum", self.sgd_momentum)
        for name in ("momentum", "bank_momentum"):
            if getattr(self, name) is not None:
                checks.fraction(name, getattr(self, name))
        for name in ("temperature", "teacher_temperature"):
            if getattr(self, name) is not None:
                checks.temperature(name, getattr(self, name))
        for name, lowest in (("lr", 0.0), ("weight_decay", 0.0), ("warmup_epochs", 0.0), ("canvas", 1.0)):
            value = checks.number(name, getattr(self, name))
            if not (math.isfinite(value) and value >= lowest):
                raise ValueError(f"{name} must be finite and at least {lowest:g}, got {value!r}")
        checks.one_of("schedule", self.schedule, ("cosine", "step"))
        checks.one_of("optimizer", self.optimizer, ("sgd", "lars", "adamw"))
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs must be below epochs={self.epochs}, got {self.warmup_epochs!r}")
        checks.seed(self.seed)
        splits = self.bn_splits or 1
        if self.batch_size % (self.accumulation * splits):
            raise ValueError(
                f"accumulation={self.accumulation} times bn_splits={splits} must divide "
                f"batch_size={self.batch_size}"
            )
        if self.accumulation > 1 and row.undivided:
            raise ValueError(
                f"method {self.method!r} {row.undivided}, which accumulation={self.accumulation} would cut "
                "into parts: use more processes, or bf16"
            )
        if self.freeze_patch and self.arch not in VITS:
            raise ValueError(
                f"freeze_patch needs a vision transformer ({', '.join(VITS)}), got {self.arch!r}"
            )
        if self.augment_second is not None and row.views == 1:
            raise ValueError(f"method {self.method!r} has one view of an image, got augment_second")
        if self.optimizer == "adamw" and self.sgd_momentum != type(self).sgd_momentum:
            raise ValueError(f"optimizer 'adamw' does not use sgd_momentum, got {self.sgd_momentum!r}")
        keys = row.keys_per_image(self)
        if keys and self.batch_size * keys > self.queue_size:  # type: ignore[operator]
            raise ValueError(
                f"batch_size must be at most queue_size={self.queue_size}"
                f"{f' / {keys}' if keys > 1 else ''}, got {self.batch_size}: "
                "a batch replaces that many keys"
            )
        if self.queue_sync is not None:
            checks.one_of("queue_sync", self.queue_sync, ("global", "local"))
        if self.sync_bn and splits > 1:
            raise ValueError(
                f"sync_bn takes statistics over all processes, bn_splits={splits} over parts of the "
                "batch: leave one of the two out"
            )

    def check_milestones(self) -> None:
        """Raise ValueError for milestones that a run would not meet. Runs that began so may go on."""
        if self.schedule == "step" and not all(0 < epoch < self.epochs for epoch in self.milestones):
            raise ValueError(
                f"milestones must be above 0 and below epochs={self.epochs} with schedule 'step', got "
                f"{' '.join(f'{epoch:g}' for epoch in self.milestones)}"
            )
        if self.schedule == "cosine" and self.milestones != type(self).milestones:
            raise ValueError(f"schedule 'cosine' does not use milestones, got {self.milestones}")

    def with_method(self, method: str) -> PretrainConfig:
        """This recipe with another method.

        Options that both methods use keep their values where these are not the old method's own; what neither
        the recipe nor the user has chosen becomes what suits the new method.

        Raises:
            ValueError: no such method.
        """
        checks.one_of("method", method, tuple(METHODS))
        if method == self.method:
            return self
        old, new = METHODS[self.method], METHODS[method]
        changes: dict[str, Any] = dict.fromkeys(OPTIONS)
        for name in old.options.keys() & new.options.keys():
            if getattr(self, name) != old.options[name]:
                changes[name] = getattr(self, name)
        usual = {f.name: f.default for f in dataclasses.fields(self)}
        for name in old.recipe.keys() | new.recipe.keys():
            if getattr(self, name) in (usual[name], old.recipe.get(name)):
                changes[name] = new.recipe.get(name, usual[name])
        return dataclasses.replace(self, method=method, **changes)

    def with_epochs(self, epochs: int) -> PretrainConfig:
        """This recipe over as many epochs, its milestones and warm-up at the same parts of the run."""
        share = checks.count("epochs", epochs) / self.epochs
        return dataclasses.replace(
            self, epochs=epochs, warmup_epochs=self.warmup_epochs * share,
            milestones=tuple(epoch * share for epoch in self.milestones)
            if self.schedule == "step" else self.milestones,
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, for a checkpoint or JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PretrainConfig:
        """The inverse of :meth:`to_dict`; lists may stand for tuples.

        Raises:
            ValueError: names that are no field.
        """
        views = {
            name: AugmentConfig(**known_fields(AugmentConfig, values[name]))
            for name in ("augment", "augment_second")
            if values.get(name) is not None
        }
        return cls(**(known_fields(cls, values) | views))


def known_fields(cls: type, values: dict[str, Any]) -> dict[str, Any]:
    """Values for a dataclass, tuples for lists; ValueError for names that are no field of it."""
    names = {f.name for f in dataclasses.fields(cls)}
    if unknown := sorted(set(values) - names):
        raise ValueError(f"{cls.__name__} has no {', '.join(unknown)}; it was written by another version")
    return {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
