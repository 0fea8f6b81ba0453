"""DAT written out, image by image where labelled and unlabelled ones differ, in float64.

Labels are pairs: the label, and whether it is a real one.
"""

import copy

import torch
import torch.nn.functional as F

import slow_steps as slow

EPS, STEP, NUM_STEPS = 8, 3, 4
THREAT = slow.threat(EPS, STEP)


def kl(clean_logits, adversarial_logits):
    """KL(p(x) || p(x + delta)) of one image."""
    p, q = clean_logits.softmax(0), adversarial_logits.softmax(0)
    return (p * (p / q).log()).sum()


def phi_sum(clean_logits, adversarial_logits, labels, is_labelled):
    """What attacks maximise, summed over the images."""
    total = 0
    for p, q, label, has_label in zip(
        clean_logits, adversarial_logits, labels, is_labelled, strict=True
    ):
        total = total + (F.cross_entropy(q, label) if has_label else kl(p, q))
    return total


def author_step(images, delta, gradient):
    """One step as the authors' code clips it: to the pixel range, then to the ball."""
    moved = (images.double() + delta + STEP * gradient.sign()).clamp(0, 255)
    return moved.clamp(images.double() - EPS, images.double() + EPS) - images.double()


def attack(trainer, images, labels, is_labelled, mode):
    """K steps from a uniform start, or from small noise where there is no label."""
    network = copy.deepcopy(trainer.network).eval() if mode == "eval" else trainer.network
    zero = torch.zeros(images.shape, dtype=torch.float64)
    clean_logits = None
    if not all(is_labelled):
        with torch.no_grad():
            clean_logits = network(trainer.x(images, zero))
    delta = slow.uniform(images, EPS)
    if not all(is_labelled):
        noise = slow.in_pixel_range(torch.randn(images.shape).mul(0.255).double(), images)
        for row, has_label in enumerate(is_labelled):
            delta[row] = delta[row] if has_label else noise[row]
    for _ in range(NUM_STEPS):
        delta.requires_grad_()
        logits = network(trainer.x(images, delta))
        known = logits.detach() if clean_logits is None else clean_logits
        value = phi_sum(known, logits, labels, is_labelled)
        (gradient,) = torch.autograd.grad(value, delta)
        delta = author_step(images, delta.detach(), gradient)
    return delta


def losses(trainer, images, delta, labels, is_labelled, clean_weight):
    """phi, and lambda times the labelled images' cross-entropy: means over the minibatch."""
    n = len(images)
    adversarial_logits = trainer.network(trainer.x(images, delta))
    clean_logits = trainer.network(trainer.x(images, torch.zeros_like(delta)))
    robust = phi_sum(clean_logits, adversarial_logits, labels, is_labelled)
    natural = sum(
        F.cross_entropy(logits, label)
        for logits, label, has_label in zip(clean_logits, labels, is_labelled, strict=True)
        if has_label
    )
    return robust / n, clean_weight * natural / n


def train(trainer, minibatches, mode, clean_weight):
    """An update for each minibatch of images, labels and whether these are real."""
    for images, labels, is_labelled in minibatches:
        delta = attack(trainer, images, labels, is_labelled, mode)
        trainer.step(*losses(trainer, images, delta, labels, is_labelled, clean_weight))
