"""MoCo v1 and v2, pretrained with the calls of the official script, on images of noise."""

import math

import common
import moco.builder
import moco.loader
import networks
import torch
import torch.backends.cudnn as cudnn
import torch.nn as nn
from torchvision import transforms


def main():
    parser = common.options(batch_size=16, lr=0.05, wd=1e-4)
    parser.add_argument("--moco-dim", default=16, type=int)
    parser.add_argument("--moco-k", default=64, type=int)
    parser.add_argument("--moco-m", default=0.9, type=float)
    parser.add_argument("--moco-t", default=0.07, type=float)
    parser.add_argument("--mlp", action="store_true")
    parser.add_argument("--aug-plus", action="store_true")
    parser.add_argument("--cos", action="store_true")
    parser.add_argument("--schedule", default=[3, 4], nargs="*", type=int)
    common.start(main_worker, parser.parse_args())


def main_worker(gpu, ngpus_per_node, args):
    common.join(gpu, ngpus_per_node, args)
    torch.manual_seed(args.seed)
    model = moco.builder.MoCo(
        networks.__dict__[args.arch], args.moco_dim, args.moco_k, args.moco_m, args.moco_t, args.mlp
    )
    print(model)
    if args.gpu is not None:
        torch.cuda.set_device(args.gpu)
        model.cuda(args.gpu)
        args.batch_size = int(args.batch_size / ngpus_per_node)
        model = nn.parallel.DistributedDataParallel(
            model, device_ids=[args.gpu], find_unused_parameters=args.find_unused_parameters
        )
    else:
        model.cuda()
        model = nn.parallel.DistributedDataParallel(model)
    criterion = nn.CrossEntropyLoss().cuda(args.gpu)
    optimizer = torch.optim.SGD(
        model.parameters(), args.lr, momentum=args.momentum, weight_decay=args.weight_decay
    )
    if args.resume:
        where = None if args.gpu is None else f"cuda:{args.gpu}"
        checkpoint = torch.load(args.resume, map_location=where)
        args.start_epoch = checkpoint["epoch"]
        model.load_state_dict(checkpoint["state_dict"])
        optimizer.load_state_dict(checkpoint["optimizer"])
    cudnn.benchmark = True

    dataset = networks.Noise(args.images, moco.loader.TwoCropsTransform(augmentation(args.aug_plus)))
    sampler = torch.utils.data.distributed.DistributedSampler(dataset)
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=args.batch_size, shuffle=False, num_workers=args.workers, pin_memory=True,
        sampler=sampler, drop_last=True,
    )  # fmt: skip
    history = []
    for epoch in range(args.start_epoch, args.epochs):
        sampler.set_epoch(epoch)
        common.seed_epoch(args, epoch)
        adjust_learning_rate(optimizer, epoch, args)
        train(loader, model, criterion, optimizer, args, history)
        if args.rank % ngpus_per_node == 0:
            state = {
                "epoch": epoch + 1, "arch": args.arch, "state_dict": model.state_dict(),
                "optimizer": optimizer.state_dict(),
            }  # fmt: skip
            torch.save(state, f"{args.out}/checkpoint_{epoch:04d}.pth.tar")
    common.write(args, history)


def augmentation(plus):
    crop = transforms.RandomResizedCrop(16, scale=(0.2, 1.0))
    last = [
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize([0.5] * 3, [0.25] * 3),
    ]
    if not plus:
        jitter = transforms.ColorJitter(0.4, 0.4, 0.4, 0.4)
        return transforms.Compose([crop, transforms.RandomGrayscale(p=0.2), jitter, *last])
    jitter = transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8)
    blur = transforms.RandomApply([moco.loader.GaussianBlur([0.1, 2.0])], p=0.5)
    return transforms.Compose([crop, jitter, transforms.RandomGrayscale(p=0.2), blur, *last])


def train(loader, model, criterion, optimizer, args, history):
    model.train()
    for images, _ in loader:
        if args.gpu is not None:
            images[0] = images[0].cuda(args.gpu, non_blocking=True)
            images[1] = images[1].cuda(args.gpu, non_blocking=True)
        output, target = model(im_q=images[0], im_k=images[1])
        loss = criterion(output, target)
        acc1, acc5 = common.accuracy(output, target, topk=(1, 5))
        history.append([loss.item(), acc1[0].item(), acc5[0].item()])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def adjust_learning_rate(optimizer, epoch, args):
    lr = args.lr
    if args.cos:
        lr *= 0.5 * (1.0 + math.cos(math.pi * epoch / args.epochs))
    else:
        lr *= 0.1 ** sum(epoch >= milestone for milestone in args.schedule)
    for group in optimizer.param_groups:
        group["lr"] = lr


if __name__ == "__main__":
    main()
