"""What the scripts share: options of the official ones, a start as theirs, and a record."""

import argparse
import json
import random

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def options(batch_size, lr, wd):
    parser = argparse.ArgumentParser()
    parser.add_argument("-a", "--arch", default="tiny")
    parser.add_argument("-j", "--workers", default=0, type=int)
    parser.add_argument("--epochs", default=5, type=int)
    parser.add_argument("--start-epoch", default=0, type=int)
    parser.add_argument("-b", "--batch-size", default=batch_size, type=int, help="of all devices")
    parser.add_argument("--images", default=64, type=int)
    parser.add_argument("--lr", default=lr, type=float)
    parser.add_argument("--momentum", default=0.9, type=float)
    parser.add_argument("--wd", dest="weight_decay", default=wd, type=float)
    parser.add_argument("--resume", default="")
    parser.add_argument("--world-size", default=1, type=int)
    parser.add_argument("--rank", default=0, type=int)
    parser.add_argument("--dist-url", required=True)
    parser.add_argument("--dist-backend", default="nccl")
    parser.add_argument("--seed", default=3, type=int)
    parser.add_argument("--gpu", default=None, type=int)
    parser.add_argument("--multiprocessing-distributed", action="store_true")
    parser.add_argument("--out", required=True, help="where checkpoints go, and what was measured")
    parser.add_argument("--find-unused-parameters", action="store_true")
    return parser


def start(main_worker, args):
    """One process per device of this machine, or this one alone."""
    args.distributed = True
    per_node = torch.cuda.device_count()
    if args.multiprocessing_distributed:
        args.world_size = per_node * args.world_size
        mp.spawn(main_worker, nprocs=per_node, args=(per_node, args))
    else:
        main_worker(args.gpu, per_node, args)


def join(gpu, per_node, args):
    """Become a process of the group."""
    args.gpu = gpu
    if args.multiprocessing_distributed:
        args.rank = args.rank * per_node + gpu
    dist.init_process_group(
        backend=args.dist_backend, init_method=args.dist_url, world_size=args.world_size, rank=args.rank
    )
    torch.set_num_threads(1)


def seed_epoch(args, epoch):
    """Views as a function of the epoch, so that a resumed run repeats them."""
    seed = args.seed + 1000 * epoch + args.rank
    random.seed(seed)
    torch.manual_seed(seed)


def accuracy(output, target, topk=(1,)):
    """Percent of targets among the k largest outputs, by the calls of PyTorch's ImageNet example."""
    with torch.no_grad():
        _, pred = output.topk(max(topk), 1, True, True)
        pred = pred.t()
        correct = pred.eq(target.view(1, -1).expand_as(pred))
        return [correct[:k].view(-1).float().sum(0, keepdim=True).mul_(100.0 / target.size(0)) for k in topk]


def write(args, history):
    with open(f"{args.out}/rank{args.rank}.json", "w") as file:
        json.dump(history, file)
