"""A linear classifier on frozen features, with the calls of the official scripts for v1, v2 and v3."""

import common
import networks
import torch
import torch.nn as nn
from torchvision import transforms


def main():
    parser = common.options(batch_size=32, lr=3.0, wd=0.0)
    parser.add_argument("--pretrained", required=True)
    parser.add_argument("--encoder", default="encoder_q", help="base_encoder for v3")
    common.start(main_worker, parser.parse_args())


def main_worker(gpu, ngpus_per_node, args):
    common.join(gpu, ngpus_per_node, args)
    model = networks.__dict__[args.arch]()
    for name, param in model.named_parameters():
        if name not in ["fc.weight", "fc.bias"]:
            param.requires_grad = False
    model.fc.weight.data.normal_(mean=0.0, std=0.01)
    model.fc.bias.data.zero_()

    checkpoint = torch.load(args.pretrained, map_location="cpu")
    state_dict = checkpoint["state_dict"]
    prefix = f"module.{args.encoder}."
    for key in list(state_dict.keys()):
        if key.startswith(prefix) and not key.startswith(f"{prefix}fc"):
            state_dict[key[len(prefix) :]] = state_dict[key]
        del state_dict[key]
    message = model.load_state_dict(state_dict, strict=False)
    assert set(message.missing_keys) == {"fc.weight", "fc.bias"} and not message.unexpected_keys

    torch.cuda.set_device(args.gpu)
    model.cuda(args.gpu)
    model = nn.parallel.DistributedDataParallel(model, device_ids=[args.gpu])
    criterion = nn.CrossEntropyLoss().cuda(args.gpu)
    parameters = [param for param in model.parameters() if param.requires_grad]
    assert len(parameters) == 2
    optimizer = torch.optim.SGD(parameters, args.lr, momentum=args.momentum, weight_decay=args.weight_decay)
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.25] * 3)])
    dataset = networks.Noise(args.images, transform)
    loader = torch.utils.data.DataLoader(dataset, batch_size=args.batch_size, shuffle=True, pin_memory=True)
    history = []
    for epoch in range(args.epochs):
        common.seed_epoch(args, epoch)
        model.eval()  # the backbone's statistics stay
        for images, target in loader:
            images = images.cuda(args.gpu, non_blocking=True)
            target = target.cuda(args.gpu, non_blocking=True)
            output = model(images)
            loss = criterion(output, target)
            history.append([loss.item(), accuracy(output, target)])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    after = model.state_dict()
    for key, value in state_dict.items():
        assert torch.equal(after[f"module.{key}"].cpu(), value), f"{key} was changed"
    common.write(args, history)


def accuracy(output, target):
    """Percent right; two classes have no five best."""
    return output.argmax(1).eq(target).float().mean().item() * 100


if __name__ == "__main__":
    main()
