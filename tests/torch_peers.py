"""PyTorch training steps of the same models, for benchmarks alone (tests/bench_torch.py).

Written as a PyTorch user would: channels-last convolutions, scaled_dot_product_attention, fused
optimizers, and on a GPU bfloat16 autocast and torch.compile. Weights are drawn anew; that a peer is
the same model is seen by its count of parameters, which the benchmark compares with ours.
"""

import copy

import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    """A residual block of torchvision's shape, basic or bottleneck."""

    def __init__(self, wide_in, width, stride, bottleneck):
        super().__init__()
        wide = 4 * width if bottleneck else width
        sizes = ([(width, 1, 1), (width, 3, stride), (wide, 1, 1)] if bottleneck
                 else [(width, 3, stride), (width, 3, 1)])
        layers, before = [], wide_in
        for features, size, step in sizes:
            layers += [nn.Conv2d(before, features, size, step, size // 2, bias=False),
                       nn.BatchNorm2d(features), nn.ReLU(inplace=True)]
            before = features
        self.body = nn.Sequential(*layers[:-1])
        self.short = nn.Identity() if wide_in == wide and stride == 1 else nn.Sequential(
            nn.Conv2d(wide_in, wide, 1, stride, bias=False), nn.BatchNorm2d(wide))

    def forward(self, x):
        return F.relu(self.body(x) + self.short(x))


def resnet(cfg):
    """The tower of cfg = config.model: small_resnet, resnet18 or resnet50. Gives (module, D)."""
    if cfg.name == "small_resnet":
        depths, widths, stem = (1,) * len(cfg.stages), tuple(cfg.stages), cfg.width
        large, first = False, cfg.first_stride
    else:
        depths = (2, 2, 2, 2) if cfg.name == "resnet18" else (3, 4, 6, 3)
        widths, stem = tuple(cfg.width * 2**i for i in range(4)), cfg.width
        large, first = cfg.stem == "imagenet", 1
    size, stride = (7, 2) if large else (3, cfg.stem_stride if cfg.name == "small_resnet" else 1)
    layers = [nn.Conv2d(3, stem, size, stride, size // 2, bias=False), nn.BatchNorm2d(stem),
              nn.ReLU(inplace=True)] + ([nn.MaxPool2d(3, 2, 1)] if large else [])
    bottleneck, before = cfg.name == "resnet50", stem
    for stage, (depth, width) in enumerate(zip(depths, widths)):
        for i in range(depth):
            layers.append(Block(before, width, 1 if i else 2 if stage else first, bottleneck))
            before = 4 * width if bottleneck else width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), before


class Layer(nn.Module):
    """A pre-LN transformer layer."""

    def __init__(self, cfg, causal):
        super().__init__()
        self.heads, self.causal = cfg.heads, causal
        self.ln1, self.ln2 = (nn.LayerNorm(cfg.width, cfg.eps) for _ in range(2))
        self.qkv, self.out = nn.Linear(cfg.width, 3 * cfg.width), nn.Linear(cfg.width, cfg.width)
        wide = round(cfg.mlp_ratio * cfg.width)
        self.fc1, self.fc2 = nn.Linear(cfg.width, wide), nn.Linear(wide, cfg.width)

    def forward(self, x):
        n, t, width = x.shape
        q, k, v = self.qkv(self.ln1(x)).view(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(y.transpose(1, 2).reshape(n, t, width))
        y = self.fc1(self.ln2(x))
        return x + self.fc2(y * torch.sigmoid(1.702 * y))  # quick_gelu


class ViT(nn.Module):
    """CLIP's vision transformer."""

    def __init__(self, cfg, side):
        super().__init__()
        self.patches = nn.Conv2d(3, cfg.width, cfg.patch, cfg.patch, bias=False)
        self.token = nn.Parameter(torch.randn(cfg.width) * cfg.width**-0.5)
        count = (side // cfg.patch)**2 + 1
        self.places = nn.Parameter(torch.randn(count, cfg.width) * cfg.width**-0.5)
        self.before, self.after = (nn.LayerNorm(cfg.width, cfg.eps) for _ in range(2))
        self.layers = nn.Sequential(*(Layer(cfg, False) for _ in range(cfg.layers)))

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.to(x.dtype).expand(len(x), 1, -1), x], 1) + self.places
        return self.after(self.layers(self.before(x))[:, 0])


class Text(nn.Module):
    """CLIP's text transformer."""

    def __init__(self, cfg):
        super().__init__()
        self.end = cfg.end
        self.table = nn.Embedding(cfg.vocab, cfg.width)
        self.places = nn.Parameter(torch.randn(cfg.context, cfg.width) * 0.01)
        self.layers = nn.Sequential(*(Layer(cfg, cfg.causal) for _ in range(cfg.layers)))
        self.after = nn.LayerNorm(cfg.width, cfg.eps)

    def forward(self, tokens):
        x = self.layers(self.table(tokens) + self.places[:tokens.shape[1]])
        at = (tokens == self.end).int().argmax(1)
        return self.after(x[torch.arange(len(x), device=x.device), at])


def projector(wide, cfg):
    return nn.Sequential(nn.Linear(wide, cfg.hidden), nn.ReLU(inplace=True),
                         nn.Linear(cfg.hidden, cfg.dim))


class SimCLR(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        tower, wide = resnet(cfg.model)
        self.encoder = nn.Sequential(tower, projector(wide, cfg.objective))
        self.temperature = cfg.objective.temperature

    def forward(self, view1, view2):
        z = F.normalize(self.encoder(torch.cat([view1, view2])).float(), dim=1)
        logits = z @ z.T / self.temperature
        n = len(z)
        logits.fill_diagonal_(-torch.inf)
        return F.cross_entropy(logits, (torch.arange(n, device=z.device) + n // 2) % n)


class MoCo(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        tower, wide = resnet(cfg.model)
        o = cfg.objective
        self.encoder = nn.Sequential(tower, projector(wide, o))
        self.keys = copy.deepcopy(self.encoder).requires_grad_(False)
        self.temperature, self.momentum, self.at = o.temperature, o.momentum, 0
        queue = torch.randn(o.queue_batches * cfg.train.batch_size, o.dim)
        self.register_buffer("queue", F.normalize(queue, dim=1))

    def forward(self, view1, view2):
        q = F.normalize(self.encoder(view1).float(), dim=1)
        with torch.no_grad():
            k = F.normalize(self.keys(view2).float(), dim=1)
        logits = torch.cat([(q * k).sum(1, keepdim=True), q @ self.queue.T], 1) / self.temperature
        return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long,
                                                   device=q.device)), k

    @torch.no_grad()
    def after(self, k):
        torch._foreach_lerp_(list(self.keys.parameters()),
                             [p.detach() for p in self.encoder.parameters()], 1 - self.momentum)
        self.queue[self.at:self.at + len(k)] = k
        self.at = (self.at + len(k)) % len(self.queue)


class CLIP(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.image, wide = ((ViT(cfg.model, cfg.data.image_size), cfg.model.width)
                            if cfg.model.name == "vit" else resnet(cfg.model))
        self.text = Text(cfg.text)
        self.image_top = nn.Linear(wide, cfg.objective.dim, bias=False)
        self.text_top = nn.Linear(cfg.text.width, cfg.objective.dim, bias=False)
        self.scale = nn.Parameter(torch.tensor(cfg.objective.scale_init))

    def forward(self, view1, tokens):
        a = F.normalize(self.image_top(self.image(view1)).float(), dim=1)
        b = F.normalize(self.text_top(self.text(tokens)).float(), dim=1)
        logits = self.scale.exp() * a @ b.T
        own = torch.arange(len(a), device=a.device)
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


MODELS = {"simclr": (SimCLR, ("view1", "view2")), "moco": (MoCo, ("view1", "view2")),
          "clip": (CLIP, ("view1", "tokens"))}


class Step:
    """One training step of a config's model on views, in eager PyTorch or compiled.

    Args:
        views: arrays as `augment.views` gives them, [B, H, W, 3] float32 and [B, T] int32.
        device: "cpu" or "cuda"; on the latter autocast where cfg.model.dtype is bfloat16.
    """

    def __init__(self, cfg, views, device, compiled):
        kind, names = MODELS[cfg.objective.name]
        self.model = kind(cfg).to(device, memory_format=torch.channels_last).train()
        self.views, self.device = [to_torch(views[name], device) for name in names], device
        self.half = cfg.model.dtype == "bfloat16"
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.parameters = sum(p.numel() for p in trained)
        o, fused = cfg.optim, device == "cuda"
        self.optimizer = (torch.optim.AdamW(trained, o.lr, (o.b1, o.b2), o.eps, o.weight_decay,
                                            fused=fused) if o.name == "adamw" else
                          torch.optim.SGD(trained, o.lr, o.momentum, weight_decay=o.weight_decay,
                                          fused=fused))
        # Whatever ran before in this process, shapes are constants; cuDNN may try its algorithms.
        self.loss = torch.compile(self.model, dynamic=False) if compiled else self.model
        torch.backends.cudnn.benchmark = True

    def __call__(self, *views):
        with torch.autocast(self.device, torch.bfloat16, enabled=self.half):
            value = self.loss(*(views or self.views))
        value, keys = value if isinstance(value, tuple) else (value, None)
        self.optimizer.zero_grad(set_to_none=True)
        value.backward()
        self.optimizer.step()
        if keys is not None:
            self.model.after(keys)
        return self

    def block_until_ready(self):
        if self.device == "cuda":
            torch.cuda.synchronize()


def to_torch(array, device):
    """NHWC floats become channels-last images, integers indices."""
    tensor = torch.tensor(array, device=device)
    if tensor.ndim == 4:
        return tensor.permute(0, 3, 1, 2)  # of the same memory: channels last
    return tensor.long()
