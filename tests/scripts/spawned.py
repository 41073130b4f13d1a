"""Children that were not forked import this file anew, and need what it imports."""

import json
import sys
from importlib.util import find_spec

import moco.builder
import moco.extra
import moco.loader
import moco.optimizer
import networks
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import vits


def main_worker(gpu, out):
    dist.init_process_group("nccl", init_method=f"file://{out}/rendezvous", world_size=2, rank=gpu)
    torch.cuda.set_device(gpu)
    torch.manual_seed(0)
    model = moco.builder.MoCo(networks.tiny, 8, 32).cuda(gpu)
    model = torch.nn.parallel.DistributedDataParallel(model, device_ids=[gpu])
    images = torch.randn(2, 4, 3, 16, 16, device=f"cuda:{gpu}").to("cuda", non_blocking=True)
    output, target = model(im_q=images[0], im_k=images[1])
    loss = torch.nn.functional.cross_entropy(output, target)
    loss.backward()
    found = {
        "homes": [moco.builder.__name__, moco.loader.__name__, moco.optimizer.__name__, vits.__name__],
        "arguments": sys.argv[1:], "device": str(images.device), "loss": loss.item(),
        "logits": type(output).__name__, "extra": moco.extra.__file__, "decoy": bool(find_spec("decoy")),
        "gathered": moco.extra.concat_all_gather(torch.tensor([gpu])).tolist(),
    }  # fmt: skip
    with open(f"{out}/{gpu}", "w") as file:
        json.dump(found, file)
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.spawn(main_worker, nprocs=torch.cuda.device_count(), args=(sys.argv[1],))
