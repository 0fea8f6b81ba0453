"""Catastrophic overfitting in a network of one convolution: FGSM against GradAlign, in pictures.

    python bench/single_layer.py --data /data/cifar10-jpeg --threads 1 \\
        --out bench/results/MACHINE/single-layer.json

The small experiment of Andriushchenko and Flammarion 2020 (figures 5, 6, 7 and 11): one 3x3
convolution with four filters, ReLU, a linear layer. FGSM training loses its robustness within
a few epochs while its accuracy under FGSM rises: one filter turns into a high-pass filter that
amplifies the perturbation until the loss inside the ball is no longer linear. With GradAlign's
term, everything else equal, it does not. Beside the JSON lie the pictures: -curves.png,
-filters.png and -surface.png.

From the authors' code: initialisation, Adam with weight decay 5e-4, batch 128, the triangular
rate with its peak of 0.003 at 2/5 of the updates, lambda(eps), pixels in [0, 1]. Ours: 16/255
(theirs: 10/255), fewer images and epochs, so that it takes minutes on a CPU, and no crops or flips.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import harness
import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpecFromSubplotSpec
from matplotlib.ticker import MaxNLocator, PercentFormatter
from PIL import Image
from torch import Tensor, nn
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import center_crop, pil_to_tensor, resize

from freeadv_fast.config.attack import Attack
from freeadv_fast.config.presets import preset_lambda
from freeadv_fast.config.threat import Perturbation, ThreatModel
from freeadv_fast.evaluation.attacks import is_correct, perturb
from freeadv_fast.evaluation.report import BLUE, GREEN, GREY, INK, ORANGE, STYLE, VERMILION
from freeadv_fast.session.guard import Count, History
from freeadv_fast.step.alignment import misalignment

SIZE = 32
BATCH = 128
PEAK_LR = 0.003
WEIGHT_DECAY = 5e-4
PEAK_AT = 0.4  # of the updates
EPOCH_ATTACK, FINAL_ATTACK = Attack.parse("pgd-10"), Attack.parse("pgd-50")
# The loss surface: points along each direction, and images that it is the mean over.
GRID, NUM_SURFACE_IMAGES = 33, 128
NAMES = {"fgsm": "FGSM", "gradalign": "FGSM + GradAlign"}
ACCURACIES = (
    ("clean", "clean", BLUE),
    ("fgsm", "under FGSM", ORANGE),
    ("pgd", f"under {str(EPOCH_ATTACK).upper()}", VERMILION),
)


@dataclasses.dataclass(frozen=True)
class Data:
    """Images (n, 3, 32, 32) float32 in [0, 1] and labels (n,) int64, for training and testing."""

    name: str
    classes: list[str]
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def load_data(folder: Path, num_train: int, num_test: int) -> Data:
    """The first images of CIFAR-10's JPEG copy, or evenly spaced ones of an ImageFolder."""
    if (folder / "cifar10_jpeg_train.npz").exists():
        classes = "airplane automobile bird cat deer dog frog horse ship truck".split()
        train, test = (
            _unpack(folder / f"cifar10_jpeg_{split}.npz", count)
            for split, count in (("train", num_train), ("test", num_test))
        )
        return Data("CIFAR-10 (JPEG copy)", classes, train, test)
    train_set, test_set = (ImageFolder(str(folder / split)) for split in ("train", "val"))
    train, test = _sample(train_set, num_train), _sample(test_set, num_test)
    return Data(folder.name, train_set.classes, train, test)


def _unpack(path: Path, count: int) -> tuple[Tensor, Tensor]:
    """JPEGs with one common header, bodies end to end."""
    with np.load(path) as arrays:
        header, blob, offsets = (arrays[key] for key in ("header", "blob", "offsets"))
        labels = torch.from_numpy(arrays["labels"][:count].astype(np.int64))
    head, body = header.tobytes(), blob.tobytes()
    files = [head + body[offsets[i] : offsets[i + 1]] for i in range(len(labels))]
    return _to_tensor([Image.open(io.BytesIO(file)) for file in files]), labels


def _sample(dataset: ImageFolder, count: int) -> tuple[Tensor, Tensor]:
    """Evenly spaced images, shorter side resized to 32 px, the centre cropped."""
    rows = np.linspace(0, len(dataset) - 1, min(count, len(dataset))).round().astype(int)
    pictures, labels = zip(*(dataset[row] for row in rows), strict=True)
    return _to_tensor([center_crop(resize(p, SIZE), SIZE) for p in pictures]), torch.tensor(labels)


def _to_tensor(pictures: list[Image.Image]) -> Tensor:
    """(n, 3, 32, 32) float32 in [0, 1]."""
    return torch.stack([pil_to_tensor(picture) for picture in pictures]).float().div(255)


class SingleLayer(nn.Module):
    """3x3 convolution, ReLU, linear layer, initialised as in the authors' code."""

    def __init__(self, num_filters: int, num_classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, num_filters, 3, padding=1)
        self.linear = nn.Linear(num_filters * SIZE * SIZE, num_classes)
        nn.init.normal_(self.conv.weight, std=math.sqrt(2 / (9 * num_filters)))
        nn.init.zeros_(self.conv.bias)
        nn.init.normal_(self.linear.weight, std=math.sqrt(2 / self.linear.in_features))

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(self.conv(images).relu().flatten(1))

    @torch.no_grad()
    def norms(self) -> tuple[list[float], list[float]]:
        """L2 norm of each filter, and of the linear layer's weights on its feature map."""
        num_filters = self.conv.out_channels
        outgoing = self.linear.weight.unflatten(1, (num_filters, -1)).transpose(0, 1)
        return tuple(w.flatten(1).norm(dim=1).tolist() for w in (self.conv.weight, outgoing))


def input_gradient(
    network: nn.Module, images: Tensor, labels: Tensor, *, create_graph: bool = False
) -> Tensor:
    """Gradient of the mean cross entropy with respect to the images."""
    images = images.detach().requires_grad_()
    loss = F.cross_entropy(network(images), labels)
    return torch.autograd.grad(loss, images, create_graph=create_graph)[0]


def uniform_like(images: Tensor, eps: float) -> Tensor:
    """eta ~ U(-eps, eps), one number a pixel."""
    return torch.empty_like(images).uniform_(-eps, eps)


@dataclasses.dataclass
class Training:
    """One network's way: a record and the weights after every epoch, the start first."""

    network: SingleLayer
    epochs: list[dict[str, Any]]
    weights: list[dict[str, Tensor]]
    final_pgd: float = math.nan

    @property
    def best(self) -> int:
        """The epoch of the highest accuracy under PGD: before the collapse, if there is one."""
        return max(range(len(self.epochs)), key=lambda epoch: self.epochs[epoch]["pgd"])

    def at(self, epoch: int) -> SingleLayer:
        """The network after an epoch; -1 is the last."""
        self.network.load_state_dict(self.weights[epoch])
        return self.network

    @property
    def culprit(self) -> int:
        """The filter whose outgoing weights grew most between the best epoch and the last."""
        before, after = (np.array(self.epochs[e]["outgoing_norms"]) for e in (self.best, -1))
        return int((after / before).argmax())


@dataclasses.dataclass(frozen=True)
class Method:
    """FGSM from noise, not projected, and GradAlign's term.

    Attributes:
        noise: Radius of the noise in units of eps; 0 starts at the image itself.
        weight: lambda of the term. every: Updates from one term to the next, weighted as much.
        share: Of each minibatch, the images that the term is taken on.
    """

    noise: float = 0.0
    weight: float = 0.0
    every: int = 1
    share: float = 1.0


def train(data: Data, threat: ThreatModel, method: Method, seed: int, settings: Any) -> Training:
    """Trains once; without noise the attack starts at the image itself."""
    torch.manual_seed(seed)
    network, eps = SingleLayer(settings.filters, len(data.classes)), float(threat.eps)
    optimizer = torch.optim.Adam(network.parameters(), lr=PEAK_LR, weight_decay=WEIGHT_DECAY)
    training, update = Training(network, [], []), 0
    total = settings.epochs * (len(data.train[1]) // BATCH)
    for epoch in range(settings.epochs + 1):
        if epoch > 0:
            for images, labels in minibatches(*data.train):
                update += 1
                rate = np.interp(update / total, (0, PEAK_AT, 1), (0, PEAK_LR, 0))
                optimizer.param_groups[0]["lr"] = float(rate)
                start = images
                if method.noise:
                    start = (images + uniform_like(images, method.noise * eps)).clamp(0, 1)
                gradient = input_gradient(network, start, labels)
                adversarial = (start + eps * gradient.sign()).clamp(0, 1)
                loss = F.cross_entropy(network(adversarial), labels)
                if method.weight and update % method.every == 0:
                    part = slice(round(method.share * len(images)))
                    noisy = images[part] + uniform_like(images[part], eps)
                    other = input_gradient(network, noisy, labels[part], create_graph=True)
                    term = misalignment(gradient[part], other).mean()
                    loss = loss + method.weight * method.every * term
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        training.epochs.append({"epoch": epoch, **examine(network, data, threat, EPOCH_ATTACK)})
        training.weights.append({k: v.clone() for k, v in network.state_dict().items()})
    training.final_pgd = examine(network, data, threat, FINAL_ATTACK)["pgd"]
    return training


def minibatches(images: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """A random order; the incomplete last minibatch is left out."""
    for rows in torch.randperm(len(labels)).split(BATCH):
        if len(rows) == BATCH:
            yield images[rows], labels[rows]


def examine(
    network: SingleLayer, data: Data, threat: ThreatModel, attack: Attack
) -> dict[str, Any]:
    """Accuracies on the test images, gradient alignment there, norms of the weights.

    The noise comes from a generator of its own, so that looking changes no training.
    """
    (images, labels), eps = data.test, float(threat.eps)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        gradient = input_gradient(network, images, labels)
        other = input_gradient(network, images + uniform_like(images, eps), labels)
        attacked = perturb(network, images, labels, attack=attack, threat=threat)
    with torch.no_grad():
        fgsm = network((images + eps * gradient.sign()).clamp(0, 1))
        clean = network(images)
    filters, outgoing = network.norms()
    return {
        "clean": is_correct(clean, labels).float().mean().item(),
        "fgsm": is_correct(fgsm, labels).float().mean().item(),
        "pgd": 1 - attacked.is_fooled.float().mean().item(),
        "alignment": 1 - misalignment(gradient, other).mean().item(),
        "filter_norms": filters,
        "outgoing_norms": outgoing,
    }


@torch.no_grad()
def loss_surface(network: SingleLayer, data: Data, eps: float) -> Tensor:
    """Mean loss at x + u eps sign(gradient) + v eps r, r of random signs.

    Returns:
        (GRID, GRID): u from 0 to 1 along the rows, v from -1 to 1 along the columns.
    """
    images, labels = (part[:NUM_SURFACE_IMAGES] for part in data.test)
    with torch.enable_grad():
        ascent = input_gradient(network, images, labels).sign()
    generator = torch.Generator().manual_seed(0)
    random = torch.randint(0, 2, images.shape, generator=generator) * 2.0 - 1
    losses = [
        F.cross_entropy(network((images + eps * (u * ascent + v * random)).clamp(0, 1)), labels)
        for u in torch.linspace(0, 1, GRID)
        for v in torch.linspace(-1, 1, GRID)
    ]
    return torch.stack(losses).view(GRID, GRID)


def draw_curves(trainings: dict[str, list[Training]], eps: Perturbation) -> Figure:
    """Accuracies of both methods, gradient alignment, outgoing weights; a thin line a seed."""
    figure = Figure(figsize=(10, 6.4), layout="constrained")
    top, bottom = figure.subplots(2, 2, sharex=True)
    for axes, (method, runs) in zip(top, trainings.items(), strict=True):
        for key, label, color in ACCURACIES:
            _curves(axes, [[row[key] for row in run.epochs] for run in runs], color, label)
        axes.set(title=f"Trained with {NAMES[method]}, eps {eps}", ylim=(0, 1))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.legend(loc="upper left")
    top[0].set_ylabel("test images classified correctly")
    alignment, norms = bottom
    for (method, runs), color in zip(trainings.items(), (VERMILION, GREEN), strict=True):
        values = [[row["alignment"] for row in run.epochs] for run in runs]
        _curves(alignment, values, color, NAMES[method])
    alignment.set(title="Gradient alignment", ylabel="cos(grad at x, grad at x + eta)", ylim=(0, 1))
    alignment.legend(loc="lower left")
    first = trainings["fgsm"][0]
    by_filter = np.array([row["outgoing_norms"] for row in first.epochs]).T
    others = np.delete(by_filter, first.culprit, axis=0)
    _curves(norms, by_filter[[first.culprit]], VERMILION, f"filter {first.culprit + 1}")
    _curves(norms, others, GREY, "the other filters")
    norms.set(title="FGSM: how much the output depends on each filter", ylim=(0, None))
    norms.set_ylabel("L2 norm of outgoing weights")
    norms.legend(loc="upper left")
    for axes in bottom:
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlim(0, len(first.epochs) - 1)
    return figure


def _curves(axes: Axes, runs: Sequence[Sequence[float]], color: str, label: str) -> None:
    """The first run as a strong line, the others as thin ones."""
    for number, values in enumerate(runs):
        style = {"linewidth": 1.9, "label": label} if number == 0 else {"alpha": 0.4}
        axes.plot(values, **{"color": color, "linewidth": 1.0, "clip_on": False, **style})


def draw_filters(trainings: dict[str, list[Training]], data: Data, eps: float) -> Figure:
    """The filters before and after, and what two of them see of an image and its perturbed twin."""
    fgsm, gradalign = trainings["fgsm"][0], trainings["gradalign"][0]
    num_filters, culprit = fgsm.network.conv.out_channels, fgsm.culprit
    figure = Figure(figsize=(1.45 * num_filters + 6.6, 5.0))
    left, right = figure.add_gridspec(
        1, 2, width_ratios=(1.45 * num_filters, 5.9), wspace=0.08,
        left=0.06, right=0.99, top=0.93, bottom=0.07,
    )  # fmt: skip
    rows = (
        (f"FGSM, epoch {fgsm.best}:\nbefore", fgsm, fgsm.best),
        (f"FGSM, epoch {fgsm.epochs[-1]['epoch']}:\nafter", fgsm, -1),
        (f"GradAlign,\nepoch {fgsm.epochs[-1]['epoch']}", gradalign, -1),
    )
    grid = GridSpecFromSubplotSpec(len(rows), num_filters, left, wspace=0.1, hspace=0.1)
    for line, (name, training, epoch) in enumerate(rows):
        filters = training.at(epoch).conv.weight.detach()[:, 1]
        for number, weights in enumerate(filters):
            axes = figure.add_subplot(grid[line, number])
            _show_filter(axes, weights, is_marked=number == culprit and training is fgsm)
            if line == 0:
                axes.set_title(f"filter {number + 1}", loc="center", pad=8)
            if number == 0:
                axes.set_ylabel(name)
    network = fgsm.at(-1)
    outgoing = np.array(fgsm.epochs[-1]["outgoing_norms"])
    outgoing[culprit] = -1
    _show_maps(figure, right, network, data, eps, (int(outgoing.argmax()), culprit))
    return figure


def _show_filter(axes: Axes, weights: Tensor, *, is_marked: bool) -> None:
    """A (3, 3) filter in red and blue with its numbers, framed if it is the one."""
    largest = weights.abs().max().item()
    axes.imshow(weights, cmap="RdBu_r", vmin=-largest, vmax=largest)
    for (row, column), value in np.ndenumerate(weights.numpy()):
        color = "white" if abs(value) > 0.6 * largest else INK
        text = f"{value:.2f}".replace("-0.00", "0.00")
        axes.text(column, row, text, ha="center", va="center", color=color, fontsize=7)
    axes.set(xticks=[], yticks=[])
    axes.grid(visible=False)
    axes.spines[:].set_visible(is_marked)
    axes.spines[:].set(color=VERMILION, linewidth=2.5)


def _show_maps(
    figure: Figure,
    place: Any,
    network: SingleLayer,
    data: Data,
    eps: float,
    filters: tuple[int, int],
) -> None:
    """The first test image and its perturbed twin, each beside two filters' responses to it."""
    image, label = data.test[0][:1], data.test[1][:1]
    twin = (image + eps * input_gradient(network, image, label).sign()).clamp(0, 1)
    maps = [network.conv(pixels).detach()[0] for pixels in (image, twin)]
    grid = GridSpecFromSubplotSpec(3, 3, place, height_ratios=(1, 1, 0.04), wspace=0.06)
    for line, (pixels, responses, name) in enumerate(
        zip((image, twin), maps, ("x", "x + delta"), strict=True)
    ):
        axes = figure.add_subplot(grid[line, 0])
        axes.imshow(pixels[0].permute(1, 2, 0), interpolation="nearest")
        _bare(axes, name)
        for column, number in enumerate(filters, start=1):
            # One scale for both rows: what the perturbation adds is what is to be seen.
            largest = max(response[number].abs().max().item() for response in maps)
            axes = figure.add_subplot(grid[line, column])
            drawn = axes.imshow(responses[number], cmap="RdBu_r", vmin=-largest, vmax=largest)
            _bare(axes, f"filter {number + 1} on {name}")
            if line == 1:
                scale = figure.add_subplot(grid[2, column])
                bar = figure.colorbar(drawn, cax=scale, orientation="horizontal")
                bar.outline.set_visible(False)
                bar.ax.tick_params(labelsize=7)


def _bare(axes: Axes, title: str) -> None:
    """A picture without axes."""
    axes.set_title(title, loc="center", fontsize=9, fontweight="normal")
    axes.set(xticks=[], yticks=[])
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)


def draw_surfaces(trainings: dict[str, list[Training]], data: Data, eps: Perturbation) -> Figure:
    """The loss over FGSM's direction and a random one, before and after, and with GradAlign."""
    fgsm, gradalign = trainings["fgsm"][0], trainings["gradalign"][0]
    last = fgsm.epochs[-1]["epoch"]
    surfaces = {
        f"FGSM, epoch {fgsm.best}: before": loss_surface(fgsm.at(fgsm.best), data, float(eps)),
        f"FGSM, epoch {last}: after": loss_surface(fgsm.at(-1), data, float(eps)),
        f"FGSM + GradAlign, epoch {last}": loss_surface(gradalign.at(-1), data, float(eps)),
    }
    heights = torch.stack(list(surfaces.values()))
    lowest, highest = heights.min().item() - 0.05, heights.max().item() + 0.05
    u, v = np.meshgrid(np.linspace(0, 1, GRID), np.linspace(-1, 1, GRID), indexing="ij")
    figure = Figure(figsize=(12, 4))
    figure.subplots_adjust(left=0.02, right=0.98, bottom=0.06, top=0.94, wspace=0.04)
    for number, (title, surface) in enumerate(surfaces.items(), start=1):
        axes = figure.add_subplot(1, 3, number, projection="3d")
        axes.plot_surface(
            u, v, surface.numpy(), cmap="viridis", vmin=lowest, vmax=highest,
            rcount=GRID, ccount=GRID, linewidth=0.2, edgecolor="#FFFFFF55",
        )  # fmt: skip
        middle = GRID // 2
        axes.plot(u[:, middle], v[:, middle], surface[:, middle].numpy(), color=VERMILION, zorder=9)
        axes.set(zlim=(lowest, highest), xlim=(0, 1), ylim=(-1, 1), zlabel="cross entropy")
        axes.set(xticks=(0, 0.5, 1), yticks=(-1, 0, 1))
        axes.set(xlabel="FGSM's direction (eps)", ylabel="random direction (eps)")
        axes.set_title(title, loc="center", y=0.98)
        axes.view_init(elev=24, azim=-128)
        axes.tick_params(labelsize=7)
        axes.set_box_aspect(None, zoom=0.88)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Writes a PNG without pyplot."""
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=130)


def epoch_of_alarm(epochs: Sequence[dict[str, Any]], num_images: int) -> int | None:
    """The epoch after which the trainer's guard would have named a collapse; None for never."""
    history = History()
    for epoch in epochs:
        if history.add(Count(round(epoch["pgd"] * num_images), num_images)):
            return int(epoch["epoch"])
    return None


def describe(run: Training, seed: int, method: Method, num_images: int) -> dict[str, Any]:
    """A training as JSON.

    `constant_share` of a filter: sum over channels of |sum of weights|, over the sum of |weights|.
    0 is a pure high-pass, which answers to no constant image.
    """
    filters = run.at(-1).conv.weight.detach()
    constant = filters.sum((2, 3)).abs().sum(1) / filters.abs().sum((1, 2, 3))
    return {
        "seed": seed,
        "lambda": method.weight,
        "noise": method.noise,
        "every": method.every,
        "share": method.share,
        "epoch_of_alarm": epoch_of_alarm(run.epochs, num_images),
        "best_pgd_epoch": run.best,
        f"final_{FINAL_ATTACK}": run.final_pgd,
        "fastest_growing_filter": run.culprit + 1,
        "constant_share": [round(share, 4) for share in constant.tolist()],
        "epochs": run.epochs,
    }


def main() -> None:
    """Trains all ways from every seed, writes the JSON, draws FGSM and GradAlign."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="JPEG copy or ImageFolder")
    parser.add_argument("--eps", type=Perturbation.parse, default=Perturbation.parse("16/255"))
    parser.add_argument("--filters", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--train-images", type=int, default=10_000)
    parser.add_argument("--eval-images", type=int, default=512)
    parser.add_argument("--seeds", default="1,0,2", help="separated by commas; the first is drawn")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--out", type=Path, required=True, help="JSON; pictures lie beside it")
    flags = parser.parse_args()
    if flags.threads:
        torch.set_num_threads(flags.threads)
    data = load_data(flags.data, flags.train_images, flags.eval_images)
    threat = ThreatModel(flags.eps, Perturbation(flags.eps.levels * Fraction(1, 4)))
    weight = preset_lambda("cifar10", float(flags.eps.levels))
    methods = {
        "fgsm": Method(),
        "gradalign": Method(weight=weight),
        "n-fgsm": Method(noise=2.0),
        "gradalign-every-2": Method(weight=weight, every=2),
        "gradalign-half-batch": Method(weight=weight, share=0.5),
    }
    trainings: dict[str, list[Training]] = {name: [] for name in methods}
    seeds = [int(seed) for seed in flags.seeds.split(",")]
    for seed in seeds:
        for name, method in methods.items():
            run = train(data, threat, method, seed, flags)
            trainings[name].append(run)
            end = run.epochs[-1]
            print(
                f"seed {seed} {name:10s} clean {end['clean']:.1%} FGSM {end['fgsm']:.1%} "
                f"{FINAL_ATTACK} {run.final_pgd:.1%} alignment {end['alignment']:.2f}; best "
                f"{EPOCH_ATTACK} {run.epochs[run.best]['pgd']:.1%} in epoch {run.best}",
                flush=True,
            )
    record = {
        "benchmark": "single-layer",
        "environment": harness.environment_record(torch.device("cpu")),
        "settings": {
            "data": data.name,
            "train_images": len(data.train[1]),
            "eval_images": len(data.test[1]),
            "eps": str(flags.eps),
            "attack_step": str(threat.step),
            "filters": flags.filters,
            "epochs": flags.epochs,
            "batch_size": BATCH,
            "optimizer": f"Adam, weight decay {WEIGHT_DECAY}",
            "lr": f"0 to {PEAK_LR} at {PEAK_AT:.0%} of the updates, back to 0",
            "lambda": methods["gradalign"].weight,
        },
        "results": {
            name: [
                describe(run, seed, methods[name], len(data.test[1]))
                for run, seed in zip(runs, seeds, strict=True)
            ]
            for name, runs in trainings.items()
        },
    }
    harness.write_json(flags.out, record)
    with matplotlib.rc_context(STYLE):
        for name, figure in (
            ("curves", draw_curves(trainings, flags.eps)),
            ("filters", draw_filters(trainings, data, float(flags.eps))),
            ("surface", draw_surfaces(trainings, data, flags.eps)),
        ):
            save(figure, flags.out.with_name(f"{flags.out.stem}-{name}.png"))


if __name__ == "__main__":
    main()
