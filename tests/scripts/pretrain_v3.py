"""MoCo v3, pretrained with the calls of the official script, on images of noise."""

import math
from functools import partial

import common
import moco.builder
import moco.loader
import moco.optimizer
import networks
import torch
import torch.nn as nn
import vits
from torchvision import transforms


def main():
    parser = common.options(batch_size=16, lr=0.3, wd=1e-6)
    parser.add_argument("--moco-dim", default=16, type=int)
    parser.add_argument("--moco-mlp-dim", default=32, type=int)
    parser.add_argument("--moco-m", default=0.9, type=float)
    parser.add_argument("--moco-m-cos", action="store_true")
    parser.add_argument("--moco-t", default=1.0, type=float)
    parser.add_argument("--stop-grad-conv1", action="store_true")
    parser.add_argument("--optimizer", default="lars", choices=["lars", "adamw"])
    parser.add_argument("--warmup-epochs", default=1, type=int)
    parser.add_argument("--crop-min", default=0.2, type=float)
    common.start(main_worker, parser.parse_args())


def main_worker(gpu, ngpus_per_node, args):
    common.join(gpu, ngpus_per_node, args)
    torch.manual_seed(args.seed)
    if args.arch.startswith("vit"):
        model = moco.builder.MoCo_ViT(
            partial(vits.__dict__[args.arch], stop_grad_conv1=args.stop_grad_conv1),
            args.moco_dim, args.moco_mlp_dim, args.moco_t,
        )  # fmt: skip
    else:
        model = moco.builder.MoCo_ResNet(
            partial(networks.__dict__[args.arch], zero_init_residual=True),
            args.moco_dim, args.moco_mlp_dim, args.moco_t,
        )  # fmt: skip
    args.lr = args.lr * args.batch_size / 256
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    torch.cuda.set_device(args.gpu)
    model.cuda(args.gpu)
    args.batch_size = int(args.batch_size / args.world_size)
    model = nn.parallel.DistributedDataParallel(model, device_ids=[args.gpu])
    if args.optimizer == "lars":
        optimizer = moco.optimizer.LARS(
            model.parameters(), args.lr, weight_decay=args.weight_decay, momentum=args.momentum
        )
    else:
        optimizer = torch.optim.AdamW(model.parameters(), args.lr, weight_decay=args.weight_decay)
    scaler = torch.amp.GradScaler("cuda")
    if args.resume:
        checkpoint = torch.load(args.resume, map_location=f"cuda:{args.gpu}")
        args.start_epoch = checkpoint["epoch"]
        model.load_state_dict(checkpoint["state_dict"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        scaler.load_state_dict(checkpoint["scaler"])

    views = moco.loader.TwoCropsTransform(augmentation(args, 1.0, 0.0), augmentation(args, 0.1, 0.2))
    dataset = networks.Noise(args.images, views)
    sampler = torch.utils.data.distributed.DistributedSampler(dataset)
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=args.batch_size, shuffle=False, num_workers=args.workers, pin_memory=True,
        sampler=sampler, drop_last=True,
    )  # fmt: skip
    history = []
    for epoch in range(args.start_epoch, args.epochs):
        sampler.set_epoch(epoch)
        common.seed_epoch(args, epoch)
        train(loader, model, optimizer, scaler, epoch, args, history)
        if args.rank == 0:
            state = {
                "epoch": epoch + 1, "arch": args.arch, "state_dict": model.state_dict(),
                "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(),
            }  # fmt: skip
            torch.save(state, f"{args.out}/checkpoint_{epoch:04d}.pth.tar")
    common.write(args, history)


def augmentation(args, blur, solarize):
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(16, scale=(args.crop_min, 1.0)),
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
            transforms.RandomGrayscale(p=0.2),
            transforms.RandomApply([moco.loader.GaussianBlur([0.1, 2.0])], p=blur),
            transforms.RandomApply([moco.loader.Solarize()], p=solarize),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize([0.5] * 3, [0.25] * 3),
        ]
    )


def train(loader, model, optimizer, scaler, epoch, args, history):
    model.train()
    m = args.moco_m
    for i, (images, _) in enumerate(loader):
        progress = epoch + i / len(loader)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(progress, args)
        if args.moco_m_cos:
            m = 1.0 - 0.5 * (1.0 + math.cos(math.pi * progress / args.epochs)) * (1.0 - args.moco_m)
        images[0] = images[0].cuda(args.gpu, non_blocking=True)
        images[1] = images[1].cuda(args.gpu, non_blocking=True)
        with torch.amp.autocast("cuda"):
            loss = model(images[0], images[1], m)
        history.append([loss.item()])
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()


def learning_rate(progress, args):
    if progress < args.warmup_epochs:
        return args.lr * progress / args.warmup_epochs
    past = (progress - args.warmup_epochs) / (args.epochs - args.warmup_epochs)
    return args.lr * 0.5 * (1.0 + math.cos(math.pi * past))


if __name__ == "__main__":
    main()
