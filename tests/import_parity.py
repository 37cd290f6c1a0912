"""Print the table of imported networks in RESULTS.md: python tests/import_parity.py.

Every network that timm and torchvision share with this tool, with random weights and random BN:
logits in float64 for two images of 64x64.
"""

import timm
import torch
import torchvision
from elsewhere import parity, shaken

NETWORKS = [
    *(("torchvision", f"resnet{d}") for d in (18, 34, 50, 101, 152)),
    *(("timm", f"resnet{d}") for d in (18, 34, 50, 101, 152)),
    *(("timm", f"resnetv2_{d}") for d in (18, 34, 50, 101, 152)),
]

if __name__ == "__main__":
    print("| network | here | largest difference | largest logit |\n|---|---|--:|--:|")
    for source, name in NETWORKS:
        torch.manual_seed(0)
        if source == "timm":
            net = timm.create_model(name, num_classes=1000)
        else:
            net = getattr(torchvision.models, name)()
        difference, size, e = parity(shaken(net), source)
        here = f"`{e.depth} {e.block} {e.unit}`"
        print(f"| {source} `{name}` | {here} | {difference:.1e} | {size:.2f} |", flush=True)
